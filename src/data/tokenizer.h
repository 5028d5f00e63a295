#pragma once
// Byte-level BPE as Hugging Face's `tokenizers` library does it, from a tokenizer.json: the same
// ids for every input.

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace pith {

// Immutable after construction but for set_eos; encode and decode may run on many threads at once.
class Tokenizer {
 public:
  // A tokenizer.json, or a directory that holds one. Whatever this class does not implement
  // (another model type, normalizer, pre-tokenizer or decoder, byte_fallback, dropout ...) is an
  // InputError that names it.
  explicit Tokenizer(const std::string& path);
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // Ids of `text` without special-token post-processing; special tokens written out in the text
  // become their ids. Malformed UTF-8 counts as U+FFFD, one per maximal subpart, as Python's
  // errors="replace" has it.
  std::vector<int32_t> encode(std::string_view text) const;

  // The text of `ids`; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary are left
  // out.
  std::string decode(std::span<const int32_t> ids, bool skip_special = false) const;

  int32_t vocab_size() const;                                  // largest id + 1
  std::optional<int32_t> id_of(std::string_view token) const;  // as spelled in tokenizer.json
  bool is_special(int32_t id) const;

  // The end-of-text id: `eos_token` of tokenizer_config.json beside the file if that names one,
  // else the first of the usual names that is an added token, else nothing.
  std::optional<int32_t> eos_id() const;
  void set_eos(int32_t id);         // InputError outside [0, vocab_size)
  const std::string& file() const;  // path of the tokenizer.json that was read

  struct Model;

 private:
  friend class Encoder;
  std::unique_ptr<Model> model_;
};

// The state one thread needs to encode fast: a cache of short pieces and scratch memory.
// Tokenizer::encode makes one for each call; loops keep their own. The tokenizer must outlive it.
class Encoder {
 public:
  explicit Encoder(const Tokenizer& tokenizer);
  Encoder(Encoder&&) noexcept;
  ~Encoder();
  void encode(std::string_view text, std::vector<int32_t>& out);  // appends

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace pith
