#include <cuda_bf16.h>

#include "core/cuda.h"
#include "core/param.h"
#include "core/rng.h"

namespace pith::cuda {

// f(i) for every i below n, a thread each.
template <class F> static __global__ void each(int64_t n, F f) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) f(i);
}

template <class F> static bool launch(int64_t n, F f) {
  if (n > 0) each<<<unsigned((n + 255) / 256), 256, 0, stream()>>>(n, f);
  if (const cudaError_t e = cudaGetLastError(); e != cudaSuccess)
    fail("CUDA: {}", cudaGetErrorString(e));
  return true;
}

// to[i] = from[i], or += with kAdd, in fp32.
template <bool kAdd, class To, class From>
static bool move_elements(void* to, const void* from, int64_t n) {
  return launch(n, [to = static_cast<To*>(to), from = static_cast<const From*>(from)] __device__(
                       int64_t i) { to[i] = To((kAdd ? float(to[i]) : 0.0f) + float(from[i])); });
}

bool convert(void* to, DType to_type, const void* from, DType from_type, int64_t n) {
  if (to_type == DType::bf16 && from_type == DType::f32)
    return move_elements<false, __nv_bfloat16, float>(to, from, n);
  if (to_type == DType::f32 && from_type == DType::bf16)
    return move_elements<false, float, __nv_bfloat16>(to, from, n);
  return false;
}

bool add(void* to, const void* from, DType type, int64_t n) {
  if (type == DType::bf16) return move_elements<true, __nv_bfloat16, __nv_bfloat16>(to, from, n);
  if (type == DType::f32) return move_elements<true, float, float>(to, from, n);
  return false;
}

void join_master(Tensor& wide, const Tensor& value, const Tensor& rest) {
  launch(wide.numel(), [to = wide.data<float>(), high = value.data<bf16>(),
                        low = rest.data<uint16_t>()] __device__(int64_t i) {
    to[i] = pith::join_master(high[i].bits, low[i]);
  });
}

void split_master(const Tensor& wide, const Tensor& value, Tensor& rest) {
  launch(wide.numel(), [from = wide.data<float>(), high = value.data<bf16>(),
                        to = rest.data<uint16_t>()] __device__(int64_t i) {
    to[i] = rest_of_master(from[i], high[i].bits);
  });
}

void fill_normal(Tensor& dst, uint64_t key, uint64_t first, double std) {
  launch(dst.numel(), [to = dst.data<float>(), key, first, s = float(std)] __device__(int64_t i) {
    to[i] = s * normal(key, first + uint64_t(i));
  });
}

}  // namespace pith::cuda
