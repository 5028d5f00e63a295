#include "ops/gemm.h"

#include <gtest/gtest.h>
#include <omp.h>

#include <cmath>
#include <limits>

#include "core/rng.h"
#include "op_testing.h"
#include "ops/cuda.h"

namespace pith {
namespace {

struct Form {
  DType in, out;
  double tolerance;  // relative to the largest sum of magnitudes
};
const Form kForms[] = {{DType::f64, DType::f64, 1e-14},
                       {DType::f32, DType::f32, 1e-6},
                       {DType::bf16, DType::f32, 1e-6},
                       {DType::bf16, DType::bf16, 5e-3}};

struct Size {
  int64_t m, n, k;
};
const Size kSizes[] = {{1, 1, 1},   {7, 13, 5},     {1, 33, 17},  {33, 1, 17},  {31, 17, 1},
                       {1, 1, 64},  {64, 48, 1},    {130, 65, 3}, {64, 64, 64}, {257, 96, 40},
                       {3, 5, 300}, {16, 256, 513}, {127, 8, 72}, {129, 40, 24}};

Tensor filled(Shape shape, DType dtype, const char* name) {
  Tensor t(shape, DType::f64, Device::cpu, name);
  fill_normal(t, stream_key(3, name), 0, 1.0);
  return t.to(dtype, name);
}

// Multiplies [m, k] by [k, n] and compares with three loops in fp64.
template <class F>
void check(const Size& s, bool trans_a, bool trans_b, const Form& form, bool add, F&& multiply,
           Device device = Device::cpu) {
  const auto on_device = [&](Shape shape, DType t, const char* name) {
    return filled(shape, t, name).on(device);
  };
  const Tensor a = on_device(trans_a ? Shape{s.k, s.m} : Shape{s.m, s.k}, form.in, "a");
  const Tensor b = on_device(trans_b ? Shape{s.n, s.k} : Shape{s.k, s.n}, form.in, "b");
  Tensor c = on_device({s.m, s.n}, form.out, "c");
  const auto av = a.to_vector<double>(), bv = b.to_vector<double>(), before = c.to_vector<double>();
  if (!add) fill_nan(c);  // what is there must not matter
  multiply(a, b, c);
  const auto got = c.to_vector<double>();
  double worst = 0, scale = 1e-30;
  for (int64_t i = 0; i < s.m; ++i)
    for (int64_t j = 0; j < s.n; ++j) {
      double want = add ? before[i * s.n + j] : 0, magnitude = std::abs(want);
      for (int64_t p = 0; p < s.k; ++p) {
        const double term =
            av[trans_a ? p * s.m + i : i * s.k + p] * bv[trans_b ? j * s.k + p : p * s.n + j];
        want += term;
        magnitude += std::abs(term);
      }
      const double error = std::abs(got[i * s.n + j] - want);
      worst = std::max(worst, std::isnan(error) ? HUGE_VAL : error);
      scale = std::max(scale, magnitude);
    }
  EXPECT_LE(worst / scale, form.tolerance)
      << s.m << "x" << s.n << "x" << s.k << (trans_a ? " A^T" : "") << (trans_b ? " B^T" : "")
      << (add ? " add " : " ") << name_of(form.in) << " -> " << name_of(form.out);
}

template <class F> void for_all_forms(F&& f) {
  for (const Size& s : kSizes)
    for (const Form& form : kForms)
      for (int bits = 0; bits < 8; ++bits)
        if (const bool add = bits & 4; !add || form.out != DType::bf16)
          f(s, bits & 1, bits & 2, form, add);
}

// The same products in device memory; there bf16 adds too.
void check_on_gpu(const Size& s, bool ta, bool tb, const Form& form, bool add, auto stream) {
  const auto multiply = [&](const Tensor& a, const Tensor& b, Tensor& c) {
    if constexpr (cuda::kBuilt)
      cuda::gemm(ta, tb, s.m, s.n, s.k, a.raw(), b.raw(), form.in, c.raw(), form.out, add, stream);
  };
  check(s, ta, tb, form, add, multiply, Device::cuda);
}

TEST(Gemm, MatchesNaiveLoops) {
  for_all_forms([](const Size& s, bool ta, bool tb, const Form& form, bool add) {
    if (test_device() == Device::cuda && form.in != DType::f64) {
      check_on_gpu(s, ta, tb, form, add, cuda::stream());
      if (form.out == DType::bf16) check_on_gpu(s, ta, tb, form, true, cuda::stream());
      return;
    }
    check(s, ta, tb, form, add, [&](const Tensor& a, const Tensor& b, Tensor& c) {
      cpu::gemm(ta, tb, s.m, s.n, s.k, a.raw(), b.raw(), form.in, c.raw(), form.out, add);
    });
  });
}

TEST(Gemm, Bf16ThroughFp32MatchesNaiveLoops) {
  for_all_forms([](const Size& s, bool ta, bool tb, const Form& form, bool add) {
    if (form.in != DType::bf16) return;
    check(s, ta, tb, form, add, [&](const Tensor& a, const Tensor& b, Tensor& c) {
      cpu::gemm_bf16_as_fp32(ta, tb, s.m, s.n, s.k, a.raw(), b.raw(), c.raw(), form.out, add);
    });
  });
}

TEST(Gemm, EmptyDimensions) {
  for (const Form& form : kForms) {
    Tensor a = filled({4, 4}, form.in, "a"), c = filled({4, 4}, form.out, "c");
    const auto before = c.to_vector<double>();
    const auto run = [&](int64_t m, int64_t n, int64_t k, bool add) {
      cpu::gemm(true, false, m, n, k, a.raw(), a.raw(), form.in, c.raw(), form.out, add);
      return c.to_vector<double>();
    };
    EXPECT_EQ(run(0, 4, 4, false), before);
    EXPECT_EQ(run(4, 0, 4, false), before);
    if (form.out != DType::bf16) {
      EXPECT_EQ(run(4, 4, 0, true), before);
    }
    EXPECT_EQ(run(4, 4, 0, false), std::vector<double>(16, 0.0));
  }
}

TEST(Gemm, RefusesUnknownTypes) {
  Tensor a = filled({4, 4}, DType::bf16, "a"), c = filled({4, 4}, DType::bf16, "c");
  EXPECT_THROW(
      cpu::gemm(false, false, 4, 4, 4, a.raw(), a.raw(), DType::bf16, c.raw(), DType::bf16, true),
      Error);
  EXPECT_THROW(
      cpu::gemm(false, false, 4, 4, 4, a.raw(), a.raw(), DType::f32, c.raw(), DType::bf16, false),
      Error);
}

// Runs with one fixed number of threads whatever the machine or environment says.
struct Threads {
  int before = omp_get_max_threads();
  explicit Threads(int n) { omp_set_num_threads(n); }
  ~Threads() { omp_set_num_threads(before); }
};

TEST(Gemm, RepeatsBitByBitAndInsideParallelRegions) {
  Threads two(2);
  const int64_t m = 96, n = 64, k = 1500;
  for (const Form& form : kForms)
    for (int bits = 0; bits < 4; ++bits) {
      const bool ta = bits & 1, tb = bits & 2;
      const Tensor a = filled({m, k}, form.in, "a"), b = filled({k, n}, form.in, "b");
      const auto once = [&] {
        Tensor c({m, n}, form.out, Device::cpu, "c");
        cpu::gemm(ta, tb, m, n, k, a.raw(), b.raw(), form.in, c.raw(), form.out, false);
        return c.to_vector<double>();
      };
      const auto first = once();
      for (int repeat = 0; repeat < 5; ++repeat)
        EXPECT_EQ(once(), first) << name_of(form.in) << " form " << bits;
      std::vector<std::vector<double>> inside(8);
      cpu::parallel_tasks(8, [&](int64_t i) { inside[i] = once(); });
      for (const auto& got : inside) {
        EXPECT_EQ(got, inside[0]);
        for (size_t i = 0; i < got.size(); ++i)
          ASSERT_NEAR(got[i], first[i], 10 * form.tolerance * std::sqrt(double(k)) * 4);
      }
      EXPECT_EQ(once(), first) << "after a parallel region";
    }
}

TEST(Gemm, TasksRethrow) {
  Threads two(2);
  EXPECT_THROW(cpu::parallel_tasks(9,
                                   [](int64_t i) {
                                     if (i == 5) fail("task {}", i);
                                   }),
               Error);
}

}  // namespace
}  // namespace pith
