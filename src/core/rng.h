#pragma once
// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as
// 1, 2, 3", SC 2011). A value depends on (key, index) alone, never on order, layout or thread.

#include "core/tensor.h"

namespace pith {

// constexpr: what is here runs on a GPU as well.
constexpr std::array<uint32_t, 4> philox(uint64_t key, uint64_t lo, uint64_t hi = 0) {
  uint32_t c0 = uint32_t(lo), c1 = uint32_t(lo >> 32), c2 = uint32_t(hi), c3 = uint32_t(hi >> 32);
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xd2511f53u) * c0, p1 = uint64_t(0xcd9e8d57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return {c0, c1, c2, c3};
}

// Key of a stream, the same for (seed, name) everywhere: FNV-1a of the name, mixed with the seed.
uint64_t stream_key(uint64_t seed, std::string_view name);

double uniform(uint64_t key, uint64_t index);  // [0, 1), 53 bits

// (first z + next) z + ..., by fma.
template <class... C> constexpr float polynomial(float z, float first, C... next) {
  float p = first;
  ((p = std::fma(z, p, next)), ...);
  return p;
}

// Natural logarithm on (0, 1]: x = m 2^e with m in [sqrt(1/2), sqrt(2)), atanh series in s = (m -
// 1) / (m + 1). Only operations that IEEE 754 rounds exactly (and explicit fma), so every device
// computes the same bits.
constexpr float log_fixed(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  float m = std::bit_cast<float>((u & 0x007fffffu) | 0x3f800000u);
  const bool large = m > 1.41421354f;
  const int e = int(u >> 23) - 127 + large;
  if (large) m *= 0.5f;
  const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
  const float p = polynomial(z, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3, 1.0f);
  return std::fma(float(e), 0.693147182f, 2.0f * s * p);
}

// cos(2 pi t) for t in [0, 1): the Taylor series around the nearest multiple of a quarter turn.
constexpr float cos_turn(float t) {
  const float q = std::floor(std::fma(4.0f, t, 0.5f));
  const float a = (t - 0.25f * q) * 6.28318548f, z = a * a;
  const float c = polynomial(z, 2.48015876e-5f, -1.38888892e-3f, 4.16666679e-2f, -0.5f, 1.0f);
  const float odd = polynomial(z, 2.75573188e-6f, -1.98412701e-4f, 8.33333377e-3f, -0.166666672f);
  const float s = std::fma(z * a, odd, a);
  const float quarters[] = {c, -s, -c, s};
  return quarters[int(q) & 3];
}

// N(0, 1) by Box-Muller.
constexpr float normal(uint64_t key, uint64_t index) {
  const auto p = philox(key, index);
  const float u = float((p[0] >> 8) + 1) * 0x1p-24f;  // (0, 1]
  const float t = float(p[1] >> 8) * 0x1p-24f;
  return std::sqrt(-2.0f * log_fixed(u)) * cos_turn(t);
}

// dst[i] = std * normal(key, first_index + i), rounded to the dtype of the tensor (fp32
// on a GPU).
void fill_normal(Tensor dst, uint64_t key, uint64_t first_index, double std);

// A keyed permutation of [0, n): a six-round Feistel network with cycle walking. Bijective for
// every n >= 1.
uint64_t permute(uint64_t index, uint64_t n, uint64_t key);

}  // namespace pith
