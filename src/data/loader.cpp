#include "data/loader.h"

#include "core/rng.h"

namespace pith {

constexpr int32_t kIgnored = -100;
constexpr double kShares = 1 << 30;  // weights are rounded to integers of about this sum

Loader::Loader(const std::vector<std::pair<std::string, double>>& corpora, int64_t sequence,
               int64_t vocab_size, bool document_mask, std::optional<uint64_t> seed)
    : sequence_(sequence), vocab_size_(vocab_size), document_mask_(document_mask), seed_(seed) {
  if (corpora.empty()) fail_input("no corpus was given");
  if (sequence < 1) fail_input("sequence_length is {}, it must be at least 1", sequence);
  double sum = 0;
  for (const auto& [prefix, weight] : corpora) sum += weight;
  for (const auto& [prefix, weight] : corpora) {
    if (!(weight > 0) || !std::isfinite(weight))
      fail_input("{}: weight is {}, it must be positive", prefix, weight);
    Corpus corpus(prefix);
    const int64_t windows = (corpus.tokens() - 1) / sequence_;
    if (windows < 1)
      fail_input("{}: {} tokens are too few, one sample of sequence_length {} takes {}", prefix,
                 corpus.tokens(), sequence_, sequence_ + 1);
    const auto share = std::max<int64_t>(1, std::llround(weight / sum * kShares));
    sources_.push_back({std::move(corpus), windows, share});
    shares_ += share;
  }
}

int64_t Loader::size() const {
  int64_t windows = 0;
  for (const Source& s : sources_) windows += s.windows;
  return windows;
}

// The corpus of the sample at position_, and moves on.
Loader::Source& Loader::next_source() const {
  Source* best = nullptr;
  for (Source& s : sources_) {
    s.lag += s.share;
    // Time until the next sample is due is (shares - lag) / share; ties go to the earlier corpus.
    const bool sooner = !best || (shares_ - s.lag) * best->share < (shares_ - best->lag) * s.share;
    if (s.lag > 0 && sooner) best = &s;
  }
  best->lag -= shares_;
  ++best->taken;
  ++position_;
  return *best;
}

// Where the sample is: a corpus, and the window's first token in it.
std::pair<const Corpus&, int64_t> Loader::window(int64_t sample) const {
  if (!seed_) {
    size_t c = 0;
    while (sample >= sources_[c].windows) sample -= sources_[c++].windows;
    return {sources_[c].corpus, sample * sequence_};
  }
  if (sample < position_) {
    position_ = 0;
    for (Source& s : sources_) s.taken = s.lag = 0;
  }
  if (sources_.size() == 1) position_ = sources_[0].taken = sample;
  while (position_ < sample) next_source();
  const Source& s = next_source();
  const int64_t epoch = (s.taken - 1) / s.windows, use = (s.taken - 1) % s.windows;
  const uint64_t key =
      stream_key(*seed_, fmt::format("corpus {} epoch {}", &s - sources_.data(), epoch));
  return {s.corpus, int64_t(permute(uint64_t(use), uint64_t(s.windows), key)) * sequence_};
}

void Loader::fill(Batch& batch, int64_t row, int64_t sample) const {
  const auto& [corpus, begin] = window(sample);
  std::vector<int32_t> ids(size_t(sequence_) + 1);
  corpus.read(begin, sequence_ + 1, ids.data());
  for (int64_t i = 0; i <= sequence_; ++i)
    if (ids[i] < 0 || ids[i] >= vocab_size_)
      fail_input("{}: token {} at position {} is outside the vocabulary of {}", corpus.prefix(),
                 ids[i], begin + i, vocab_size_);
  const auto at = [&](Tensor& t) { return t.data<int32_t>() + row * sequence_; };
  int32_t *labels = at(batch.labels), *positions = at(batch.positions);
  std::copy(ids.begin(), ids.end() - 1, at(batch.tokens));
  std::copy(ids.begin() + 1, ids.end(), labels);
  std::iota(positions, positions + sequence_, 0);
  batch.label_count += sequence_;
  // Document by document: [from, end) in the window.
  const std::vector<int64_t>& offsets = corpus.document_offsets();
  for (int64_t from = 0, end; document_mask_ && from < sequence_; from = end) {
    const int64_t next = *std::ranges::upper_bound(offsets, begin + from) - begin;
    end = std::min(next, sequence_);
    std::fill(at(batch.document_start) + from, at(batch.document_start) + end, int32_t(from));
    std::iota(positions + from, positions + end, 0);
    if (next > sequence_) continue;
    labels[next - 1] = kIgnored;  // what follows belongs to another document
    --batch.label_count;
  }
}

Batch Loader::batch(int64_t first, int64_t count) const {
  if (first < 0 || count < 1) fail("a batch of {} sequences from {}", count, first);
  if (!seed_ && first + count > size())
    fail("sequences [{}, {}) of {} were asked for", first, first + count, size());
  const auto ids = [&](const char* name) {
    return Tensor({count * sequence_}, DType::i32, Device::cpu, name);
  };
  Batch b{ids("tokens"), ids("labels"), ids("positions"), {}, count, sequence_, 0};
  if (document_mask_) b.document_start = ids("document_start");
  for (int64_t row = 0; row < count; ++row) fill(b, row, first + row);
  if (b.label_count == 0)
    fail_input("sequences [{}, {}) have no labels: every document in them is one token long", first,
               first + count);
  return b;
}

}  // namespace pith
