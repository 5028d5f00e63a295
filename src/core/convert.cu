#include <cuda_bf16.h>

#include "core/cuda.h"
#include "core/tensor.h"

namespace pith::cuda {

template <class To, class From>
__global__ void convert_elements(To* to, const From* from, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) to[i] = To(float(from[i]));
}

template <class To, class From> static void launch(void* to, const void* from, int64_t n) {
  convert_elements<<<unsigned((n + 255) / 256), 256, 0, stream()>>>(
      static_cast<To*>(to), static_cast<const From*>(from), n);
}

bool convert(void* to, DType to_type, const void* from, DType from_type, int64_t n) {
  if (to_type == DType::bf16 && from_type == DType::f32)
    launch<__nv_bfloat16, float>(to, from, n);
  else if (to_type == DType::f32 && from_type == DType::bf16)
    launch<float, __nv_bfloat16>(to, from, n);
  else
    return false;
  if (const cudaError_t e = cudaGetLastError(); e != cudaSuccess)
    fail("CUDA: {}", cudaGetErrorString(e));
  return true;
}

}  // namespace pith::cuda
