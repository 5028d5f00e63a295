#include "ops/embedding.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/rng.h"
#include "op_testing.h"
#include "ops/linear.h"

namespace pith {
namespace {

using Flat = std::vector<double>;

std::vector<int32_t> some_ids(int64_t n, int64_t vocabulary) {
  std::vector<int32_t> ids(n);
  for (int64_t i = 0; i < n; ++i)
    ids[i] = int32_t(uniform(99, i) * uniform(98, i) * double(vocabulary));  // skewed
  return ids;
}

template <class F> std::string message_of(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

TEST(Embedding, MatchesReferenceAndDifferences) {
  struct Case {
    std::vector<int32_t> ids;
    int64_t vocabulary, h;
  };
  for (const Case& s :
       {Case{{0}, 1, 1}, Case{{4}, 5, 7}, Case{{3, 3, 3, 3}, 6, 9}, Case{{}, 4, 3},
        Case{some_ids(500, 300), 300, 65}, Case{{4, 0, 2, 4, 1, 1, 4}, 5, 33}, Case{{}, 4, 16},
        Case{some_ids(129, 4), 40, 264}, Case{std::vector<int32_t>(1100, 6), 9, 24},  // hot rows
        Case{some_ids(700, 3), 3, 7}}) {
    OpCase c;
    c.name = fmt::format("embedding of {} ids, {} x {}", s.ids.size(), s.vocabulary, s.h);
    c.params = {{s.vocabulary, s.h}};
    c.run = [=](Tape& tape, const Inputs&, const Params& w) -> Inputs {
      return {embedding(tape, ints(s.ids), *w[0])};
    };
    c.reference = [=](const std::vector<Flat>&, const std::vector<Flat>& w) -> std::vector<Flat> {
      Flat y;
      for (int32_t id : s.ids) y.insert(y.end(), &w[0][id * s.h], &w[0][id * s.h] + s.h);
      return {y};
    };
    for (const int threads : {1, 3}) {
      const int before = omp_get_max_threads();
      omp_set_num_threads(threads);
      check_op(c);
      omp_set_num_threads(before);
    }
  }
}

TEST(Embedding, FirstGradientOfAStepOverwrites) {
  Context context{.device = test_device()};
  Tape tape(context);
  auto w = make_param("w", {5, 2}, DType::f32, context.device);
  fill_nan(w->grad);  // also in rows nobody asks for
  const Tensor y = embedding(tape, ints({3, 1, 3}), *w);
  const std::vector<float> dy = {1, 2, 4, 8, 16, 32};
  tape.set_grad(y, Tensor::of<float>(y.shape(), dy).on(context.device));
  tape.backward();
  EXPECT_EQ(w->grad.to_vector<double>(), (Flat{0, 0, 4, 8, 0, 0, 17, 34, 0, 0}));
}

TEST(Embedding, NamesAnIdOutsideTheVocabulary) {
  Context context;
  Tape tape(context);
  auto w = make_param("w", {10, 4}, DType::f32);
  EXPECT_NE(message_of([&] {
              embedding(tape, ints({1, 2, 10}, Device::cpu), *w);
            }).find("token id 10 at position 2 is outside the vocabulary [0, 10)"),
            std::string::npos);
  EXPECT_NE(message_of([&] { embedding(tape, ints({-1}, Device::cpu), *w); }).find("token id -1"),
            std::string::npos);
}

struct Want {
  double sum = 0;
  Flat terms, dx, dw;
};

Want naive_head(const Flat& x, const Flat& w, const std::vector<int32_t>& labels, int64_t v,
                int64_t h) {
  Want r;
  r.terms.assign(labels.size(), 0);
  r.dx.assign(x.size(), 0);
  r.dw.assign(w.size(), 0);
  for (size_t t = 0; t < labels.size(); ++t) {
    if (labels[t] < 0) continue;
    Flat p(v, 0.0);
    for (int64_t i = 0; i < v; ++i)
      for (int64_t j = 0; j < h; ++j) p[i] += x[t * h + j] * w[i * h + j];
    const double high = *std::max_element(p.begin(), p.end());
    double total = 0;
    for (double d : p) total += std::exp(d - high);
    r.terms[t] = std::log(total) + high - p[labels[t]];
    r.sum += r.terms[t];
    for (int64_t i = 0; i < v; ++i) {
      const double d = std::exp(p[i] - high) / total - (i == labels[t]);
      for (int64_t j = 0; j < h; ++j) {
        r.dx[t * h + j] += d * w[i * h + j];
        r.dw[i * h + j] += d * x[t * h + j];
      }
    }
  }
  return r;
}

void expect_close(const Flat& got, const Flat& want, double tolerance, const std::string& what) {
  ASSERT_EQ(got.size(), want.size());
  double scale = 1e-3;  // with one word in the vocabulary every result is 0
  for (double d : want) scale = std::max(scale, std::abs(d));
  for (size_t i = 0; i < got.size(); ++i)
    ASSERT_NEAR(got[i], want[i], tolerance * scale) << what << " " << i;
}

struct HeadSetup {
  Context context;
  std::unique_ptr<Param> w;
  Tensor x, labels;
  std::vector<int32_t> label_values;
  // Every third label is ignored where there are several; `scale` is that of x.
  HeadSetup(int64_t t, int64_t v, int64_t h, DType dtype, double scale = 1,
            Device device = test_device()) {
    context.dtype = dtype;
    context.device = device;
    w = make_param("head", {v, h}, dtype, device);
    Tensor wide({t, h}, DType::f64, Device::cpu, "x"), wide_w({v, h}, DType::f64, Device::cpu, "w");
    fill_normal(wide, 1, 0, scale);
    fill_normal(wide_w, 2, 0, 1.0);
    x = wide.to(dtype, "x").on(device);
    w->value.copy_from(wide_w);
    label_values = some_ids(t, v);
    for (int64_t i = 0; i < t; i += 3) label_values[i] = t > 1 ? -100 : label_values[i];
    labels = ints(label_values, device);
  }
  Tensor seed(double value) const {
    return Tensor::of<double>({1}, std::vector<double>{value})
        .to(master_dtype(context.dtype), "seed")
        .on(context.device);
  }
};

TEST(HeadLoss, MatchesReferenceInValueAndGradients) {
  struct Size {
    int64_t t, v, h;
    double scale = 1;
  };
  struct Form {
    DType dtype;
    double value, gradient;
  };
  const bool on_gpu = test_device() == Device::cuda;
  // 1024 rows are one chunk at small vocabularies, 256 at large ones: sizes lie on both sides of
  // the borders.
  for (const Size& s :
       {Size{1, 1, 1}, Size{1, 13, 5}, Size{7, 1, 3}, Size{9, 33, 1}, Size{1023, 17, 6},
        Size{1024, 17, 6}, Size{1025, 17, 6}, Size{2050, 5, 3}, Size{257, 20000, 2},
        Size{127, 264, 8}, Size{129, 520, 24}, Size{33, 96, 8, 1e-6}, Size{33, 97, 8, 300}})
    for (const Form& form : {Form{DType::f64, 1e-12, 1e-12}, Form{DType::f32, 1e-5, 1e-5},
                             // A GPU rounds the logits.
                             Form{DType::bf16, on_gpu ? 1e-2 : 1e-5, on_gpu ? 2e-2 : 1e-2}}) {
      HeadSetup s1(s.t, s.v, s.h, form.dtype, s.scale);
      const std::string what =
          fmt::format("head {}x{}x{} {} x {}", s.t, s.v, s.h, name_of(form.dtype), s.scale);
      // Where a logit has thousands, its fp32 has only so many digits behind the point.
      const double gradient = s.scale > 1 ? std::max(form.gradient, 1e-3) : form.gradient;
      const Want want = naive_head(s1.x.to_vector<double>(), s1.w->value.to_vector<double>(),
                                   s1.label_values, s.v, s.h);
      fill_nan(s1.w->grad);  // the first write of a step overwrites
      for (int round = 1; round <= 2; ++round) {
        Tape tape(s1.context);
        tape.leaf(s1.x);
        const HeadLoss loss = head_loss(tape, s1.x, *s1.w, s1.labels);
        tape.set_grad(loss.sum, s1.seed(1));
        tape.backward();
        expect_close(loss.sum.to_vector<double>(), {want.sum}, form.value, what + " sum");
        expect_close(loss.token_loss.to_vector<double>(), want.terms, form.value, what + " term");
        expect_close(tape.take_grad(s1.x).to_vector<double>(), want.dx, gradient, what + " dx");
        Flat dw = want.dw;  // of every micro-batch so far
        for (double& d : dw) d *= round;
        expect_close(s1.w->grad.to_vector<double>(), dw, gradient, what + " dw");
      }
      Tape quiet(s1.context, false);
      const Flat before = s1.w->grad.to_vector<double>();
      expect_close(head_loss(quiet, s1.x, *s1.w, s1.labels).sum.to_vector<double>(), {want.sum},
                   form.value, what);
      EXPECT_EQ(s1.w->grad.to_vector<double>(), before)
          << "a tape that does not record made a gradient";
    }
}

TEST(HeadLoss, SeedMultipliesTheGradientOfX) {
  if (test_device() == Device::cuda) GTEST_SKIP() << "a GPU takes the seed for 1";
  HeadSetup s(6, 11, 4, DType::f64);
  const Want want =
      naive_head(s.x.to_vector<double>(), s.w->value.to_vector<double>(), s.label_values, 11, 4);
  const auto backward = [&] {
    Tape tape(s.context);
    tape.leaf(s.x);
    const HeadLoss loss = head_loss(tape, s.x, *s.w, s.labels);
    tape.set_grad(loss.sum, s.seed(2.5));
    tape.backward();
    return tape.take_grad(s.x).to_vector<double>();
  };
  EXPECT_NE(message_of(backward).find("must be 1, not 2.5"), std::string::npos);
  s.w->grad = {};
  Flat dx = want.dx;
  for (double& d : dx) d *= 2.5;
  expect_close(backward(), dx, 1e-12, "dx");
}

TEST(HeadLoss, GradientOfXAddsToOtherUses) {
  HeadSetup s(6, 11, 4, DType::f64);
  const Want want =
      naive_head(s.x.to_vector<double>(), s.w->value.to_vector<double>(), s.label_values, 11, 4);
  Tape tape(s.context);
  tape.leaf(s.x);
  for (int use = 0; use < 2; ++use)
    tape.set_grad(head_loss(tape, s.x, *s.w, s.labels).sum, s.seed(1));
  tape.backward();
  Flat dx = want.dx;
  for (double& d : dx) d *= 2;
  expect_close(tape.take_grad(s.x).to_vector<double>(), dx, 1e-12, "dx");
}

TEST(HeadLoss, NonFiniteLogitsGiveNonFiniteLoss) {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16})
    for (const double bad : {std::numeric_limits<double>::quiet_NaN(), HUGE_VAL, -HUGE_VAL}) {
      HeadSetup s(4, 9, 3, dtype);
      Tensor row = s.x.row_range(1, 2);
      row.copy_from(Tensor::of<double>({1, 3}, std::vector<double>{bad, bad, bad}));
      Tape tape(s.context);
      tape.leaf(s.x);
      EXPECT_FALSE(std::isfinite(head_loss(tape, s.x, *s.w, s.labels).sum.to_vector<double>()[0]))
          << bad;
    }
}

TEST(HeadLoss, RefusesLabelsOutsideTheVocabulary) {
  HeadSetup s(2, 9, 3, DType::f32, 1, Device::cpu);
  Tape tape(s.context);
  EXPECT_NE(message_of([&] {
              head_loss(tape, s.x, *s.w, ints({1, 9}, Device::cpu));
            }).find("label 9 at position 1 is outside the vocabulary [0, 9)"),
            std::string::npos);
}

TEST(HeadLoss, NothingToLearnClearsTheGradient) {
  for (const int64_t rows : {0, 5})
    for (const DType dtype : {DType::f32, DType::bf16}) {
      HeadSetup s(rows, 9, 8, dtype);
      s.labels = ints(std::vector<int32_t>(size_t(rows), -100));
      fill_nan(s.w->grad);
      Tape tape(s.context);
      tape.leaf(s.x);
      const Tensor sum = head_loss(tape, s.x, *s.w, s.labels).sum;
      EXPECT_EQ(sum.to_vector<double>(), Flat{0});
      EXPECT_EQ(s.w->grad.to_vector<double>(), Flat(72, 0.0));
      tape.set_grad(sum, s.seed(1));
      tape.backward();
      EXPECT_EQ(tape.take_grad(s.x).to_vector<double>(), Flat(size_t(rows * 8), 0.0));
    }
}

TEST(HeadLoss, CountsOnMeta) {
  Context context;
  context.device = Device::meta;
  auto w = make_param("head", {50, 8}, DType::bf16, Device::meta);
  const Tensor x({3000, 8}, DType::bf16, Device::meta, "x"),
      labels({3000}, DType::i32, Device::meta, "labels");
  Tape tape(context);
  tape.leaf(x);
  const HeadLoss loss = head_loss(tape, x, *w, labels);
  tape.set_grad(loss.sum, Tensor({1}, DType::f32, Device::meta, "seed"));
  tape.backward();
  EXPECT_EQ(context.total.flops, 3 * 2.0 * 3000 * 50 * 8);
  EXPECT_EQ(tape.take_grad(x).shape(), x.shape());
}

}  // namespace
}  // namespace pith
