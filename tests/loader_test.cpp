#include "data/loader.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <set>

#include "data/corpus.h"
#include "testing.h"

namespace pith {
namespace {

using Ids = std::vector<int32_t>;

constexpr int64_t kVocab = 100000;

Ids range(int32_t begin, int64_t count) {
  Ids ids(static_cast<size_t>(count));
  std::iota(ids.begin(), ids.end(), begin);
  return ids;
}

std::string write(const TempDir& dir, const std::string& name, const std::vector<Ids>& documents) {
  CorpusWriter writer(dir / name, kVocab);
  for (const Ids& d : documents) writer.add(d, Ids{int32_t(d.size())});
  writer.finish();
  return dir / name;
}

Ids values(const Tensor& t) { return t ? t.to_vector<int32_t>() : Ids(); }

Loader in_order(const std::vector<std::string>& corpora, int64_t sequence, int64_t vocab,
                bool document_mask) {
  std::vector<std::pair<std::string, double>> weighted;
  for (const std::string& prefix : corpora) weighted.emplace_back(prefix, 1.0);
  return Loader(weighted, sequence, vocab, document_mask, std::nullopt);
}

// First token of every row.
Ids first_tokens(const Batch& b) {
  const Ids tokens = values(b.tokens);
  Ids first;
  for (int64_t row = 0; row < b.batch; ++row) first.push_back(tokens[size_t(row * b.sequence)]);
  return first;
}

void expect_equal(const Batch& a, const Batch& b) {
  EXPECT_EQ(values(a.tokens), values(b.tokens));
  EXPECT_EQ(values(a.labels), values(b.labels));
  EXPECT_EQ(values(a.positions), values(b.positions));
  EXPECT_EQ(values(a.document_start), values(b.document_start));
  EXPECT_EQ(a.label_count, b.label_count);
}

TEST(Loader, WindowsAreConsecutiveTokensAndTheirSuccessors) {
  const TempDir dir;
  const Loader loader = in_order({write(dir, "a", {range(10, 12)})}, 4, kVocab, false);
  EXPECT_EQ(loader.size(), 2);  // (12 - 1) / 4
  const Batch b = loader.batch(0, 2);
  EXPECT_EQ(b.batch, 2);
  EXPECT_EQ(b.sequence, 4);
  EXPECT_EQ(b.label_count, 8);
  EXPECT_EQ(values(b.tokens), (Ids{10, 11, 12, 13, 14, 15, 16, 17}));
  EXPECT_EQ(values(b.labels), (Ids{11, 12, 13, 14, 15, 16, 17, 18}));
  EXPECT_EQ(values(b.positions), (Ids{0, 1, 2, 3, 0, 1, 2, 3}));
  EXPECT_FALSE(b.document_start);
}

TEST(Loader, EveryWindowOncePerEpoch) {
  const TempDir dir;
  for (int64_t tokens :
       {6, 11, 501, 502, 505}) {  // one window, two, a hundred and some left-over tokens
    const std::string corpus = write(dir, "c" + std::to_string(tokens), {range(0, tokens)});
    const Loader loader({{corpus, 1.0}}, 5, kVocab, false, 42);
    const int64_t windows = (tokens - 1) / 5;
    ASSERT_EQ(loader.size(), windows);
    std::set<Ids> orders;
    for (int64_t epoch = 0; epoch < 3; ++epoch) {
      Ids starts = first_tokens(loader.batch(epoch * windows, windows));
      orders.insert(starts);
      std::sort(starts.begin(), starts.end());
      for (int64_t i = 0; i < windows; ++i) ASSERT_EQ(starts[size_t(i)], i * 5);
    }
    if (windows >= 100) {
      EXPECT_EQ(orders.size(), 3u);  // each epoch in an order of its own
      EXPECT_EQ(orders.count(range(0, windows)), 0u);
    }
  }
}

TEST(Loader, OrderDependsOnTheSeedAlone) {
  const TempDir dir;
  const std::string a = write(dir, "a", {range(0, 1001)});
  const auto order = [&](uint64_t seed) {
    return first_tokens(Loader({{a, 1.0}}, 10, kVocab, false, seed).batch(0, 50));
  };
  EXPECT_EQ(order(1), order(1));
  EXPECT_NE(order(1), order(2));
}

TEST(Loader, ResumesAnywhere) {
  const TempDir dir;
  const std::string a = write(dir, "a", {range(0, 300), range(300, 33)});
  const std::string b = write(dir, "b", {range(1000, 170)}),
                    c = write(dir, "c", {range(2000, 90), range(2090, 5)});
  const auto fresh = [&] { return Loader({{a, 0.5}, {b, 0.3}, {c, 0.2}}, 8, kVocab, true, 7); };
  const Loader uninterrupted = fresh();
  const int64_t rows = 6;
  std::vector<Batch> steps;
  for (int64_t step = 0; step < 40; ++step) steps.push_back(uninterrupted.batch(step * rows, rows));
  for (int64_t step : {0, 1, 17, 39})
    expect_equal(fresh().batch(step * rows, rows), steps[size_t(step)]);
  const Loader jumping = fresh();
  for (int64_t step : {30, 3, 4, 39, 0})
    expect_equal(jumping.batch(step * rows, rows), steps[size_t(step)]);
  // Rows do not depend on how a step is cut.
  const Ids whole = values(steps[5].tokens);
  Ids parts;
  for (int64_t row = 0; row < rows; ++row)
    for (int32_t id : values(jumping.batch(5 * rows + row, 1).tokens)) parts.push_back(id);
  EXPECT_EQ(parts, whole);
}

TEST(Loader, BlendsToWithinOneSampleAtEveryPrefix) {
  const TempDir dir;
  std::vector<std::string> corpora;
  corpora.reserve(13);
  for (int32_t c = 0; c < 13; ++c)
    corpora.push_back(write(dir, "c" + std::to_string(c), {range(100 * c, 9 + c)}));
  // The last one is a case in which taking the largest deficit is off by more than one.
  const std::vector<std::vector<double>> blends = {{1, 1},
                                                   {0.7, 0.3},
                                                   {3, 1e-6},
                                                   {5, 1, 1, 1},
                                                   {0.1, 0.2, 0.3, 0.4},
                                                   {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024},
                                                   {1, 1, 1, 1, 1, 1, 2, 3, 4, 5, 6, 9, 17},
                                                   {1, 1, 7, 7, 22, 22}};
  for (const auto& weights : blends) {
    std::vector<std::pair<std::string, double>> weighted;
    for (size_t c = 0; c < weights.size(); ++c) weighted.emplace_back(corpora[c], weights[c]);
    const Loader loader(weighted, 4, kVocab, false, 1);
    const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
    std::vector<int64_t> taken(weights.size(), 0);
    const Ids first = first_tokens(loader.batch(0, 3000));
    for (size_t i = 0; i < first.size(); ++i) {
      ++taken[size_t(first[i] / 100)];
      for (size_t c = 0; c < weights.size(); ++c)
        ASSERT_LT(std::abs(double(taken[c]) - weights[c] / sum * double(i + 1)), 1 + 1e-5)
            << i << ", corpus " << c;
    }
  }
}

TEST(Loader, FarAheadIsQuick) {
  const TempDir dir;
  const std::string a = write(dir, "a", {range(0, 100)}), b = write(dir, "b", {range(200, 100)});
  const Loader loader({{a, 0.9}, {b, 0.1}}, 10, kVocab, false, 3);
  const auto before = std::chrono::steady_clock::now();
  loader.batch(10'000'000, 1);
  EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count(), 5.0);
  // An epoch of one corpus is a permutation however far ahead it lies.
  Ids starts = first_tokens(Loader({{a, 1.0}}, 10, kVocab, false, 3).batch(int64_t(9) << 40, 9));
  std::sort(starts.begin(), starts.end());
  for (int32_t i = 0; i < 9; ++i) EXPECT_EQ(starts[size_t(i)], 10 * i);
}

TEST(Loader, DocumentMask) {
  const TempDir dir;
  const std::vector<Ids> documents = {range(0, 3),  range(3, 1),  range(4, 9),
                                      range(13, 1), range(14, 6), range(20, 21)};
  const std::string a = write(dir, "a", documents);
  std::vector<int64_t> start_of;  // of every token: where its document starts
  for (const Ids& d : documents) start_of.insert(start_of.end(), d.size(), d.front());
  for (int64_t sequence : {1, 2, 5, 8, 40}) {
    const Loader loader = in_order({a}, sequence, kVocab, true);
    for (int64_t i = 0; i < loader.size(); ++i) {
      Ids labels, starts, positions;
      for (int64_t s = 0; s < sequence; ++s) {
        const int64_t token = i * sequence + s,
                      start = std::max(start_of[size_t(token)] - i * sequence, int64_t(0));
        const bool last = start_of[size_t(token) + 1] != start_of[size_t(token)];
        labels.push_back(last ? -100 : int32_t(token + 1));
        starts.push_back(int32_t(start));
        positions.push_back(int32_t(s - start));
      }
      const int64_t counted = sequence - std::count(labels.begin(), labels.end(), -100);
      if (counted == 0) {
        EXPECT_THROW(loader.batch(i, 1), InputError);
        continue;
      }
      const Batch b = loader.batch(i, 1);
      EXPECT_EQ(values(b.tokens), range(int32_t(i * sequence), sequence));
      EXPECT_EQ(values(b.labels), labels);
      EXPECT_EQ(values(b.document_start), starts);
      EXPECT_EQ(values(b.positions), positions);
      EXPECT_EQ(b.label_count, counted);
    }
  }
}

TEST(Loader, WithoutASeedGoesThroughTheCorporaInOrder) {
  const TempDir dir;
  const std::string a = write(dir, "a", {range(0, 9)}), b = write(dir, "b", {range(100, 13)});
  const Loader loader = in_order({a, b}, 4, kVocab, false);
  ASSERT_EQ(loader.size(), 5);
  EXPECT_EQ(first_tokens(loader.batch(0, 5)), (Ids{0, 4, 100, 104, 108}));
  EXPECT_EQ(first_tokens(loader.batch(3, 2)), (Ids{104, 108}));
  EXPECT_EQ(first_tokens(loader.batch(1, 2)), (Ids{4, 100}));
  EXPECT_THROW(loader.batch(4, 2), Error);
}

template <class F> std::string refusal(F&& f) {
  try {
    f();
  } catch (const InputError& e) {
    return e.what();
  }
  return "accepted";
}

TEST(Loader, RefusesBadInput) {
  const TempDir dir;
  const std::string small = write(dir, "small", {range(0, 4), range(4, 4)}),
                    good = write(dir, "good", {range(0, 99)});
  const std::string ones =
      write(dir, "ones", {range(1, 1), range(2, 1), range(3, 1), range(4, 1), range(5, 1)});
  using Corpora = std::vector<std::pair<std::string, double>>;
  const auto open = [&](const Corpora& corpora, int64_t sequence = 8, int64_t vocab = kVocab) {
    return refusal([&] { Loader(corpora, sequence, vocab, false, 1); });
  };
  EXPECT_EQ(open({{good, 1}, {small, 1}}),
            small + ": 8 tokens are too few, one sample of sequence_length 8 takes 9");
  EXPECT_EQ(open({{small, 1}}, 7), "accepted");
  EXPECT_EQ(open({{good, 1}, {small, 0}}), small + ": weight is 0, it must be positive");
  EXPECT_EQ(open({{good, -0.5}}), good + ": weight is -0.5, it must be positive");
  EXPECT_EQ(open({{good, NAN}}), good + ": weight is nan, it must be positive");
  EXPECT_EQ(open({{good, HUGE_VAL}}), good + ": weight is inf, it must be positive");
  EXPECT_EQ(open({}), "no corpus was given");
  EXPECT_EQ(open({{good, 1}}, 0), "sequence_length is 0, it must be at least 1");
  EXPECT_NE(open({{dir / "missing", 1}}).find(dir / "missing"), std::string::npos);
  EXPECT_EQ(refusal([&] { in_order({}, 8, kVocab, false); }), "no corpus was given");

  EXPECT_EQ(refusal([&] { in_order({good}, 8, 21, false).batch(0, 3); }),
            good + ": token 21 at position 21 is outside the vocabulary of 21");
  EXPECT_EQ(refusal([&] { in_order({good}, 8, 22, false).batch(0, 2); }), "accepted");
  EXPECT_EQ(refusal([&] {
              Loader({{ones, 1}}, 2, kVocab, true, 1).batch(2, 2);
            }),
            "sequences [2, 4) have no labels: every document in them is one token long");
  EXPECT_EQ(refusal([&] { Loader({{ones, 1}}, 2, kVocab, false, 1).batch(2, 2); }), "accepted");
}

}  // namespace
}  // namespace pith
