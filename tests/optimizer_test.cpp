#include "ops/optimizer.h"

#include <gtest/gtest.h>
#include <omp.h>

#include <cmath>
#include <limits>

#include "core/param.h"
#include "core/rng.h"
#include "op_testing.h"

namespace pith {
namespace {

using Flat = std::vector<double>;

struct Threads {
  int before = omp_get_max_threads();
  explicit Threads(int n) { omp_set_num_threads(n); }
  ~Threads() { omp_set_num_threads(before); }
};

Tensor filled(Shape shape, DType dtype, uint64_t key, double scale = 1) {
  Tensor t(shape, DType::f64, Device::cpu, "t");
  fill_normal(t, key, 0, scale);
  return t.to(dtype, "t");
}

void expect_close(const Flat& got, const Flat& want, double tolerance, const std::string& what) {
  ASSERT_EQ(got.size(), want.size());
  double scale = 1e-30;
  for (double d : want) scale = std::max(scale, std::abs(d));
  for (size_t i = 0; i < got.size(); ++i)
    ASSERT_NEAR(got[i], want[i], tolerance * scale) << what << " " << i;
}

void expect_rounded(const Tensor& value, const Tensor& master) {
  EXPECT_EQ(value.to_vector<double>(), master.to(value.dtype(), "rounded").to_vector<double>());
}

TEST(SumOfSquares, MatchesAndDoesNotDependOnThreads) {
  Context context;
  Tape tape(context, false);
  for (const int64_t n : {0, 1, 7, 16384, 16385, 100003})
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
      const Tensor g = filled({n}, dtype, 4);
      long double want = 0;
      for (double d : g.to_vector<double>()) want += (long double)d * d;
      const auto with = [&](int threads) {
        Threads t(threads);
        return sum_of_squares(tape, {&g, 1}).to_vector<double>()[0];
      };
      EXPECT_NEAR(with(1), double(want), 1e-13 * double(want));
      EXPECT_EQ(with(1), with(3));
    }
  Tensor g = filled({100000}, DType::f32, 4);
  g.data<float>()[77777] = std::numeric_limits<float>::quiet_NaN();
  const auto sum = [&] { return sum_of_squares(tape, {&g, 1}).to_vector<double>()[0]; };
  EXPECT_TRUE(std::isnan(sum()));
  g.data<float>()[77777] = HUGE_VALF;
  EXPECT_TRUE(std::isinf(sum()));
}

Tensor norm_of(double norm, double scale) {
  return Tensor::of<double>({2}, std::vector{norm, scale});
}

TEST(ClipByNorm, MatchesTheFormula) {
  Context context;
  Tape tape(context, false);
  const Tensor squares = Tensor::of<double>({2}, std::vector{9.0, 16.0});
  EXPECT_EQ(clip_by_norm(tape, squares, 10, 0).to_vector<double>(), (Flat{0.5, 0.1}));
  EXPECT_EQ(clip_by_norm(tape, squares, 10, 1).to_vector<double>(), (Flat{0.5, 0.1}));
  EXPECT_EQ(clip_by_norm(tape, squares, 10, 0.25).to_vector<double>(),
            (Flat{0.5, 0.25 / (0.5 + 1e-6) / 10}));
}

TEST(AdamW, MatchesAScalarReference) {
  struct Form {
    DType master, value, grad;
    double tolerance;
  };
  for (const Form& form : {Form{DType::f64, DType::f64, DType::f64, 1e-14},
                           Form{DType::f32, DType::f32, DType::f32, 1e-6},
                           Form{DType::f32, DType::bf16, DType::f32, 1e-6},
                           Form{DType::f32, DType::bf16, DType::bf16, 1e-6}})
    for (const int64_t n : {1, 13, 40001}) {
      Context context;
      Tape tape(context, false);
      const Tensor start = filled({n}, form.master, 1);
      Tensor m = Tensor::zeros({n}, form.master, Device::cpu, "m"), v = m.clone("v");
      Tensor value({n}, form.value, Device::cpu, "value"), rest;
      if (form.value == DType::bf16) rest = Tensor({n}, DType::u16, Device::cpu, "rest");
      split_master(start, value, rest);
      Flat w = start.to_vector<double>(), rm(n), rv(n);
      for (int64_t step = 1; step <= 3; ++step) {
        const AdamW rule{1e-2, 0.9, 0.95, 1e-8, 0.1, step};
        const Tensor grad = filled({n}, form.grad, 10 + step, 3);
        adamw_update(tape, rule, norm_of(1, 0.25), grad, m, v, value, rest);
        const Flat g = grad.to_vector<double>();
        for (int64_t i = 0; i < n; ++i) {
          const double gi = g[i] * 0.25;
          rm[i] = 0.9 * rm[i] + 0.1 * gi;
          rv[i] = 0.95 * rv[i] + 0.05 * gi * gi;
          const double m_hat = rm[i] / (1 - std::pow(0.9, step)),
                       v_hat = rv[i] / (1 - std::pow(0.95, step));
          w[i] -= 1e-2 * (m_hat / (std::sqrt(v_hat) + 1e-8) + 0.1 * w[i]);
        }
      }
      const Tensor master = join_master(value, rest);
      expect_close(master.to_vector<double>(), w, form.tolerance, "master");
      expect_close(m.to_vector<double>(), rm, form.tolerance, "m");
      expect_close(v.to_vector<double>(), rv, form.tolerance, "v");
      expect_rounded(value, master);
      const Flat before = master.to_vector<double>();
      adamw_update(tape, {1, 0.9, 0.9, 1e-8, 0, 1}, norm_of(std::nan(""), 1),
                   start.to(form.grad, "g"), m, v, value, rest);
      EXPECT_EQ(join_master(value, rest).to_vector<double>(), before);
    }
}

TEST(AdamW, ChecksWhatItGets) {
  Context context;
  Tape tape(context, false);
  const Tensor four = filled({4}, DType::f32, 1), five = filled({5}, DType::f32, 1);
  const AdamW rule{1, 0.9, 0.9, 1e-8, 0, 1}, late{1, 0.9, 0.9, 1e-8, 0, 0};
  EXPECT_THROW(adamw_update(tape, rule, norm_of(1, 1), four, five, four, four, {}), Error);
  EXPECT_THROW(adamw_update(tape, rule, norm_of(1, 1), four, four, four, four, four), Error);
  EXPECT_THROW(adamw_update(tape, late, norm_of(1, 1), four, four, four, four, {}), Error);
}

// Exact but where bf16 rounds half-way cases down: there one bit is lost, and the value is the
// rounding of what is kept.
TEST(Master, JoinsWhatItSplits) {
  std::vector<float> x = {0, -0.0f, 1, -1, 1e-45f, -1e-40f, 3.4028235e38f, 1.17549435e-38f};
  for (uint32_t low : {0x0u, 0x1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu})
    for (uint32_t high : {0x3f80u, 0x3f81u, 0xbfffu, 0x0001u, 0x7f7fu})
      x.push_back(std::bit_cast<float>(high << 16 | low));
  const int64_t n = int64_t(x.size());
  Tensor value({n}, DType::bf16, Device::cpu, "v"), rest({n}, DType::u16, Device::cpu, "r");
  split_master(Tensor::of<float>({n}, x), value, rest);
  const Tensor back = join_master(value, rest);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(x[i]), half_even = (bits & 0x1ffff) == 0x8000;
    EXPECT_EQ(std::bit_cast<uint32_t>(back.data<float>()[i]), bits - half_even) << i;
    EXPECT_EQ(value.data<bf16>()[i].bits, bf16(back.data<float>()[i]).bits) << i;
  }
}

// Three loops: c = a b, with a [m, k] and b [k, n].
Flat times(const Flat& a, const Flat& b, int64_t m, int64_t k, int64_t n) {
  Flat c(m * n, 0.0);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t p = 0; p < k; ++p)
      for (int64_t j = 0; j < n; ++j) c[i * n + j] += a[i * k + p] * b[p * n + j];
  return c;
}

Flat transposed(const Flat& a, int64_t rows, int64_t cols) {
  Flat t(a.size());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) t[j * rows + i] = a[i * cols + j];
  return t;
}

Flat naive_newton_schulz(Flat x, int64_t r, int64_t c) {
  double norm = 0;
  for (double d : x) norm += d * d;
  for (double& d : x) d /= std::sqrt(norm) + 1e-7;
  for (int i = 0; i < 5; ++i) {
    const Flat gram = times(x, transposed(x, r, c), r, c, r), gx = times(gram, x, r, r, c),
               ggx = times(gram, gx, r, r, c);
    for (size_t j = 0; j < x.size(); ++j) x[j] = 3.4445 * x[j] - 4.7750 * gx[j] + 2.0315 * ggx[j];
  }
  return x;
}

// Singular values by one-sided Jacobi rotations of the rows (r <= c).
Flat singular_values(Flat x, int64_t r, int64_t c) {
  if (r > c) return singular_values(transposed(x, r, c), c, r);
  for (int sweep = 0; sweep < 30; ++sweep)
    for (int64_t p = 0; p < r; ++p)
      for (int64_t q = p + 1; q < r; ++q) {
        double pp = 0, qq = 0, pq = 0;
        for (int64_t j = 0; j < c; ++j) {
          pp += x[p * c + j] * x[p * c + j];
          qq += x[q * c + j] * x[q * c + j];
          pq += x[p * c + j] * x[q * c + j];
        }
        const double angle = 0.5 * std::atan2(2 * pq, pp - qq), co = std::cos(angle),
                     si = std::sin(angle);
        for (int64_t j = 0; j < c; ++j) {
          const double a = x[p * c + j], b = x[q * c + j];
          x[p * c + j] = co * a + si * b;
          x[q * c + j] = co * b - si * a;
        }
      }
  Flat s(r);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < c; ++j) s[i] += x[i * c + j] * x[i * c + j];
    s[i] = std::sqrt(s[i]);
  }
  return s;
}

// x [b, r, c] orthogonalized in place: one update from zero, without momentum, of step -1.
void newton_schulz(Tape& tape, Tensor x) {
  Tensor buf = Tensor::zeros(x.shape(), x.dtype(), x.device(), "buf"), w = buf.clone("w");
  const double lr = -1 / (0.2 * std::sqrt(double(std::max(x.dim(1), x.dim(2)))));
  muon_update(tape, {lr, 0, 0, 1}, x, buf, w, w);
  x.copy_from(w);
}

// fp32 on a GPU multiplies TF32: 2^-11 of every operand, fifteen products deep.
bool is_tf32(DType dtype) { return test_device() == Device::cuda && dtype == DType::f32; }

TEST(Muon, NewtonSchulzOrthogonalizes) {
  for (const Shape& s :
       {Shape{1, 16, 40}, Shape{1, 40, 16}, Shape{5, 12, 30}, Shape{3, 1, 7}, Shape{2, 7, 1},
        Shape{4, 24, 24}, Shape{1, 1, 1}, Shape{2, 30, 129}, Shape{3, 72, 24}, Shape{9, 3, 5}})
    for (const DType dtype : {DType::f64, DType::f32}) {
      Context context{.device = test_device(), .dtype = dtype};
      Tape tape(context, false);
      Tensor x = filled(s, dtype, 6);
      const int64_t r = s[1], c = s[2];
      if (r == c)  // random square matrices have singular values near 0
        by_float(dtype, [&](auto z) {
          for (int64_t i = 0; i < x.numel(); ++i)
            if (i % (r * c) % (c + 1) == 0) x.data<decltype(z)>()[i] = decltype(z)(float(3 * r));
        });
      const Flat before = x.to_vector<double>();
      x = x.on(context.device);
      newton_schulz(tape, x);
      const Flat after = x.to_vector<double>();
      for (int64_t b = 0; b < s[0]; ++b) {
        const Flat in(&before[b * r * c], &before[b * r * c] + r * c),
            out(&after[b * r * c], &after[b * r * c] + r * c);
        for (double value : singular_values(out, r, c)) {
          EXPECT_GT(value, 0.5) << s.str();
          EXPECT_LT(value, 1.5) << s.str();
        }
        const double tolerance = is_tf32(dtype) ? 3e-2 : dtype == DType::f32 ? 1e-4 : 1e-11;
        expect_close(out, naive_newton_schulz(in, r, c), tolerance, s.str());
      }
    }
}

TEST(Muon, MatchesAWrittenOutReference) {
  struct Form {
    DType master, value;
    double tolerance;
  };
  const double lr = 0.02, momentum = 0.95, decay = 0.1, scale = 0.5;
  for (const Form& form :
       {Form{DType::f64, DType::f64, 1e-12}, Form{DType::f32, DType::bf16, 1e-5}})
    for (const Shape& s : {Shape{6, 10}, Shape{10, 6}, Shape{7, 5, 9}, Shape{1, 9, 4},
                           Shape{2, 1, 5}, Shape{3, 16, 24}, Shape{2, 40, 8}}) {
      Context context{.device = test_device(), .dtype = form.value};
      Tape tape(context, false);
      Tensor master = filled(s, form.master, 1).on(context.device),
             buf = Tensor::zeros(s, form.master, context.device, "buf");
      Tensor value = form.value == form.master ? master : master.to(form.value, "value");
      Flat w = master.to_vector<double>(), rb(w.size());
      const int64_t r = s[s.rank() - 2], c = s[s.rank() - 1];
      for (int step = 1; step <= 3; ++step) {
        const Tensor grad = filled(s, form.master, 20 + step).on(context.device);
        muon_update(tape, {lr, momentum, decay, scale}, grad, buf, master, value);
        const Flat g = grad.to_vector<double>();
        Flat update(g.size());
        for (size_t i = 0; i < g.size(); ++i) {
          rb[i] = momentum * rb[i] + (1 - momentum) * scale * g[i];
          update[i] = (1 - momentum) * scale * g[i] + momentum * rb[i];
        }
        for (size_t o = 0; o < w.size(); o += r * c) {
          const Flat u = naive_newton_schulz(Flat(&update[o], &update[o] + r * c), r, c);
          for (int64_t i = 0; i < r * c; ++i)
            w[o + i] =
                w[o + i] * (1 - lr * decay) - lr * 0.2 * std::sqrt(double(std::max(r, c))) * u[i];
        }
      }
      expect_close(buf.to_vector<double>(), rb, form.tolerance, "buf " + s.str());
      const double tolerance = is_tf32(form.master) ? 1e-3 : form.tolerance;
      expect_close(master.to_vector<double>(), w, tolerance, "master " + s.str());
      expect_rounded(value, master);
    }
}

// More matrices than a launch takes on a GPU.
TEST(Muon, ALongStackIsItsMatrices) {
  Context context{.device = test_device()};
  Tape tape(context, false);
  const int64_t count = test_device() == Device::cuda ? 70000 : 700;
  const Tensor two = filled({2, 1, 2}, DType::f32, 8), few = two.on(context.device).clone("few");
  std::vector<float> values;
  for (int64_t i = 0; i < count / 2; ++i)
    values.insert(values.end(), two.data<float>(), two.data<float>() + 4);
  const Tensor many = Tensor::of<float>({count, 1, 2}, values).on(context.device);
  newton_schulz(tape, few);
  newton_schulz(tape, many);
  const Flat want = few.to_vector<double>(), got = many.to_vector<double>();
  for (size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], want[i % 4], 3e-2) << i;
}

TEST(Muon, AStackIsItsMatricesWhateverTheThreads) {
  const auto run = [](int threads, bool one_by_one) {
    Threads t(threads);
    Context context;
    Tape tape(context, false);
    Tensor x = filled({6, 20, 33}, DType::f32, 8);
    for (int64_t b = 0; one_by_one && b < 6; ++b) newton_schulz(tape, x.row_range(b, b + 1));
    if (!one_by_one) newton_schulz(tape, x);
    return x.to_vector<double>();
  };
  const Flat want = run(1, true);
  expect_close(run(3, false), want, 1e-5, "stack");
  EXPECT_EQ(run(1, false), want);
}

TEST(Optimizer, RunsOnMeta) {
  Context context;
  context.device = Device::meta;
  Tape tape(context, false);
  const Tensor g({3, 8, 16}, DType::f32, Device::meta, "g");
  const Tensor norm = clip_by_norm(tape, sum_of_squares(tape, {&g, 1}), 1, 1);
  adamw_update(tape, {1e-3, 0.9, 0.95, 1e-8, 0.1, 1}, norm, g, g, g, g, {});
  EXPECT_EQ(context.total.flops, 0);
  muon_update(tape, {1e-3, 0.95, 0.1, 1}, g, g, g, g);
  EXPECT_EQ(context.total.flops, 3 * 5 * (2 * 2.0 * 8 * 8 * 16 + 2.0 * 8 * 8 * 8));
}

}  // namespace
}  // namespace pith
