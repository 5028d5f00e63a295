#include "data/loader.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/rng.h"
#include "data/corpus.h"

namespace pith {
namespace {

constexpr int32_t kIgnored = -100;
constexpr int64_t kShares = int64_t(1) << 30;  // weights are rounded to integers of about this sum

}  // namespace

struct Loader::State {
  struct Source {
    Corpus corpus;
    int64_t windows, share;
    int64_t taken = 0, lag = 0;
  };
  std::vector<Source> sources;
  int64_t sequence, vocab_size;
  bool document_mask, sequential;
  uint64_t seed;

  // The turns of the corpora: integers, so the order is exact and the same on every machine. lag =
  // share * i - total * taken after i samples.
  int64_t total = 0, position = 0;

  void open(const std::string& prefix, int64_t share) {
    Corpus corpus(prefix);
    if (corpus.tokens() < sequence + 1)
      fail_input("{}: {} tokens are too few, one sample of sequence_length {} takes {}", prefix,
                 corpus.tokens(), sequence, sequence + 1);
    const int64_t windows = (corpus.tokens() - 1) / sequence;
    sources.push_back({std::move(corpus), windows, share});
    total += share;
  }

  // The corpus of the sample at `position`, and moves on.
  size_t next() {
    size_t best = sources.size();
    for (size_t c = 0; c < sources.size(); ++c) {
      Source& s = sources[c];
      s.lag += s.share;
      // Time until the next sample is due is (total - lag) / share; ties go to the earlier corpus.
      const bool sooner = best == sources.size() || (total - s.lag) * sources[best].share <
                                                        (total - sources[best].lag) * s.share;
      if (s.lag > 0 && sooner) best = c;
    }
    sources[best].lag -= total;
    ++sources[best].taken;
    ++position;
    return best;
  }

  void move_to(int64_t sample) {
    if (sample < position) {
      position = 0;
      for (Source& s : sources) s.taken = s.lag = 0;
    }
    if (sources.size() == 1) position = sources[0].taken = sample;
    while (position < sample) next();
  }

  // Row `row` of the batch: the next window of the blend, or of all corpora in order.
  void fill_next(Batch& batch, int64_t row) {
    const size_t c = next();
    const Source& s = sources[c];
    const int64_t use = s.taken - 1, epoch = use / s.windows;
    const uint64_t key = stream_key(seed, fmt::format("corpus {} epoch {}", c, epoch));
    fill(batch, row, s.corpus,
         int64_t(permute(uint64_t(use % s.windows), uint64_t(s.windows), key)));
  }

  void fill_sequential(Batch& batch, int64_t row, int64_t window) const {
    size_t c = 0;
    while (window >= sources[c].windows) window -= sources[c++].windows;
    fill(batch, row, sources[c].corpus, window);
  }

  void fill(Batch& batch, int64_t row, const Corpus& corpus, int64_t window) const {
    const int64_t begin = window * sequence;
    std::vector<int32_t> ids(size_t(sequence) + 1);
    corpus.read(begin, sequence + 1, ids.data());
    for (int64_t i = 0; i <= sequence; ++i)
      if (ids[i] < 0 || ids[i] >= vocab_size)
        fail_input("{}: token {} at position {} is outside the vocabulary of {}", corpus.prefix(),
                   ids[i], begin + i, vocab_size);
    const auto at = [&](Tensor& t) { return t.data<int32_t>() + row * sequence; };
    int32_t *labels = at(batch.labels), *positions = at(batch.positions);
    std::copy(ids.begin(), ids.end() - 1, at(batch.tokens));
    std::copy(ids.begin() + 1, ids.end(), labels);
    std::iota(positions, positions + sequence, 0);
    batch.label_count += sequence;
    if (!document_mask) return;
    int32_t* starts = at(batch.document_start);
    // Document by document: [from, end) in the window.
    for (int64_t from = 0, end; from < sequence; from = end) {
      const int64_t next = corpus.document_offset(corpus.document_of(begin + from) + 1) - begin;
      end = std::min(next, sequence);
      std::fill(starts + from, starts + end, int32_t(from));
      std::iota(positions + from, positions + end, 0);
      if (next > sequence) continue;
      labels[next - 1] = kIgnored;  // what follows belongs to another document
      --batch.label_count;
    }
  }
};

Loader::Loader(const std::vector<std::pair<std::string, double>>& corpora, int64_t sequence_length,
               int64_t vocab_size, bool document_mask, uint64_t seed)
    : state_(new State{{}, sequence_length, vocab_size, document_mask, false, seed}) {
  if (corpora.empty()) fail_input("no corpus was given");
  if (sequence_length < 1)
    fail_input("sequence_length is {}, it must be at least 1", sequence_length);
  double sum = 0;
  for (const auto& [prefix, weight] : corpora) {
    if (!(weight > 0) || !std::isfinite(weight))
      fail_input("{}: weight is {}, it must be positive", prefix, weight);
    sum += weight;
  }
  for (const auto& [prefix, weight] : corpora)
    state_->open(prefix, std::max<int64_t>(1, std::llround(weight / sum * double(kShares))));
}

Loader Loader::sequential(const std::vector<std::string>& corpora, int64_t sequence_length,
                          int64_t vocab_size, bool document_mask) {
  std::vector<std::pair<std::string, double>> weighted;
  for (const std::string& prefix : corpora) weighted.emplace_back(prefix, 1.0);
  Loader loader(weighted, sequence_length, vocab_size, document_mask, 0);
  loader.state_->sequential = true;
  return loader;
}

Loader::Loader(Loader&&) noexcept = default;
Loader::~Loader() = default;

int64_t Loader::size() const {
  int64_t windows = 0;
  for (const State::Source& s : state_->sources) windows += s.windows;
  return windows;
}

Batch Loader::batch(int64_t first, int64_t count) const {
  State& s = *state_;
  if (first < 0 || count < 1) fail("a batch of {} sequences from {}", count, first);
  if (s.sequential && first + count > size())
    fail("sequences [{}, {}) of {} were asked for", first, first + count, size());
  const auto ids = [&](const char* name) {
    return Tensor({count * s.sequence}, DType::i32, Device::cpu, name);
  };
  Batch b{ids("tokens"), ids("labels"), ids("positions"), {}, count, s.sequence, 0};
  if (s.document_mask) b.document_start = ids("document_start");
  if (!s.sequential) s.move_to(first);
  for (int64_t row = 0; row < count; ++row)
    s.sequential ? s.fill_sequential(b, row, first + row) : s.fill_next(b, row);
  if (b.label_count == 0)
    fail_input("sequences [{}, {}) have no labels: every document in them is one token long", first,
               first + count);
  return b;
}

}  // namespace pith
