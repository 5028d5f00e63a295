#include "engine/roofline.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "ops/gemm.h"

namespace pith {

double measure_peak_flops(DType dtype) {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kSize = 512;
  constexpr double kFlops = 2.0 * kSize * kSize * kSize;
  constexpr std::chrono::milliseconds kBudget(80);
  const size_t bytes = size_t(kSize * kSize) * size_of(dtype);
  double total = 0;
  // OpenBLAS, which does fp64, lets one caller in at a time: it gets all threads for one product.
#pragma omp parallel reduction(+ : total) if (dtype != DType::f64)
  {
    std::vector<unsigned char> a(bytes, 0x3c), b(bytes, 0x3c), c(bytes);  // small positive numbers
    const auto product = [&] {
      const auto begin = Clock::now();
      cpu::gemm(false, false, kSize, kSize, kSize, a.data(), b.data(), dtype, c.data(), dtype,
                false);
      return std::chrono::duration<double>(Clock::now() - begin).count();
    };
    product();  // touches memory and makes the primitive
    const auto end = Clock::now() + kBudget;
    double fastest = product();
    while (Clock::now() < end) fastest = std::min(fastest, product());
    total += kFlops / fastest;
  }
  return total;
}

}  // namespace pith
