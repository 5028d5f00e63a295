#pragma once
// Byte-level BPE as Hugging Face's `tokenizers` library does it, from a tokenizer.json: the same
// ids for every input.

#include <unordered_map>

#include "data/pretokenize.h"

namespace pith {

// The ids of short pieces that came up before, by hash; a new one takes the place of an old one. As
// large as whoever makes it wants; of one tokenizer, for one thread at a time.
using PieceCache = std::vector<std::pair<std::string, std::vector<int32_t>>>;

// Immutable: any number of threads may encode and decode at once.
class Tokenizer {
 public:
  // A tokenizer.json, or a directory that holds one. Whatever this class does not implement
  // (another model type, normalizer, pre-tokenizer or decoder, byte_fallback, dropout ...) is an
  // InputError that names it.
  explicit Tokenizer(const std::string& path);

  // Ids of `text` without special-token post-processing; special tokens written out in the text
  // become their ids. Malformed UTF-8 counts as U+FFFD, one per maximal subpart, as Python's
  // errors="replace" has it. With a cache, which must not be empty, long texts take a fraction of
  // the time.
  std::vector<int32_t> encode(std::string_view text, PieceCache* cache = nullptr) const;

  // The text of `ids`; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary are left
  // out.
  std::string decode(std::span<const int32_t> ids) const;

  int32_t vocab_size() const { return int32_t(bytes_.size()); }  // largest id + 1

  // The end-of-text id: `eos_token` of tokenizer_config.json beside the file if that names one,
  // else the first of the usual names that is an added token, else nothing.
  std::optional<int32_t> eos_id() const { return eos_; }

  const std::string& file() const { return file_; }  // path of the tokenizer.json that was read

 private:
  struct AddedToken {
    int32_t id;
    bool single_word, lstrip, rstrip;
  };
  // By first byte, then by text: the longest that fits comes before shorter ones.
  using AddedTokens = std::array<std::map<std::string, AddedToken, std::greater<>>, 256>;
  struct PairHash {  // the identity of std::hash makes all of tokenizing a quarter slower
    size_t operator()(uint64_t k) const { return (k ^ k >> 29) * 0x9e3779b97f4a7c15u >> 20; }
  };

  void read_bpe(const Value& bpe);
  void read_normalizer(const Value& spec);
  void read_added(const Value& added);
  void set_token(int64_t id, const std::string& text);
  int32_t find(const std::string& text) const;  // in the vocabulary of the model; -1 if not
  void bpe(std::string_view piece, std::vector<int32_t>& out) const;

  std::string file_;
  std::vector<std::string> bytes_;                       // what each id decodes to
  std::unordered_map<std::string, int32_t> vocabulary_;  // of the model, as spelled in the file
  AddedTokens raw_, normalized_;  // looked for before and after normalization
  bool nfc_ = false;
  std::optional<PreTokenizer> pretokenizer_;
  std::array<int32_t, 256> byte_id_;  // -1 where the vocabulary lacks the byte
  int32_t unknown_ = -1;              // stands for such bytes; -1: they vanish
  bool fuse_unknown_ = false, ignore_merges_ = false;
  std::unordered_map<uint64_t, uint32_t, PairHash> merges_;  // pair to rank
  std::vector<int32_t> merged_;                              // rank to id
  std::optional<int32_t> eos_;
};

}  // namespace pith
