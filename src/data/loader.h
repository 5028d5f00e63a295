#pragma once
// Batches from token corpora. Which sample a row gets depends only on (seed, row number): not on
// the mesh, the micro-batch or where a run was interrupted.

#include "core/tensor.h"
#include "data/corpus.h"

namespace pith {

// `batch` sequences of `sequence` tokens, row after row: i32 [B * S] on the cpu. Labels below 0 are
// ignored.
struct Batch {
  Tensor tokens, labels, positions;
  Tensor document_start;  // where in the sequence the token's document starts; empty without masks
  int64_t batch = 1, sequence = 0, label_count = 0;
};

class Loader {
 public:
  // Corpora with weights per token. Samples are windows of sequence + 1 tokens, stride
  // sequence; within a corpus a keyed permutation per epoch. Of the corpora that are behind
  // their weight the one whose next sample is due first takes its turn: after any number of samples
  // each has had its share to within one (Baruah et al., "Proportionate progress", 1996; simply
  // taking the largest deficit can be off by more with many corpora). InputError: a corpus of fewer
  // than sequence + 1 tokens, a weight that is not positive.
  // Without a seed, for validation: all windows of the corpora in the order given, whatever their
  // weights.
  Loader(const std::vector<std::pair<std::string, double>>& corpora, int64_t sequence,
         int64_t vocab_size, bool document_mask, std::optional<uint64_t> seed);

  int64_t size() const;  // windows in one epoch of all corpora
  // Rows [first, first + count) of the endless sequence of samples (without a seed: first + count
  // <= size()). InputError: a token id outside the vocabulary, or no labels at all. Moving forward
  // costs a few ns per sample passed over, moving back starts from the first sample. Not for
  // concurrent use.
  Batch batch(int64_t first, int64_t count) const;

 private:
  struct Source {
    Corpus corpus;
    int64_t windows, share;
    int64_t taken = 0, lag = 0;  // lag = share * i - (sum of the shares) * taken after i samples
  };
  Source& next_source() const;
  std::pair<const Corpus&, int64_t> window(int64_t sample) const;
  void fill(Batch& batch, int64_t row, int64_t sample) const;

  // The turns of the corpora: integers, so the order is exact and the same on every machine.
  mutable std::vector<Source> sources_;
  mutable int64_t position_ = 0;
  int64_t shares_ = 0, sequence_, vocab_size_;
  bool document_mask_;
  std::optional<uint64_t> seed_;
};

}  // namespace pith
