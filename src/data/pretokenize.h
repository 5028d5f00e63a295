#pragma once
// The "pre_tokenizer" of a tokenizer.json: cuts text into the pieces that BPE works on. Split,
// Digits, ByteLevel and Sequence of those, ByteLevel last; the patterns are Oniguruma's, run by
// PCRE2.

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/value.h"

struct pcre2_real_code_8;

namespace pith {

class PreTokenizer {
 public:
  explicit PreTokenizer(const Value& spec);  // InputError for what is not supported
  PreTokenizer(const PreTokenizer& other);   // shares the patterns, not the memory: one per thread

  // Calls piece(view) for the pieces of `text` (valid UTF-8), in order. A view lives for the call.
  using Sink = std::function<void(std::string_view)>;
  void split(std::string_view text, const Sink& piece);

 private:
  enum class Behavior { isolated, removed, merged_with_previous, merged_with_next, contiguous };
  struct Step {  // a prefix space where `code` is null, else a split
    std::shared_ptr<pcre2_real_code_8> code;
    Behavior behavior = Behavior::isolated;
    bool invert = false;
    bool by_property = false;  // has a \p
  };
  struct Piece {  // `shape` is what patterns with properties see (stand_in, data/unicode.h)
    const char *text, *shape;
    size_t size;
  };
  struct Memory;
  void add(const Value& spec);
  void add_split(const std::string& pattern, bool literal, const std::string& where,
                 Behavior behavior, bool invert);
  void run(size_t step, Piece piece, const Sink& sink);
  void run_split(size_t step, Piece piece, const Sink& sink);
  bool find(const Step& step, Piece piece, size_t at);

  std::vector<Step> steps_;
  bool byte_level_ = false;
  std::shared_ptr<Memory> memory_;
};

}  // namespace pith
