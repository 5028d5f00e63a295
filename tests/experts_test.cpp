#include "ops/experts.h"

#include <omp.h>

#include <bit>
#include <cmath>
#include <limits>

#include "core/rng.h"
#include "op_testing.h"
#include "ops/basic.h"
#include "ops/simd.h"

namespace pith {
namespace {

using Values = std::vector<std::vector<double>>;
using Ids = std::vector<int32_t>;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Routed {
  const char* name;
  int64_t rows, slots, experts;
  Ids ids;
};

// Ids of all experts and of nobody.
Routed random_routing(const char* name, int64_t rows, int64_t slots, int64_t experts) {
  Routed r{name, rows, slots, experts, Ids(size_t(rows * slots))};
  for (size_t i = 0; i < r.ids.size(); ++i) r.ids[i] = int32_t(philox(3, i)[0] % (experts + 1)) - 1;
  return r;
}

const std::vector<Routed>& routings() {
  static const std::vector<Routed> all = {
      {"mixed", 5, 3, 4, {2, 0, 3, 2, -1, 0, 3, 2, 1, -1, -1, 2, 0, 1, 2}},
      {"empty experts", 4, 2, 6, {5, 1, 1, 5, 5, 1, 1, 1}},
      {"one token", 1, 2, 8, {7, 3}},
      {"one expert gets everything", 6, 1, 3, {1, 1, 1, 1, 1, 1}},
      {"K = E", 3, 2, 2, {0, 1, 1, 0, 0, 1}},
      {"E = 1", 3, 1, 1, {0, -1, 0}},
      {"nobody", 2, 2, 3, {-1, -1, -1, -1}},
      {"no rows", 0, 2, 3, {}},
      {"one expert gets everything, K = 8", 20, 8, 5, Ids(160, 3)},
      random_routing("33 experts, K = 1", 129, 1, 33),
      random_routing("40 experts, K = 8", 127, 8, 40),
      random_routing("512 experts, K = 8", 130, 8, 512),
  };
  return all;
}

// Widths of whole 16-byte pieces and others.
std::vector<std::pair<Routed, int64_t>> cases_of(std::initializer_list<int64_t> widths) {
  std::vector<std::pair<Routed, int64_t>> all;
  for (const Routed& r : routings())
    for (int64_t width : widths) all.emplace_back(r, width);
  return all;
}

Tensor ids_tensor(const Routed& r, Device device = test_device()) {
  return Tensor::of<int32_t>({r.rows, r.slots}, r.ids).on(device);
}

ExpertOrder order_of(Tape& tape, const Routed& r) {
  return order_by_expert(tape, ids_tensor(r, tape.context.device), r.experts);
}

// Slots sorted by (expert, slot), the naive way.
Ids naive_slots(const Routed& r) {
  Ids slots;
  for (int64_t e = 0; e < r.experts; ++e)
    for (size_t i = 0; i < r.ids.size(); ++i)
      if (r.ids[i] == e) slots.push_back(int32_t(i));
  return slots;
}

Values naive_gather(const Routed& r, const std::vector<double>& x, int64_t width) {
  std::vector<double> y(size_t(r.rows * r.slots * width), 0.0);
  const Ids slots = naive_slots(r);
  for (size_t n = 0; n < slots.size(); ++n)
    for (int64_t i = 0; i < width; ++i) y[n * width + i] = x[slots[n] / r.slots * width + i];
  return {y};
}

Values naive_sum(const Routed& r, const std::vector<double>& y, int64_t width) {
  std::vector<double> x(size_t(r.rows * width), 0.0);
  const Ids slots = naive_slots(r);
  for (size_t n = 0; n < slots.size(); ++n)
    for (int64_t i = 0; i < width; ++i) x[slots[n] / r.slots * width + i] += y[n * width + i];
  return {x};
}

// weights and slots may be empty.
std::vector<double> naive_swiglu(const std::vector<double>& gate_up, int64_t width,
                                 const Ids& slots, size_t rows,
                                 const std::vector<double>& weights) {
  std::vector<double> y(gate_up.size() / 2, 0.0);
  for (size_t n = 0; n < rows; ++n)
    for (int64_t i = 0; i < width; ++i) {
      const double g = gate_up[n * 2 * width + i], u = gate_up[n * 2 * width + width + i];
      y[n * width + i] = g / (1 + std::exp(-g)) * u * (weights.empty() ? 1.0 : weights[slots[n]]);
    }
  return y;
}

TEST(FastExp, IsWithinAnUlpAndSaturates) {
  double worst = 0;
  for (uint64_t bits = 0; bits < (uint64_t(1) << 32); bits += 1009) {
    const float x = std::bit_cast<float>(uint32_t(bits));
    if (!(x >= -87.33f && x <= 88.72f)) continue;
    const double want = std::exp(double(x));
    const float near = float(want);
    worst = std::max(worst,
                     std::abs(cpu::fast_exp(x) - want) / (std::nextafter(near, HUGE_VALF) - near));
  }
  EXPECT_LE(worst, 1.1) << "ulp";
  EXPECT_EQ(cpu::fast_exp(0.0f), 1.0f);
  EXPECT_EQ(cpu::fast_exp(-0.0f), 1.0f);
  for (float x : {-87.34f, -1000.0f, -HUGE_VALF}) EXPECT_EQ(cpu::fast_exp(x), 0.0f) << x;
  for (float x : {88.73f, 1000.0f, HUGE_VALF}) EXPECT_EQ(cpu::fast_exp(x), HUGE_VALF) << x;
  EXPECT_TRUE(std::isnan(cpu::fast_exp(float(kNan))));
  EXPECT_EQ(cpu::sigmoid_of(200.0f), 1.0f);
  EXPECT_EQ(cpu::sigmoid_of(-200.0f), 0.0f);
}

TEST(OrderByExpert, IsTheStableSort) {
  for (const Routed& r : routings()) {
    SCOPED_TRACE(r.name);
    Context context{.device = test_device()};
    Tape tape(context);
    const ExpertOrder order = order_of(tape, r);
    const Ids want = naive_slots(r), offsets = order.offsets.to_vector<int32_t>(),
              slots = order.slots.to_vector<int32_t>(), pairs = order.pairs.to_vector<int32_t>();
    ASSERT_EQ(int64_t(offsets.size()), r.experts + 1);
    EXPECT_EQ(offsets[0], 0);
    for (int64_t e = 0; e < r.experts; ++e)
      EXPECT_EQ(offsets[e + 1] - offsets[e], std::count(r.ids.begin(), r.ids.end(), e));
    ASSERT_EQ(offsets[r.experts], int32_t(want.size()));
    for (size_t n = 0; n < slots.size(); ++n) EXPECT_EQ(slots[n], n < want.size() ? want[n] : -1);
    Ids places(pairs.size(), -1);
    for (size_t n = 0; n < want.size(); ++n) places[want[n]] = int32_t(n);
    EXPECT_EQ(pairs, places);
  }
}

TEST(OrderByExpert, RejectsIdsThatAreNoExpert) {
  Context context;
  Tape tape(context);
  for (int32_t bad : {4, -2, 1 << 30}) {
    const Routed r{"bad", 2, 2, 4, {0, 3, 1, bad}};
    try {
      order_of(tape, r);
      FAIL() << bad;
    } catch (const Error& e) {
      const std::string want =
          fmt::format("order_by_expert: expert id {} at [1, 1] is outside [-1, 4)", bad);
      EXPECT_NE(std::string(e.what()).find(want), std::string::npos) << e.what();
    }
  }
}

TEST(Experts, GatherRows) {
  for (const auto& [r, width] : cases_of({70, 72})) {
    check_op({.name = std::string("gather_rows, ") + r.name,
              .inputs = {{r.rows, width}},
              .params = {},
              .run = [=](Tape& t, const Inputs& x, const Params&) -> Inputs {
                const ExpertOrder order = order_of(t, r);
                return {gather_rows(t, x[0], order),
                        gather_rows(t, x[0], order)};  // the second gradient adds
              },
              .reference = [=](const Values& x, const Values&) -> Values {
                const auto y = naive_gather(r, x[0], width)[0];
                return {y, y};
              }});
  }
}

TEST(Experts, SumRows) {
  for (const auto& [r, width] : cases_of({131, 136})) {
    check_op({.name = std::string("sum_rows, ") + r.name,
              .inputs = {{r.rows * r.slots, width}},
              .params = {},
              .run = [=](Tape& t, const Inputs& x, const Params&) -> Inputs {
                const ExpertOrder order = order_of(t, r);
                return {sum_rows(t, x[0], order), sum_rows(t, x[0], order)};
              },
              .reference = [=](const Values& x, const Values&) -> Values {
                const auto y = naive_sum(r, x[0], width)[0];
                return {y, y};
              }});
  }
}

TEST(Experts, SwigluWithWeights) {
  for (const auto& [r, width] : cases_of({37, 40})) {
    const auto run = [=](Tape& t, const Inputs& x, const Params&) -> Inputs {
      const ExpertOrder order = order_of(t, r);
      const DType wide = master_dtype(x[0].dtype());
      const Tensor weights = x[1].dtype() == wide ? x[1] : cast(t, x[1], wide);
      return {swiglu(t, x[0], weights, order), swiglu(t, x[0], weights, order),
              swiglu(t, x[0], {}, order)};
    };
    const auto reference = [=](const Values& x, const Values&) -> Values {
      const Ids slots = naive_slots(r);
      const auto y = naive_swiglu(x[0], width, slots, slots.size(), x[1]);
      return {y, y, naive_swiglu(x[0], width, slots, slots.size(), {})};
    };
    check_op({.name = std::string("swiglu with weights, ") + r.name,
              .inputs = {{r.rows * r.slots, 2 * width}, {r.rows, r.slots}},
              .params = {},
              .run = run,
              .reference = reference});
  }
}

TEST(Experts, SwigluOfPlainRows) {
  for (int64_t width : {1, 16, 53, 264})
    check_op(
        {.name = "swiglu of plain rows",
         .inputs = {{7, 2 * width}},
         .params = {},
         .run = [](Tape& t, const Inputs& x, const Params&) -> Inputs { return {swiglu(t, x[0])}; },
         .reference = [=](const Values& x, const Values&) -> Values {
           return {naive_swiglu(x[0], width, {}, 7, {})};
         },
         .input_scale = 3});
}

// Weight gradients when the activations themselves want none.
TEST(Experts, SwigluGradientOfTheWeightsAlone) {
  const Routed& r = routings()[0];
  Context context{.device = test_device()};
  Tape tape(context);
  const auto same = [&](Shape shape, float value) {
    return Tensor::of<float>(shape, std::vector<float>(size_t(shape.numel()), value))
        .on(context.device);
  };
  const Tensor gate_up = same({15, 4}, 0.5f), weights = same({5, 3}, 0.25f);
  tape.leaf(weights);
  const Tensor y = swiglu(tape, gate_up, weights, order_of(tape, r));
  tape.set_grad(y, same(y.shape(), 1.0f));
  tape.backward();
  const float silu_up = 0.5f / (1 + std::exp(-0.5f)) * 0.5f;
  const auto got = tape.take_grad(weights).to_vector<float>();
  for (size_t i = 0; i < got.size(); ++i)
    EXPECT_NEAR(got[i], r.ids[i] < 0 ? 0 : 2 * silu_up, 1e-6f) << i;
}

// Whatever lies in the rows of unused pairs, it reaches neither outputs nor gradients.
TEST(Experts, UnusedRowsAreZero) {
  const Routed& r = routings()[0];  // 12 of 15 pairs are used
  by_float(DType::bf16, [&](auto z) {
    using T = decltype(z);
    Context context{.device = test_device(), .dtype = dtype_of<T>()};
    const auto filled = [&](int64_t rows, int64_t cols) {
      std::vector<T> v(size_t(rows * cols), T(1.0f));
      std::fill(v.begin() + 12 * cols, v.end(), T(float(kNan)));
      return Tensor::of<T>({rows, cols}, v).on(context.device);
    };
    Tape tape(context);
    const ExpertOrder order = order_of(tape, r);
    const Tensor gate_up = filled(15, 8), rows = filled(15, 4);
    const Tensor x = Tensor::of<T>({5, 4}, std::vector<T>(20, T(1.0f))).on(context.device);
    const Tensor weights =
        Tensor::of<float>({5, 3}, std::vector<float>(15, 1.0f)).on(context.device);
    for (const Tensor* t : {&gate_up, &rows, &x, &weights}) tape.leaf(*t);
    const Tensor act = swiglu(tape, gate_up, weights, order),
                 gathered = gather_rows(tape, x, order);
    const Tensor summed = sum_rows(tape, rows, order);
    tape.set_grad(act, filled(15, 4));
    tape.set_grad(gathered, filled(15, 4));
    tape.set_grad(summed, x.clone("grad"));
    tape.backward();
    const auto finite = [](const Tensor& t) {
      for (float v : t.to_vector<float>())
        if (!std::isfinite(v)) return false;
      return true;
    };
    EXPECT_TRUE(finite(summed) && finite(tape.take_grad(x)) && finite(tape.take_grad(weights)));
    for (const Tensor& t : {act, gathered, tape.take_grad(gate_up), tape.take_grad(rows)}) {
      EXPECT_TRUE(finite(t));
      for (float v : t.row_range(12, 15).to_vector<float>()) EXPECT_EQ(v, 0.0f);
    }
  });
}

TEST(Experts, RejectsShapesThatDoNotFit) {
  Context context;
  Tape tape(context);
  const ExpertOrder order = order_of(tape, routings()[0]);
  const Tensor x = Tensor::zeros({5, 4}, DType::f32, Device::cpu, "x");
  const Tensor rows = Tensor::zeros({15, 4}, DType::f32, Device::cpu, "rows");
  const Tensor narrow = Tensor::zeros({5, 3}, DType::bf16, Device::cpu, "weights");
  EXPECT_THROW(gather_rows(tape, rows, order), Error);
  EXPECT_THROW(sum_rows(tape, x, order), Error);
  EXPECT_THROW(swiglu(tape, x, {}, order), Error);
  EXPECT_THROW(swiglu(tape, rows, narrow, order), Error);
  EXPECT_THROW(swiglu(tape, rows, x, order), Error);
  EXPECT_THROW(swiglu(tape, narrow), Error);
}

// Large enough for threads: any number of them gives the same bits.
TEST(Experts, ResultsDoNotDependOnThreads) {
  const int64_t rows = 300, slots = 4, experts = 16, width = 96;
  const Routed r = random_routing("large", rows, slots, experts);
  Tensor x({rows, 2 * width}, DType::f32, Device::cpu, "x"),
      weights({rows, slots}, DType::f32, Device::cpu, "w");
  fill_normal(x, 1, 0, 1);
  fill_normal(weights, 2, 0, 1);
  const auto run = [&](int threads) {
    const int before = omp_get_max_threads();
    omp_set_num_threads(threads);
    Context context;
    Tape tape(context);
    tape.leaf(x);
    tape.leaf(weights);
    const ExpertOrder order = order_of(tape, r);
    const Tensor y =
        sum_rows(tape, swiglu(tape, gather_rows(tape, x, order), weights, order), order);
    tape.set_grad(y, y.clone("grad"));
    tape.backward();
    omp_set_num_threads(before);
    return std::vector<std::vector<float>>{y.to_vector<float>(),
                                           tape.take_grad(x).to_vector<float>(),
                                           tape.take_grad(weights).to_vector<float>()};
  };
  EXPECT_EQ(run(1), run(3));
}

}  // namespace
}  // namespace pith
