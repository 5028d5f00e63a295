#pragma once
// What the kernels share on host and device.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "core/op.h"

namespace pith::cuda {

inline void check(cudaError_t e) {
  if (e != cudaSuccess) fail("CUDA: {} ({})", cudaGetErrorString(e), cudaGetErrorName(e));
}

inline int multiprocessors() {
  static const int count = [] {
    int n = 0;
    check(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, 0));
    return n;
  }();
  return count;
}

// by_float of core/tensor.h, with the type that device code computes with, and the data of a tensor as such.
using Bf16 = __nv_bfloat16;
template <class F> void by_float_on_device(DType t, F f) {
  if (t == DType::f32) return f(float());
  if (t == DType::bf16) return f(Bf16());
  fail("no CUDA kernel computes in {}", name_of(t));
}
template <class T> T* data(Tensor t) { return static_cast<T*>(t.raw()); }

// What a kernel takes for `a`: for a tensor its data, or null where there is none.
template <class P, class A> P argument(const A& a) {
  if constexpr (std::is_same_v<A, Tensor>)
    return a ? static_cast<P>(Tensor(a).raw()) : nullptr;
  else
    return static_cast<P>(a);
}
struct Grid {
  dim3 blocks;
  int threads;
  size_t shared_bytes = 0;
};
// Nothing where there are no blocks.
template <class... P, class... A>
void launch(void (*kernel)(P...), const Grid& grid, cudaStream_t stream, const A&... a) {
  if (grid.blocks.x == 0) return;
  kernel<<<grid.blocks, grid.threads, grid.shared_bytes, stream>>>(argument<P>(a)...);
  check(cudaGetLastError());
}
inline int blocks_for(int64_t items, int per_block) {
  return int((items + per_block - 1) / per_block);
}

template <class F> __global__ void call_each(int64_t n, F f) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) f(i);
}
// f(i) for every i below n, a thread each.
template <class F> void each(int64_t n, cudaStream_t stream, F f) {
  launch(call_each<F>, {blocks_for(n, 256), 256}, stream, n, f);
}

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
    whole ? f(z, std::integral_constant<int, 8>()) : f(z, std::integral_constant<int, 1>());
  });
}

template <class T> __device__ T warp_sum(T x) {
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
// Over a block of whole warps, for its thread 0: warp after warp.
__device__ inline double block_sum(double x) {
  __shared__ double scratch[32];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  for (int w = 1; threadIdx.x == 0 && w < int(blockDim.x) / 32; ++w) x += scratch[w];
  return x;
}

// out [n] (+)= the sum over the rows of parts, `stride` apart, of n columns from the first on; in order.
void sum_parts(const Tensor& parts, int rows, int stride, int first, Op::Into out, cudaStream_t);
// ids i32 [n] ascending by their lowest `bits` bits, and where each was, equal ones in order: both in the workspace,
// i32 [sort_workspace(n)].
struct SortedIds {
  int *ids, *from;
};
SortedIds sort_ids(const Tensor& ids, int bits, Tensor workspace, cudaStream_t);

}  // namespace pith::cuda
