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

struct Place {
  int64_t corpus, window;
};

}  // namespace

struct Loader::State {
  std::vector<Corpus> corpora;
  std::vector<int64_t> windows;  // of each corpus
  int64_t sequence, vocab_size;
  bool document_mask, sequential = false;
  uint64_t seed = 0;

  // The turns of the corpora: integers, so the order is exact and the same on every machine. lag[c]
  // = share[c] * i - total * taken[c] after i samples.
  std::vector<int64_t> share, taken, lag;
  int64_t total = 0, position = 0;

  State(int64_t sequence, int64_t vocab_size, bool mask)
      : sequence(sequence), vocab_size(vocab_size), document_mask(mask) {
    if (sequence < 1) fail_input("sequence_length is {}, it must be at least 1", sequence);
    if (vocab_size < 1) fail_input("the vocabulary has {} entries", vocab_size);
  }

  void open(const std::string& prefix) {
    const Corpus& c = corpora.emplace_back(prefix);
    if (c.tokens() < sequence + 1)
      fail_input("{}: {} tokens are too few, one sample of sequence_length {} takes {}", prefix,
                 c.tokens(), sequence, sequence + 1);
    windows.push_back((c.tokens() - 1) / sequence);
  }

  void rewind() {
    taken.assign(corpora.size(), 0);
    lag.assign(corpora.size(), 0);
    position = 0;
  }

  // The corpus of the sample at `position`, and moves on.
  size_t next() {
    size_t best = corpora.size();
    for (size_t c = 0; c < corpora.size(); ++c) {
      lag[c] += share[c];
      // Time until the next sample is due is (total - lag) / share; ties go to the earlier corpus.
      if (lag[c] > 0 && (best == corpora.size() ||
                         (total - lag[c]) * share[best] < (total - lag[best]) * share[c]))
        best = c;
    }
    lag[best] -= total;
    ++taken[best];
    ++position;
    return best;
  }

  void move_to(int64_t sample) {
    if (sample < position) rewind();
    if (corpora.size() == 1) {
      position = taken[0] = sample;
    } else {
      while (position < sample) next();
    }
  }

  Place next_place() {
    const size_t c = next();
    const int64_t use = taken[c] - 1, epoch = use / windows[c];
    const uint64_t key = stream_key(seed, fmt::format("corpus {} epoch {}", c, epoch));
    return {int64_t(c), int64_t(permute(uint64_t(use % windows[c]), uint64_t(windows[c]), key))};
  }

  Place sequential_place(int64_t sample) const {
    int64_t c = 0;
    while (sample >= windows[size_t(c)]) sample -= windows[size_t(c++)];
    return {c, sample};
  }

  void check_vocabulary(const Corpus& c, int64_t begin, std::span<const int32_t> ids) const {
    for (size_t i = 0; i < ids.size(); ++i)
      if (ids[i] < 0 || ids[i] >= vocab_size)
        fail_input("{}: token {} at position {} is outside the vocabulary of {}", c.prefix(),
                   ids[i], begin + int64_t(i), vocab_size);
  }

  // Row `row` of the batch; `window` is scratch for sequence + 1 ids.
  void fill(Batch& batch, int64_t row, Place place, std::vector<int32_t>& window) const {
    const Corpus& corpus = corpora[size_t(place.corpus)];
    const int64_t begin = place.window * sequence;
    corpus.read(begin, sequence + 1, window.data());
    check_vocabulary(corpus, begin, window);
    const auto at = [&](Tensor& t) { return t.data<int32_t>() + row * sequence; };
    int32_t *labels = at(batch.labels), *positions = at(batch.positions);
    std::copy(window.begin(), window.end() - 1, at(batch.tokens));
    std::copy(window.begin() + 1, window.end(), labels);
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
    : state_(std::make_unique<State>(sequence_length, vocab_size, document_mask)) {
  if (corpora.empty()) fail_input("no corpus was given");
  double sum = 0;
  for (const auto& [prefix, weight] : corpora) {
    if (!(weight > 0) || !std::isfinite(weight))
      fail_input("{}: weight is {}, it must be positive", prefix, weight);
    sum += weight;
  }
  for (const auto& [prefix, weight] : corpora) {
    state_->open(prefix);
    state_->share.push_back(std::max<int64_t>(1, std::llround(weight / sum * double(kShares))));
    state_->total += state_->share.back();
  }
  state_->seed = seed;
  state_->rewind();
}

Loader Loader::sequential(const std::vector<std::string>& corpora, int64_t sequence_length,
                          int64_t vocab_size, bool document_mask) {
  std::vector<std::pair<std::string, double>> weighted;
  weighted.reserve(corpora.size());
  for (const std::string& prefix : corpora) weighted.emplace_back(prefix, 1.0);
  Loader loader(weighted, sequence_length, vocab_size, document_mask, 0);
  loader.state_->sequential = true;
  return loader;
}

Loader::Loader(Loader&&) noexcept = default;
Loader::~Loader() = default;

int64_t Loader::size() const {
  return std::accumulate(state_->windows.begin(), state_->windows.end(), int64_t(0));
}

std::vector<double> Loader::epochs(int64_t samples) const {
  state_->move_to(samples);
  std::vector<double> epochs;
  for (size_t c = 0; c < state_->corpora.size(); ++c)
    epochs.push_back(double(state_->taken[c]) / double(state_->windows[c]));
  return epochs;
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
  std::vector<int32_t> window(size_t(s.sequence) + 1);
  for (int64_t row = 0; row < count; ++row)
    s.fill(b, row, s.sequential ? s.sequential_place(first + row) : s.next_place(), window);
  if (b.label_count == 0)
    fail_input("sequences [{}, {}) have no labels: every document in them is one token long", first,
               first + count);
  return b;
}

}  // namespace pith
