#pragma once
// Byte-level BPE as Hugging Face's `tokenizers` library does it, from a tokenizer.json: the same
// ids for every input.

#include <unordered_map>

#include "data/pretokenize.h"

namespace pith {

// Immutable: any number of threads may encode and decode at once.
class Tokenizer {
 public:
  // A tokenizer.json, or a directory that holds one. Whatever this class does not implement
  // (another model type, normalizer, pre-tokenizer or decoder, byte_fallback, dropout ...) is an
  // InputError that names it.
  explicit Tokenizer(const std::string& path);

  // Ids of `text` without special-token post-processing; special tokens written out in the text
  // become their ids. Malformed UTF-8 counts as U+FFFD, one per maximal subpart, as Python's
  // errors="replace" has it.
  std::vector<int32_t> encode(std::string_view text) const;

  // The text of `ids`; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary are left
  // out.
  std::string decode(std::span<const int32_t> ids) const;

  int32_t vocab_size() const { return int32_t(tokens_.size()); }  // largest id + 1

  // The end-of-text id: `eos_token` of tokenizer_config.json beside the file if that names one,
  // else the first of the usual names that is an added token, else nothing.
  std::optional<int32_t> eos_id() const { return eos_; }

  const std::string& file() const { return file_; }  // path of the tokenizer.json that was read

 private:
  friend class Encoder;
  struct Token {
    std::string bytes;                // what it decodes to; nothing for an id that nobody has
    bool own = false, added = false;  // own: of the BPE model
  };
  struct AddedToken {
    std::string text;
    int32_t id;
    bool single_word, lstrip, rstrip;
  };
  struct PairHash {  // the identity of std::hash makes all of tokenizing a quarter slower
    size_t operator()(uint64_t k) const { return (k ^ k >> 29) * 0x9e3779b97f4a7c15u >> 20; }
  };
  using AddedTokens = std::array<std::vector<AddedToken>, 256>;  // by first byte, longest first

  void read_bpe(const Value& bpe);
  void read_merges(const Value& merges);
  void read_normalizer(const Value& spec);
  void read_added(const Value& added);
  void find_eos();
  void set_token(int64_t id, const std::string& text);
  int32_t find(const std::string& text) const;  // -1 if there is none
  struct Symbol;
  void bpe(std::string_view piece, std::vector<int32_t>& out) const;
  void merge(std::vector<Symbol>& symbols) const;

  std::string file_;
  std::vector<Token> tokens_;
  std::unordered_map<std::string, int32_t> vocabulary_;  // as spelled in the file
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

// Encodes faster by a cache of short pieces: one for each thread. Tokenizer::encode makes one for
// each call; loops keep their own. The tokenizer must outlive it.
class Encoder {
 public:
  explicit Encoder(const Tokenizer& tokenizer) : tokenizer_(tokenizer), cache_(1 << 15) {}
  void encode(std::string_view text, std::vector<int32_t>& out);  // appends

 private:
  void encode_piece(std::string_view piece, std::vector<int32_t>& out);

  struct Cached {
    std::string piece;
    std::vector<int32_t> ids;
  };
  const Tokenizer& tokenizer_;
  std::vector<Cached> cache_;  // by hash; a new piece replaces what is in its place
};

}  // namespace pith
