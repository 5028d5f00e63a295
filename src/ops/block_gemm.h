#pragma once
// What blocked CPU kernels are made of: vectors of the widest registers the build targets, 2^x on
// them, and the product of small packed matrices that stay in cache.

#include <bit>
#include <cmath>
#include <cstdint>

namespace pith::cpu {

// A register tile is kTileRows rows of two vectors: 16 accumulators of 32 registers with AVX-512, 8
// of 16 without.
#ifdef __AVX512F__
constexpr int64_t kVectorBytes = 64, kTileRows = 8;
#else
constexpr int64_t kVectorBytes = 32, kTileRows = 4;
#endif

template <class F> struct Simd;
template <> struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes), may_alias));
  typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
};
template <> struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes), may_alias));
};
template <class F> constexpr int64_t kWidth = kVectorBytes / int64_t(sizeof(F));
template <class F> constexpr int64_t kTileCols = 2 * kWidth<F>;

// The vector at p, which must be aligned to kVectorBytes.
template <class F> auto& vec(F* p) { return *reinterpret_cast<typename Simd<F>::V*>(p); }
template <class F> auto& vec(const F* p) {
  return *reinterpret_cast<const typename Simd<F>::V*>(p);
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// 2^x for x <= 126: 2^n in the exponent bits times a polynomial on [-1/2, 1/2] (relative error
// 3e-9, rounding aside). 0 below -126; NaN stays NaN.
inline Simd<float>::V exp2_of(Simd<float>::V x) {
  using V = Simd<float>::V;
  using U = Simd<float>::U;
  const V clamped = x < -126.0f ? V{} - 126.0f : x;
  const V shifted = clamped + 12582912.0f;  // 1.5 * 2^23: the low mantissa bits are round(x)
  const V r = clamped - (shifted - 12582912.0f);
  V p = 1.5461445e-4f * r + 1.3400428e-3f;
  p = p * r + 9.6180567e-3f;
  p = p * r + 5.5503272e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314721e-1f;
  p = p * r + 1.0f;
  const V power = std::bit_cast<V>((std::bit_cast<U>(shifted) << 23) + 0x3f800000u);
  return x < -126.0f ? V{} : p * power;
}
inline Simd<double>::V exp2_of(Simd<double>::V x) {
  for (int64_t i = 0; i < kWidth<double>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

// One register tile of block_gemm.
template <bool kTransA, class F>
inline void tile_gemm(int64_t k, const F* a, int64_t lda, const F* b, int64_t ldb, F* c,
                      int64_t ldc, bool add) {
  typename Simd<F>::V acc[kTileRows][2] = {};
  if (add) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kTileRows; ++i) {
      acc[i][0] = vec(c + i * ldc);
      acc[i][1] = vec(c + i * ldc + kWidth<F>);
    }
  }
  for (int64_t p = 0; p < k; ++p) {
    const auto b0 = vec(b + p * ldb), b1 = vec(b + p * ldb + kWidth<F>);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kTileRows; ++i) {
      const F x = kTransA ? a[p * lda + i] : a[i * lda + p];
      acc[i][0] += x * b0;
      acc[i][1] += x * b1;
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kTileRows; ++i) {
    vec(c + i * ldc) = acc[i][0];
    vec(c + i * ldc + kWidth<F>) = acc[i][1];
  }
}

// C[m, n] = (add ? C : 0) + A B with A [m, k] (stored [k, m] if kTransA) and B [k, n], row-major. m
// is rounded up to kTileRows and n to kTileCols: the buffers must hold that, and B and C start and
// step on whole vectors. One thread.
template <bool kTransA, class F>
void block_gemm(int64_t m, int64_t n, int64_t k, const F* a, int64_t lda, const F* b, int64_t ldb,
                F* c, int64_t ldc, bool add) {
  for (int64_t j = 0; j < n; j += kTileCols<F>)
    for (int64_t i = 0; i < m; i += kTileRows)
      tile_gemm<kTransA>(k, a + (kTransA ? i : i * lda), lda, b + j, ldb, c + i * ldc + j, ldc,
                         add);
}

}  // namespace pith::cpu
