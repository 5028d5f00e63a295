#pragma once
// The "pre_tokenizer" of a tokenizer.json: cuts text into the pieces that BPE works on. Split, Digits, ByteLevel and
// Sequence of those, with ByteLevel last; the patterns are Oniguruma's, run by PCRE2.

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/value.h"

typedef struct pcre2_real_code_8 pcre2_code_8;

namespace pith {

// An Oniguruma pattern (Ruby-like syntax, Unicode, "^" and "$" at lines) in PCRE2's spelling. What PCRE2 cannot say
// with the same meaning is an InputError that names it after `where`.
std::string pcre2_pattern(const std::string& onig, const std::string& where);

class PreTokenizer {
 public:
  explicit PreTokenizer(const Value& spec);  // InputError for what is not supported

  // Working memory of one thread.
  class Scratch {
   public:
    explicit Scratch(const PreTokenizer& owner);
    Scratch(Scratch&&) noexcept;
    ~Scratch();

   private:
    friend class PreTokenizer;
    struct State;
    std::unique_ptr<State> state_;
  };

  // Calls piece(view) for the pieces of `text` (valid UTF-8), in order. A view lives until the call returns.
  using Sink = std::function<void(std::string_view)>;
  void split(std::string_view text, Scratch& scratch, const Sink& piece) const;

 private:
  enum class Behavior { isolated, removed, merged_with_previous, merged_with_next, contiguous };
  struct Step {  // a prefix space where `code` is null, else a split
    std::shared_ptr<pcre2_code_8> code;
    Behavior behavior = Behavior::isolated;
    bool invert = false;
  };
  struct Piece {  // `shape` is what the patterns see: `text` but for characters younger than PCRE2's tables
    const char *text, *shape;
    size_t size;
  };
  void add(const Value& spec);
  void add_split(const std::string& pattern, bool literal, const std::string& where,
                 Behavior behavior = Behavior::isolated, bool invert = false);
  void run(size_t step, Piece piece, Scratch::State& state, const Sink& sink) const;
  void run_split(size_t step, Piece piece, Scratch::State& state, const Sink& sink) const;

  std::vector<Step> steps_;
  bool byte_level_ = false;
};

}  // namespace pith
