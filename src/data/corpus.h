#pragma once
// Token corpora: the Megatron-LM pair PREFIX.bin (ids, uint16 or int32, back to back) and
// PREFIX.idx. .idx, little-endian: "MMIDIDX\0\0", u64 version 1, u8 dtype code (8 = uint16, 4 =
// int32), u64 sequences, u64 document indices (documents + 1), int32 lengths[sequences] in tokens,
// int64 offsets[sequences] in bytes, int64 document_indices[], the first sequence of every
// document, from 0 to `sequences`.

#include "core/file.h"

namespace pith {

// Reader over memory maps. Everything in the index is checked when it is opened (InputError); token
// ids are not: who feeds them to a model checks them against its vocabulary. Safe for concurrent
// use.
class Corpus {
 public:
  explicit Corpus(const std::string& prefix);  // PREFIX.idx and PREFIX.bin
  const std::string& prefix() const { return prefix_; }
  int64_t tokens() const { return document_offsets_.back(); }

  // In tokens, one more than there are documents: where each begins, and the end.
  const std::vector<int64_t>& document_offsets() const { return document_offsets_; }

  // Ids [begin, begin + count) of the concatenated stream into out[count]. Error outside the
  // stream.
  void read(int64_t begin, int64_t count, int32_t* out) const;

 private:
  std::string prefix_;
  MappedFile data_;
  std::vector<int64_t> document_offsets_;
  int token_bytes_ = 0;  // 2 or 4
};

// Writer. Tokens and lengths grow in PREFIX.bin.partial and PREFIX.len.partial; finish() makes the
// pair appear by rename. A writer destroyed before that leaves the partial files, from which
// another may continue.
class CorpusWriter {
 public:
  // uint16 when vocab_size < 65500, else int32. Keeps the first `documents` documents of `tokens`
  // tokens of the partial files; starts afresh if they have fewer.
  CorpusWriter(const std::string& prefix, int64_t vocab_size, int64_t documents = 0,
               int64_t tokens = 0);
  // Documents of one sequence each, back to back, and their lengths in tokens. Error for an id
  // outside the vocabulary.
  void add(std::span<const int32_t> ids, std::span<const int32_t> lengths);
  void flush_to_disk();  // what was added so far survives a crash
  void finish();         // InputError when nothing was added
  int64_t documents() const { return documents_; }
  int64_t tokens() const { return tokens_; }

 private:
  std::string prefix_;
  int64_t vocab_size_, documents_, tokens_;
  int token_bytes_ = vocab_size_ < 65500 ? 2 : 4;
  OutputFile bin_ = OutputFile(prefix_ + ".bin.partial", true),
             lengths_ = OutputFile(prefix_ + ".len.partial", true);
};

}  // namespace pith
