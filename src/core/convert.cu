#include <cuda_bf16.h>

#include "core/cuda.h"
#include "core/tensor.h"

namespace pith::cuda {

// to[i] = from[i], or += with kAdd, in fp32.
template <bool kAdd, class To, class From>
__global__ void move_elements(To* to, const From* from, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) to[i] = To((kAdd ? float(to[i]) : 0.0f) + float(from[i]));
}

template <bool kAdd, class To, class From>
static bool launch(void* to, const void* from, int64_t n) {
  move_elements<kAdd><<<unsigned((n + 255) / 256), 256, 0, stream()>>>(
      static_cast<To*>(to), static_cast<const From*>(from), n);
  if (const cudaError_t e = cudaGetLastError(); e != cudaSuccess)
    fail("CUDA: {}", cudaGetErrorString(e));
  return true;
}

bool convert(void* to, DType to_type, const void* from, DType from_type, int64_t n) {
  if (to_type == DType::bf16 && from_type == DType::f32)
    return launch<false, __nv_bfloat16, float>(to, from, n);
  if (to_type == DType::f32 && from_type == DType::bf16)
    return launch<false, float, __nv_bfloat16>(to, from, n);
  return false;
}

bool add(void* to, const void* from, DType type, int64_t n) {
  if (type == DType::bf16) return launch<true, __nv_bfloat16, __nv_bfloat16>(to, from, n);
  if (type == DType::f32) return launch<true, float, float>(to, from, n);
  return false;
}

}  // namespace pith::cuda
