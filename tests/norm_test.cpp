#include "ops/norm.h"

#include <omp.h>

#include <cmath>

#include "core/rng.h"
#include "op_testing.h"

namespace pith {
namespace {

using Flat = std::vector<double>;

Flat naive_norm(const Flat& x, const Flat& w, double eps) {
  const size_t h = w.size();
  Flat y(x.size());
  for (size_t t = 0; t < x.size() / h; ++t) {
    double squares = 0;
    for (size_t j = 0; j < h; ++j) squares += x[t * h + j] * x[t * h + j];
    for (size_t j = 0; j < h; ++j)
      y[t * h + j] = x[t * h + j] / std::sqrt(squares / h + eps) * w[j];
  }
  return y;
}

Flat plus(Flat a, const Flat& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

constexpr float kEps = 0.0009765625f;  // exact in fp32: the reference uses the same number

// Odd rows, rows of whole 16-byte pieces, and rows that a block of threads takes in several pieces.
const Shape kShapes[] = {{1, 1},     {1, 7},    {3, 64},   {5, 33},   {70, 13},
                         {130, 200}, {0, 8},    {1, 8},    {127, 16}, {129, 24},
                         {300, 72},  {3, 4096}, {2, 8200}, {3, 1030}, {600, 40}};

TEST(RmsNorm, MatchesReferenceAndDifferences) {
  for (const Shape& s : kShapes) {
    OpCase c;
    c.name = "rms_norm " + s.str();
    c.inputs = {s};
    c.params = {{s[1]}};
    c.run = [](Tape& tape, const Inputs& x, const Params& w) -> Inputs {
      return {add_rms_norm(tape, x[0], {}, *w[0], kEps).y};
    };
    c.reference = [](const std::vector<Flat>& x, const std::vector<Flat>& w) -> std::vector<Flat> {
      return {naive_norm(x[0], w[0], kEps)};
    };
    check_op(c);
  }
}

TEST(AddRmsNorm, MatchesReferenceAndDifferences) {
  for (const Shape& s : kShapes) {
    OpCase c;
    c.name = "add_rms_norm " + s.str();
    c.inputs = {s, s};
    c.params = {{s[1]}};
    c.run = [](Tape& tape, const Inputs& x, const Params& w) -> Inputs {
      AddNorm n = add_rms_norm(tape, x[0], x[1], *w[0], kEps);
      return {n.y, n.sum};
    };
    c.reference = [](const std::vector<Flat>& x, const std::vector<Flat>& w) -> std::vector<Flat> {
      const Flat sum = plus(x[0], x[1]);
      return {naive_norm(sum, w[0], kEps), sum};
    };
    check_op(c);
  }
}

// The residual chain of two stages: gradients that arrive at `sum` and a tensor used twice.
TEST(AddRmsNorm, GradientsOfAChainAdd) {
  OpCase c;
  c.name = "two add_rms_norm";
  c.inputs = {{6, 9}, {6, 9}};
  c.params = {{9}, {9}};
  c.run = [](Tape& tape, const Inputs& x, const Params& w) -> Inputs {
    AddNorm first = add_rms_norm(tape, x[0], x[1], *w[0], kEps);
    AddNorm second = add_rms_norm(tape, first.sum, x[1], *w[1], kEps);
    return {second.y, add_rms_norm(tape, second.sum, {}, *w[0], kEps).y, first.y};
  };
  c.reference = [](const std::vector<Flat>& x, const std::vector<Flat>& w) -> std::vector<Flat> {
    const Flat first = plus(x[0], x[1]), second = plus(first, x[1]);
    return {naive_norm(second, w[1], kEps), naive_norm(second, w[0], kEps),
            naive_norm(first, w[0], kEps)};
  };
  check_op(c);
}

TEST(AddRmsNorm, EmptyDeltaHandsXThrough) {
  Context context;
  Tape tape(context);
  auto w = make_param("w", {4}, DType::f32);
  Tensor x = Tensor::zeros({3, 4}, DType::f32, Device::cpu, "x");
  tape.leaf(x);
  EXPECT_EQ(add_rms_norm(tape, x, {}, *w, kEps).sum.id(), x.id());
}

// transformers: (x in fp32 * rsqrt(mean square + eps)) rounded to bf16, times weight, rounded to
// bf16.
TEST(RmsNorm, RoundsAsHuggingFace) {
  Context context;
  context.dtype = DType::bf16;
  Tape tape(context, false);
  const int64_t rows = 20, h = 48;
  auto w = make_param("w", {h}, DType::bf16);
  Tensor wide({rows, h}, DType::f32, Device::cpu, "x"), wide_w({h}, DType::f32, Device::cpu, "w");
  fill_normal(wide, 1, 0, 1.0);
  fill_normal(wide_w, 2, 0, 1.0);
  w->value.copy_from(wide_w);
  const Tensor x = wide.to(DType::bf16, "x"), y = add_rms_norm(tape, x, {}, *w, 1e-6f).y;
  // The order of the sum of squares may move rstd by an ulp, which turns few roundings around.
  int64_t different = 0;
  for (int64_t t = 0; t < rows; ++t) {
    const bf16* row = x.data<bf16>() + t * h;
    float squares = 0;
    for (int64_t j = 0; j < h; ++j) squares += float(row[j]) * float(row[j]);
    const float rstd = 1 / std::sqrt(squares / h + 1e-6f);
    for (int64_t j = 0; j < h; ++j) {
      const bf16 want(float(bf16(row[j] * rstd)) * w->value.data<bf16>()[j]);
      different += y.data<bf16>()[t * h + j].bits != want.bits;
    }
  }
  EXPECT_LE(different, rows * h / 100);
}

TEST(RmsNorm, FirstGradientOfAStepOverwrites) {
  Context context;
  Tape tape(context);
  auto w = make_param("w", {4}, DType::f32);
  std::memset(w->grad.raw(), 0xff, w->grad.nbytes());  // NaN
  Tensor x = Tensor::zeros({3, 4}, DType::f32, Device::cpu, "x");
  tape.leaf(x);
  tape.set_grad(add_rms_norm(tape, x, {}, *w, kEps).y, x);
  tape.backward();
  EXPECT_EQ(w->grad.to_vector<double>(), Flat(4, 0.0));
}

TEST(RmsNorm, DoesNotDependOnThreads) {
  const auto run = [](int threads) {
    const int before = omp_get_max_threads();
    omp_set_num_threads(threads);
    Context context;
    Tape tape(context);
    auto w = make_param("w", {65}, DType::f32);
    fill_normal(w->value, 5, 0, 1.0);
    Tensor x({3000, 65}, DType::f32, Device::cpu, "x"),
        dy(x.shape(), DType::f32, Device::cpu, "dy");
    fill_normal(x, 1, 0, 1.0);
    fill_normal(dy, 2, 0, 1.0);
    tape.leaf(x);
    tape.set_grad(add_rms_norm(tape, x, {}, *w, 1e-6f).y, dy);
    tape.backward();
    auto all = w->grad.to_vector<double>();
    for (double d : tape.take_grad(x).to_vector<double>()) all.push_back(d);
    omp_set_num_threads(before);
    return all;
  };
  EXPECT_EQ(run(1), run(3));
}

}  // namespace
}  // namespace pith
