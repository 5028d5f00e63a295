#pragma once
// What the kernels share on host and device.

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "core/tensor.h"

namespace pith::cuda {

inline void check(cudaError_t e) {
  if (e != cudaSuccess) fail("CUDA: {} ({})", cudaGetErrorString(e), cudaGetErrorName(e));
}
inline void check(CUresult e) {
  if (e != CUDA_SUCCESS) fail("CUDA driver: error {}", int(e));
}

inline int multiprocessors() {
  static const int count = [] {
    int device = 0, n = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device));
    return n;
  }();
  return count;
}

// A function of the driver, found at run time: the program links nothing of it.
template <class F> F driver(const char* name) {
  void* f = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion(name, &f, 12000, cudaEnableDefault, &found));
  if (!f) fail("CUDA: the driver has no {}: it is older than CUDA 12", name);
  return reinterpret_cast<F>(f);
}

// by_float of core/tensor.h, with the type that device code computes with, and the data of a tensor as such.
using Bf16 = __nv_bfloat16;
template <class F> void by_float_on_device(DType t, F&& f) {
  switch (t) {
    case DType::f64: return f(double{});
    case DType::f32: return f(float{});
    case DType::bf16: return f(Bf16{});
    default: fail("{} is not a floating dtype here", name_of(t));
  }
}
template <class T> T* data(Tensor t) { return static_cast<T*>(t.raw()); }

__device__ inline uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

}  // namespace pith::cuda
