#pragma once
// The "pre_tokenizer" of a tokenizer.json: cuts text into the pieces that BPE works on. Split,
// Digits, ByteLevel and Sequence of those, ByteLevel last. The patterns are Oniguruma's.

#include "core/value.h"

struct re_pattern_buffer;

namespace pith {

// Immutable: any number of threads may split at once.
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
  void run_split(size_t step, std::string_view piece, const Sink& sink) const;

  std::vector<Step> steps_;
  bool byte_level_ = false;
};

}  // namespace pith
