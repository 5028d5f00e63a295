#include "ops/router.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/rng.h"
#include "op_testing.h"
#include "ops/basic.h"

namespace pith {
namespace {

using Score = RouterRule::Score;
using Row = std::vector<double>;
using Values = std::vector<Row>;
using Ids = std::vector<int32_t>;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Naive {
  Ids ids;
  Row weights, scores;
};

// Indices of the k largest, best first, ties to the lower index.
Ids largest(const Row& v, int64_t k) {
  Ids order(v.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return v[a] > v[b]; });
  order.resize(size_t(k));
  return order;
}

Row softmax_of(const Row& x) {
  const double high = *std::max_element(x.begin(), x.end());
  Row y;
  for (double v : x) y.push_back(std::exp(v - high));
  const double sum = std::accumulate(y.begin(), y.end(), 0.0);
  for (double& v : y) v /= sum;
  return y;
}

// The definition of the rule, for one token.
Naive naive_token(const Row& logits, const RouterRule& rule, const Row& bias, const Ids& replay) {
  const int64_t experts = int64_t(logits.size());
  Naive out;
  out.scores = softmax_of(logits);
  if (rule.score == Score::sigmoid)
    for (int64_t e = 0; e < experts; ++e) out.scores[e] = 1 / (1 + std::exp(-logits[e]));
  Row choice = out.scores;
  for (size_t e = 0; e < bias.size(); ++e) choice[e] += bias[e];
  out.ids = replay.empty() ? largest(choice, rule.top_k) : replay;
  Row chosen;
  for (int32_t id : out.ids) chosen.push_back(id < 0 ? 0 : out.scores[id]);
  double sum = std::accumulate(chosen.begin(), chosen.end(), 0.0);
  if (rule.score == Score::softmax_after_top_k) {
    sum = 0;
    for (size_t j = 0; j < chosen.size(); ++j)
      sum += chosen[j] = out.ids[j] < 0 ? 0 : std::exp(logits[out.ids[j]]);
  } else if (!rule.renormalize) {
    sum = 1;
  }
  for (double v : chosen) out.weights.push_back(v == 0 ? 0 : rule.scaling * v / sum);
  return out;
}

struct Case {
  const char* name;
  int64_t tokens, experts;
  RouterRule rule;
  Row bias = {};
  Ids replay = {};
};

Naive naive_route(const Case& c, const Row& logits) {
  Naive all;
  for (int64_t t = 0; t < c.tokens; ++t) {
    const int64_t k = c.rule.top_k;
    const Ids replay =
        c.replay.empty() ? Ids() : Ids(c.replay.begin() + t * k, c.replay.begin() + (t + 1) * k);
    const Naive one =
        naive_token(Row(logits.begin() + t * c.experts, logits.begin() + (t + 1) * c.experts),
                    c.rule, c.bias, replay);
    all.ids.insert(all.ids.end(), one.ids.begin(), one.ids.end());
    all.weights.insert(all.weights.end(), one.weights.begin(), one.weights.end());
    all.scores.insert(all.scores.end(), one.scores.begin(), one.scores.end());
  }
  return all;
}

// A constant on the device of the tape, in its wide dtype.
Tensor constant(Tape& tape, Shape shape, const Row& values) {
  const DType wide = master_dtype(tape.context.dtype);
  return Tensor::of<double>(shape, values).to(wide, "constant").on(tape.context.device);
}

Tensor constant_ids(Tape& tape, Shape shape, const Ids& ids) {
  return Tensor::of<int32_t>(shape, ids).on(tape.context.device);
}

Routing route(Tape& t, const Tensor& logits, const Case& c) {
  const Tensor bias = c.bias.empty() ? Tensor() : constant(t, {c.experts}, c.bias);
  const Tensor replay =
      c.replay.empty() ? Tensor() : constant_ids(t, {c.tokens, c.rule.top_k}, c.replay);
  return route_top_k(t, logits, c.rule, bias, replay);
}

std::vector<Case> cases() {
  const Row bias8 = {0.3, -0.2, 0, 0.1, 0.5, -0.5, 0.05, -0.1};
  const Ids replay = {3, 1, 7, -1, 0, 5, -1, -1, -1, 2, 2, 4};
  std::vector<Case> all = {
      {"softmax", 6, 8, {.top_k = 3}},
      {"softmax, renormalized (Qwen3)", 6, 8, {.top_k = 3, .renormalize = true}},
      {"softmax, scaled", 6, 8, {.top_k = 3, .scaling = 2.5}},
      {"softmax, renormalized and scaled", 6, 8, {.top_k = 3, .renormalize = true, .scaling = 0.5}},
      {"sigmoid", 6, 8, {.score = Score::sigmoid, .top_k = 2}},
      {"sigmoid, renormalized, bias",
       6,
       8,
       {.score = Score::sigmoid, .top_k = 2, .renormalize = true},
       bias8},
      {"softmax of the chosen (GPT-OSS)", 6, 8, {.score = Score::softmax_after_top_k, .top_k = 3}},
      {"softmax of the chosen, scaled",
       6,
       8,
       {.score = Score::softmax_after_top_k, .top_k = 3, .scaling = 3}},
      {"softmax of the chosen, bias",
       6,
       8,
       {.score = Score::softmax_after_top_k, .top_k = 3},
       bias8},
      {"sigmoid, renormalized, scaled, bias (DeepSeek-V3)",
       9,
       12,
       {.score = Score::sigmoid, .top_k = 4, .renormalize = true, .scaling = 2.5},
       {0.1, -0.1, 0.2, 0.4, -0.3, 0, 0.15, 0.05, -0.2, 0.3, -0.4, 0.25}},
      {"K = E", 4, 5, {.top_k = 5}},
      {"K = E, renormalized", 4, 5, {.score = Score::sigmoid, .top_k = 5, .renormalize = true}},
      {"E = 1", 4, 1, {.top_k = 1, .renormalize = true}},
      {"one token", 1, 19, {.top_k = 4}},
      {"odd width", 3, 37, {.top_k = 5, .renormalize = true}},
      {"no tokens", 0, 8, {.top_k = 2}},
      {"40 experts, K = 8", 129, 40, {.top_k = 8, .renormalize = true}},
      {"33 experts, K = 1", 127, 33, {.top_k = 1}},
      {"512 experts, K = 8", 5, 512, {.top_k = 8, .renormalize = true}},
      {"512 experts, sigmoid", 5, 512, {.score = Score::sigmoid, .top_k = 8, .scaling = 2.5}},
      {"512 experts, softmax of the chosen",
       5,
       512,
       {.score = Score::softmax_after_top_k, .top_k = 1}},
  };
  for (Score score : {Score::softmax, Score::sigmoid, Score::softmax_after_top_k})
    for (bool renormalize : {false, true})
      all.push_back({"replay",
                     4,
                     8,
                     {.score = score, .top_k = 3, .renormalize = renormalize, .scaling = 1.5},
                     {},
                     replay});
  return all;
}

TEST(Router, MatchesTheDefinition) {
  for (const Case& c : cases())
    check_op({.name = c.name,
              .inputs = {{c.tokens, c.experts}},
              .params = {},
              .run = [=](Tape& t, const Inputs& x, const Params&) -> Inputs {
                const Routing first = route(t, x[0], c),
                              second = route(t, x[0], c);  // the second gradient adds
                return {first.weights, first.scores, second.weights};
              },
              .reference = [=](const Values& x, const Values&) -> Values {
                const Naive n = naive_route(c, x[0]);
                return {n.weights, n.scores, n.weights};
              },
              .tolerances = {{DType::f64, 1e-12}, {DType::f32, 2e-6}},
              .input_scale = 2});
}

TEST(Router, ChoosesTheSameIds) {
  for (const Case& c : cases()) {
    Row logits(size_t(c.tokens * c.experts));
    for (size_t i = 0; i < logits.size(); ++i) logits[i] = normal(stream_key(5, c.name), i);
    for (const DType dtype : {DType::f64, DType::f32}) {
      Context context{.device = test_device(), .dtype = dtype};
      Tape tape(context);
      const Tensor ids = route(tape, constant(tape, {c.tokens, c.experts}, logits), c).ids;
      EXPECT_EQ(ids.to_vector<int32_t>(), naive_route(c, logits).ids) << c.name;
    }
  }
}

Routing route_row(const Row& logits, const RouterRule& rule, const Row& bias = {}) {
  static Context context;  // fp32
  Tape tape(context);
  return route(tape, constant(tape, {1, int64_t(logits.size())}, logits),
               {"row", 1, int64_t(logits.size()), rule, bias});
}

TEST(Router, TiesGoToTheLowerId) {
  for (Score score : {Score::softmax, Score::sigmoid, Score::softmax_after_top_k}) {
    EXPECT_EQ(route_row({0, 0, 0, 0, 0}, {.score = score, .top_k = 3}).ids.to_vector<int32_t>(),
              (Ids{0, 1, 2}));
    EXPECT_EQ(route_row({1, 2, 1, 2, 1}, {.score = score, .top_k = 3}).ids.to_vector<int32_t>(),
              (Ids{1, 3, 0}));
  }
  // A bias that makes a tie, and one that breaks it.
  EXPECT_EQ(route_row({0, 0, 0}, {.score = Score::sigmoid, .top_k = 1}, {0, 0, 0.25})
                .ids.to_vector<int32_t>(),
            (Ids{2}));
}

TEST(Router, GptOssTellsLogitsApartThatSoftmaxRoundsTogether) {
  // Both scores round to 0 in fp32; the larger logit still wins.
  const Row logits = {0, -200, -150, -180};
  EXPECT_EQ(
      route_row(logits, {.score = Score::softmax_after_top_k, .top_k = 3}).ids.to_vector<int32_t>(),
      (Ids{0, 2, 3}));
}

TEST(Router, NanReachesTheWeights) {
  for (Score score : {Score::softmax, Score::sigmoid, Score::softmax_after_top_k}) {
    const RouterRule rule{.score = score, .top_k = 2};
    const Routing all = route_row({kNan, kNan, kNan, kNan}, rule);
    EXPECT_EQ(all.ids.to_vector<int32_t>(), (Ids{0, 1}));
    for (float w : all.weights.to_vector<float>()) EXPECT_TRUE(std::isnan(w));
    const Routing one = route_row({9, 1, kNan, 2}, rule);
    bool seen = false;
    for (float w : one.weights.to_vector<float>()) seen = seen || std::isnan(w);
    EXPECT_TRUE(seen) << "score " << int(score);
    for (int32_t id : one.ids.to_vector<int32_t>()) EXPECT_TRUE(id >= 0 && id < 4);
  }
  const double inf = HUGE_VAL;
  EXPECT_EQ(route_row({-inf, 0, -inf}, {.top_k = 2}).ids.to_vector<int32_t>(), (Ids{1, 0}));
  EXPECT_EQ(route_row({-inf, -inf, -inf}, {.top_k = 2}).ids.to_vector<int32_t>(), (Ids{0, 1}));
}

TEST(Router, NobodyToRenormalize) {
  Context context;
  Tape tape(context);
  const Case c{"nobody", 2, 3, {.top_k = 2, .renormalize = true}, {}, {-1, -1, -1, -1}};
  const Tensor logits = constant(tape, {2, 3}, {1, 2, 3, 4, 5, 6});
  tape.leaf(logits);
  const Routing r = route(tape, logits, c);
  for (float w : r.weights.to_vector<float>()) EXPECT_EQ(w, 0.0f);
  tape.set_grad(r.weights, Tensor::of<float>({2, 2}, std::vector<float>(4, 1.0f)));
  tape.backward();
  for (float d : tape.take_grad(logits).to_vector<float>()) EXPECT_EQ(d, 0.0f);
  // Sigmoids that underflow to zero leave zero weights, not NaN.
  const Routing low =
      route_row({-300, -200}, {.score = Score::sigmoid, .top_k = 2, .renormalize = true});
  EXPECT_EQ(low.weights.to_vector<float>(), (std::vector<float>{0, 0}));
}

TEST(Router, RejectsRulesThatCannotHold) {
  const auto message = [](const RouterRule& rule, const Row& bias = {},
                          const Ids& replay = {}) -> std::string {
    Context context;
    Tape tape(context);
    try {
      const Tensor bias_tensor =
          bias.empty() ? Tensor() : constant(tape, {int64_t(bias.size())}, bias);
      const Tensor ids =
          replay.empty() ? Tensor() : Tensor::of<int32_t>({1, int64_t(replay.size())}, replay);
      route_top_k(tape, constant(tape, {1, 8}, Row(8, 0.0)), rule, bias_tensor, ids);
    } catch (const Error& e) {
      return e.what();
    }
    return "accepted";
  };
  const auto expect = [&](const std::string& got, const std::string& want) {
    EXPECT_NE(got.find(want), std::string::npos) << got;
    EXPECT_EQ(got.rfind("router_test.cpp:", 0), 0u) << got;
  };
  expect(message({.top_k = 9}), "top_k is 9, 8 experts are eligible");
  expect(message({.top_k = 0}), "top_k is 0");
  expect(message({.top_k = 1, .scaling = 0}), "scaling is 0");
  expect(message({.top_k = 1}, {0, 0}), "one fp32 per expert is needed");
  expect(message({.top_k = 1}, {}, {1, 2}), "int32[1, 1] is needed");
  expect(message({.top_k = 2}, {}, {1, 8}), "expert id 8 at [0, 1] is outside [-1, 8)");
}

TEST(Router, BalancedIds) {
  Context context{.device = test_device()};
  Tape tape(context);
  EXPECT_EQ(balanced_ids(tape, 4, 2, 5).to_vector<int32_t>(), (Ids{0, 2, 1, 3, 2, 4, 3, 0}));
  EXPECT_EQ(balanced_ids(tape, 3, 1, 1).to_vector<int32_t>(), (Ids{0, 0, 0}));
  EXPECT_EQ(balanced_ids(tape, 2, 3, 3).to_vector<int32_t>(), (Ids{0, 1, 2, 1, 2, 0}));
  const Ids ids = balanced_ids(tape, 16, 3, 8).to_vector<int32_t>();
  for (int32_t e = 0; e < 8; ++e) EXPECT_EQ(std::count(ids.begin(), ids.end(), e), 6);
  EXPECT_THROW(balanced_ids(tape, 4, 6, 5), Error);
}

TEST(Router, CountsAndFractions) {
  Context context{.device = test_device()};
  Tape tape(context);
  const Tensor ids = constant_ids(tape, {4, 2}, {0, 2, 2, -1, 1, 2, 2, 0});
  Tensor counts = Tensor::zeros({4}, DType::f32, context.device, "counts");
  count_experts(tape, ids, counts);
  count_experts(tape, ids, counts);
  EXPECT_EQ(counts.to_vector<float>(), (std::vector<float>{4, 2, 8, 0}));
  EXPECT_EQ(expert_fractions(tape, ids, 4, 1).to_vector<float>(),
            (std::vector<float>{0.25f, 0.125f, 0.5f, 0}));
  EXPECT_EQ(expert_fractions(tape, ids, 4, 2).to_vector<float>(),
            (std::vector<float>{0.25f, 0, 0.5f, 0, 0.25f, 0.25f, 0.5f, 0}));
  EXPECT_THROW(expert_fractions(tape, ids, 4, 3), Error);
  const Tensor fractions =
      expert_fractions(tape, constant_ids(tape, {600, 2}, Ids(1200, 511)), 512, 1);
  Row one(512, 0);
  one[511] = 1;
  EXPECT_EQ(fractions.to_vector<double>(), one);

  Context host_context;  // where ids are looked at
  Tape host(host_context);
  const Tensor host_ids = ids.on(Device::cpu);
  EXPECT_THROW(expert_fractions(host, host_ids, 2, 1), Error);
  Tensor few = Tensor::zeros({2}, DType::f32, Device::cpu, "counts");
  EXPECT_THROW(count_experts(host, host_ids, few), Error);
}

// Mean over groups of E sum_i f_i P_i.
double naive_balance(const Row& scores, const Row& fractions, int64_t tokens, int64_t experts,
                     int64_t groups) {
  double loss = 0;
  const int64_t size = tokens / groups;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t e = 0; e < experts; ++e) {
      double mean = 0;
      for (int64_t t = g * size; t < (g + 1) * size; ++t) {
        const auto row = scores.begin() + t * experts;
        mean += row[e] / std::accumulate(row, row + experts, 0.0) / double(size);
      }
      const size_t from = int64_t(fractions.size()) == experts ? 0 : size_t(g * experts);
      loss += double(experts) * fractions[from + size_t(e)] * mean / double(groups);
    }
  return loss;
}

TEST(Router, BalanceLoss) {
  const int64_t tokens = 12;
  for (const auto& [experts, groups] :
       {std::pair<int64_t, int64_t>{5, 1}, {5, 3}, {5, 12}, {40, 3}, {512, 1}})
    for (int64_t rows : {int64_t(1), groups}) {
      Row fractions(size_t(rows * experts));
      for (size_t i = 0; i < fractions.size(); ++i) fractions[i] = uniform(9, i);
      check_op({.name = "balance_loss",
                .inputs = {{tokens, experts}},
                .params = {},
                .run = [=, experts = experts, groups = groups](Tape& t, const Inputs& x,
                                                               const Params&) -> Inputs {
                  const Tensor scores = exp(t, x[0]);  // positive, and not normalized
                  const Tensor f = constant(t, {rows, experts}, fractions);
                  return {balance_loss(t, scores, f, groups), balance_loss(t, scores, f, groups)};
                },
                .reference = [=, experts = experts, groups = groups](const Values& x,
                                                                     const Values&) -> Values {
                  Row scores = x[0];
                  for (double& v : scores) v = std::exp(v);
                  const double loss = naive_balance(scores, fractions, tokens, experts, groups);
                  return {{loss}, {loss}};
                },
                .tolerances = {{DType::f64, 1e-12}, {DType::f32, 2e-6}}});
    }
}

TEST(Router, BalanceLossIsOneWhenBalanced) {
  Context context;
  Tape tape(context);
  const Tensor ids = balanced_ids(tape, 16, 2, 8);
  const Tensor scores = Tensor::of<float>({16, 8}, std::vector<float>(128, 0.125f));
  for (int64_t groups : {1, 2})
    EXPECT_NEAR(balance_loss(tape, scores, expert_fractions(tape, ids, 8, groups), groups)
                    .to_vector<float>()[0],
                1, 1e-6);
  EXPECT_THROW(balance_loss(tape, scores, expert_fractions(tape, ids, 8, 2), 4), Error);
  EXPECT_THROW(balance_loss(tape, scores, expert_fractions(tape, ids, 8, 1), 3), Error);
}

TEST(Router, ZLoss) {
  for (int64_t experts : {1, 4, 21, 40, 512})
    check_op({.name = "z_loss",
              .inputs = {{6, experts}},
              .params = {},
              .run = [](Tape& t, const Inputs& x, const Params&) -> Inputs {
                return {z_loss(t, x[0]), z_loss(t, x[0])};
              },
              .reference = [=](const Values& x, const Values&) -> Values {
                double loss = 0;
                for (int64_t t = 0; t < 6; ++t) {
                  double sum = 0;
                  for (int64_t e = 0; e < experts; ++e) sum += std::exp(x[0][t * experts + e]);
                  loss += std::log(sum) * std::log(sum);
                }
                return {{loss}, {loss}};
              },
              .tolerances = {{DType::f64, 1e-12}, {DType::f32, 2e-6}},
              .input_scale = 3});
  Context context;
  Tape tape(context);
  EXPECT_NEAR(z_loss(tape, constant(tape, {1, 2}, {300, -300})).to_vector<float>()[0], 90000,
              1);  // no overflow
}

// Large enough for threads: any number of them gives the same bits.
TEST(Router, ResultsDoNotDependOnThreads) {
  Tensor logits({2000, 24}, DType::f32, Device::cpu, "logits");
  fill_normal(logits, 3, 0, 2);
  const auto run = [&](int threads) {
    const int before = omp_get_max_threads();
    omp_set_num_threads(threads);
    Context context;
    Tape tape(context);
    tape.leaf(logits);
    const RouterRule rule{.top_k = 4, .renormalize = true};
    const Routing r = route_top_k(tape, logits, rule);
    const Tensor loss = balance_loss(tape, r.scores, expert_fractions(tape, r.ids, 24, 4), 4),
                 z = z_loss(tape, logits);
    tape.set_grad(r.weights, r.weights.clone("grad"));
    tape.set_grad(loss, loss.clone("grad"));
    tape.set_grad(z, z.clone("grad"));
    tape.backward();
    omp_set_num_threads(before);
    auto all = tape.take_grad(logits).to_vector<float>();
    for (const Tensor& t : {r.weights, loss, z})
      for (float v : t.to_vector<float>()) all.push_back(v);
    return all;
  };
  EXPECT_EQ(run(1), run(3));
}

}  // namespace
}  // namespace pith
