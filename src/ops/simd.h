#pragma once
// What the CPU kernels share: accumulation types, loops and a vectorizable exponential.

#include <omp.h>

#include "ops/cuda.h"

namespace pith::cpu {

// Arithmetic of element-wise kernels and sums: fp64 for fp64, fp32 for fp32 and bf16.
template <class T> using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// exp(x) in fp32 to 1.1 ulp (tests/experts_test.cpp): x = n ln 2 + r, then 1 + r + r^2 q(r) on
// [-ln2/2, ln2/2] with q the minimax polynomial of degree 4 for the relative error (3e-9). No
// branches, so loops vectorize. Saturates to 0 below -87.33 (the smallest normal number) and to
// infinity above 88.72; NaN stays NaN.
inline float fast_exp(float x) {
  const float low = -87.33f, high = 88.72f;
  const float above = x > low ? x : low;  // a number even for NaN, so that int32_t(n) is defined
  const float clamped = above < high ? above : high;
  const float n = std::floor(clamped * 1.44269504f + 0.5f);
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float q = 1.38145406e-3f;
  q = q * r + 8.36874545e-3f;
  q = q * r + 4.1668389e-2f;
  q = q * r + 1.66665211e-1f;
  q = q * r + 4.9999994e-1f;
  const float p = (q * r) * r + r + 1.0f;
  const int32_t k = int32_t(n), half = k / 2;  // two factors: 2^128 is no float
  const float y =
      p * std::bit_cast<float>((half + 127) << 23) * std::bit_cast<float>((k - half + 127) << 23);
  return x < low ? 0.0f : (x > high ? HUGE_VALF : (x == x ? y : x));
}
inline double fast_exp(double x) { return std::exp(x); }

// op.run with f called on a value of the C++ type of a floating dtype.
template <class F, class... Gpu> void run(Op& op, Cost cost, DType dtype, F&& f, Gpu... gpu) {
  op.run(
      cost, [&] { by_float(dtype, f); }, gpu...);
}
template <class A> A sigmoid_of(A x) { return A(1) / (A(1) + fast_exp(-x)); }

template <class A> A dot(const A* a, const A* b, int64_t n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// A stable softmax, not yet divided: high becomes the maximum of itself and x, y = exp(x - high).
// Returns the sum; y may be x.
template <class A> A exp_row(const A* x, A* y, int64_t n, A& high) {
  A top = high, sum = 0;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; ++i) top = x[i] > top ? x[i] : top;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += y[i] = fast_exp(x[i] - top);
  high = top;
  return sum;
}

// f(row) for every row, over the threads if the rows [rows, cols] are worth waking them for.
template <class F> void parallel_rows(int64_t rows, int64_t cols, F&& f) {
#pragma omp parallel for if (rows * cols > 16384)
  for (int64_t r = 0; r < rows; ++r) f(r);
}

// f(i) for every element, over threads and vectors.
template <class F> void parallel_elements(int64_t n, F f) {
#pragma omp parallel for simd firstprivate(f) if (parallel : n > 16384)
  for (int64_t i = 0; i < n; ++i) f(i);
}

// to[i] = (add ? to[i] : 0) + value(i), rounded once.
template <class T, class F> void store(T* to, bool add, int64_t n, F value) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = T((add ? Acc<T>(to[i]) : Acc<T>(0)) + value(i));
}

// into[row_of[r]] (+)= from[r] for every row r of from [rows, cols]; without row_of all go to one
// row, the sums of the columns. Threads share the columns, so every sum is in order of rows.
inline void add_rows(const Tensor& from, const int32_t* row_of, Op::Into into) {
  if (!into.add) into.tensor.fill_zero();
  by_float(from.dtype(), [&](auto z) {
    using T = decltype(z);
    const T* in = from.data<T>();
    Acc<T>* out = into.tensor.data<Acc<T>>();
    const int64_t rows = from.dim(0), cols = from.dim(1), width = 64;
    parallel_rows((cols + width - 1) / width, rows * width, [&](int64_t block) {
      const int64_t begin = block * width, end = std::min(cols, begin + width);
      for (int64_t r = 0; r < rows; ++r) {
        const T* row = in + r * cols;
        Acc<T>* to = out + (row_of ? row_of[r] * cols : 0);
#pragma omp simd
        for (int64_t j = begin; j < end; ++j) to[j] += Acc<T>(row[j]);
      }
    });
  });
}

}  // namespace pith::cpu
