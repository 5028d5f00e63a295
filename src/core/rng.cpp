#include "core/rng.h"

#include "core/cuda.h"

namespace pith {

uint64_t stream_key(uint64_t seed, std::string_view name) {
  uint64_t h = 0xcbf29ce484222325ull;
  for (unsigned char c : name) h = (h ^ c) * 0x100000001b3ull;
  h = (h ^ (h >> 33)) * 0xff51afd7ed558ccdull;
  return h ^ (h >> 33) ^ (seed * 0x9e3779b97f4a7c15ull);
}

double uniform(uint64_t key, uint64_t index) {
  const auto p = philox(key, index);
  return double((uint64_t(p[0]) << 21) ^ (p[1] >> 11)) * 0x1p-53;
}

void fill_normal(Tensor dst, uint64_t key, uint64_t first, double std) {
  if (dst.device() == Device::cuda) return cuda::fill_normal(dst, key, first, std);
  by_float(dst.dtype(), [&](auto z) {
    using T = decltype(z);
    T* p = dst.data<T>();
    const int64_t n = dst.numel();
#pragma omp parallel for if (n > 16384)
    for (int64_t i = 0; i < n; ++i) p[i] = T(float(std) * normal(key, first + uint64_t(i)));
  });
}

uint64_t permute(uint64_t index, uint64_t n, uint64_t key) {
  int half = 1;
  while (half < 32 && (uint64_t(1) << (2 * half)) < n) ++half;
  const uint64_t mask = (uint64_t(1) << half) - 1;
  do {
    uint64_t left = index >> half, right = index & mask;
    for (uint64_t round = 0; round < 6; ++round)
      left = std::exchange(right, left ^ (philox(key, right, round)[0] & mask));
    index = (left << half) | right;
  } while (index >= n);
  return index;
}

}  // namespace pith
