#pragma once
// What happens to text before BPE, as the `tokenizers` library does it: UTF-8, Unicode, and the cut
// into pieces. The tables are those of the installed utf8proc (2.8: Unicode 14) and Oniguruma
// (6.9.8: Unicode 14); tokenizers 0.23 knows Unicode 16. Letters, digits and marks that came in
// between may be cut in other places.

#include "core/value.h"

struct re_pattern_buffer;

namespace pith {

// Length in bytes of the character that begins with `lead`, and the character at p, in valid UTF-8.
size_t utf8_length(char lead);
uint32_t code_point(const char* p);
void append_utf8(uint32_t code_point, std::string& out);

// U+FFFD for every maximal subpart of an ill-formed sequence (Unicode 16, section 3.9).
std::string repair_utf8(std::string_view text);
// Normalization form C of valid UTF-8.
std::string normalize_nfc(std::string_view text);

bool is_space(uint32_t code_point);  // White_Space
bool is_word(uint32_t code_point);   // \w of Unicode TS 18

// The "pre_tokenizer" of a tokenizer.json: Split, Digits, ByteLevel and Sequence of those, ByteLevel
// last. The patterns are Oniguruma's. Immutable: any number of threads may split at once.
class PreTokenizer {
 public:
  explicit PreTokenizer(const Value& spec);  // InputError for what is not supported

  // Calls piece(view) for the pieces of `text` (valid UTF-8), in order. A view lives for the call.
  using Sink = std::function<void(std::string_view)>;
  void split(std::string_view text, const Sink& piece) const;

 private:
  enum class Behavior { isolated, removed, merged_with_previous, merged_with_next, contiguous };
  struct Step {  // a prefix space where `regex` is null, else a split
    std::shared_ptr<re_pattern_buffer> regex;
    Behavior behavior = Behavior::isolated;
    bool invert = false;
  };
  void add(const Value& spec);
  void run(size_t step, std::string_view piece, const Sink& sink) const;

  std::vector<Step> steps_;
  bool byte_level_ = false;
};

}  // namespace pith
