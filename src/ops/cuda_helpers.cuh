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

// Kernels on rows read and write V elements at a time: 8 where rows are whole 16-byte pieces, else 1.
template <int V, class T> struct alignas(V * sizeof(T)) Pack { T at[V]; };
template <int V, class T> __device__ void load(const T* from, float (&to)[V]) {
  const auto pack = *reinterpret_cast<const Pack<V, T>*>(from);
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = float(pack.at[i]);
}
// Rounds once; with `add`, to what is there.
template <int V, class T> __device__ void store(T* to, const float (&from)[V], bool add = false) {
  Pack<V, T>& out = *reinterpret_cast<Pack<V, T>*>(to);
  float before[V] = {};
  if (add) load<V>(to, before);
  Pack<V, T> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) pack.at[i] = T(before[i] + from[i]);
  out = pack;
}
template <class T> __device__ float rounded(float x) { return float(T(x)); }

// Calls f(T{}, std::integral_constant<int, V>{}) for rows of `width` elements of dtype t in all of `tensors`.
template <class F>
void by_vector(DType t, int64_t width, std::initializer_list<Tensor> tensors, F f) {
  bool whole = width % 8 == 0;
  for (const Tensor& x : tensors)
    whole = whole && (!x || reinterpret_cast<uintptr_t>(x.raw()) % 16 == 0);
  by_float_on_device(t, [&](auto z) {
    if constexpr (sizeof z < 8)
      whole ? f(z, std::integral_constant<int, 8>()) : f(z, std::integral_constant<int, 1>());
    else
      fail("no CUDA kernel computes in {}", name_of(t));
  });
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
  return x;
}
// Over a block of whole warps, the same for every thread; `scratch` [32] is free again after the next barrier.
__device__ inline float block_sum(float x, float* scratch) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  x = warp_sum(x);
  __syncthreads();
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}

inline int blocks_for(int64_t items, int per_block) {
  return int(std::max<int64_t>(1, (items + per_block - 1) / per_block));
}

// out[j] (+)= the sum over rows of parts, rows `stride` apart, of n columns; in order.
void sum_parts(const float* parts, int rows, int n, int stride, float* out, bool add,
               cudaStream_t stream);

}  // namespace pith::cuda
