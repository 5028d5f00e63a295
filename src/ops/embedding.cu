#include <cooperative_groups.h>

#include <bit>
#include <cub/device/device_radix_sort.cuh>

#include "ops/cuda.h"
#include "ops/cuda_helpers.cuh"

namespace pith::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kLossThreads = 512, kHeld = 5;  // kHeld: pieces of a row that a thread holds

template <class T, int V>
__global__ void take_rows(const T* w, const int* ids, int rows, int width, T* y) {
  const int lane = threadIdx.x % 32;
  for (int t = blockIdx.x * kWarps + threadIdx.x / 32; t < rows; t += gridDim.x * kWarps)
    for (int j = lane * V; j < width; j += 32 * V) {
      float v[V];
      load<V>(w + int64_t(ids[t]) * width + j, v);
      store<V>(y + int64_t(t) * width + j, v);
    }
}

__global__ void count_up(int* to, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) to[i] = i;
}

// ids ascending, `token` the rows of dy they come from, in order: a block sums the rows of one id, so a row of dw has
// one writer.
template <class T, int V>
__global__ void add_rows_by_id(const T* dy, const int* ids, const int* token, int rows, int width,
                               float* dw) {
  const int first = blockIdx.x, id = ids[first];
  if (first > 0 && ids[first - 1] == id) return;
  int end = first + 1;
  while (end < rows && ids[end] == id) ++end;
  for (int j = threadIdx.x * V; j < width; j += blockDim.x * V) {
    float sum[V];
    load<V>(dw + int64_t(id) * width + j, sum);
#pragma unroll 4
    for (int i = first; i < end; ++i) {
      float v[V];
      load<V>(dy + int64_t(token[i]) * width + j, v);
#pragma unroll
      for (int x = 0; x < V; ++x) sum[x] += v[x];
    }
    store<V>(dw + int64_t(id) * width + j, sum);
  }
}

// A cluster of blocks for each row of logits [rows, V], which it holds in registers as far as they go, so that a row is
// read once; see the CPU kernel.
template <int V, class T>
__global__ void __launch_bounds__(kLossThreads, 2)
    cross_entropy(T* logits, const int* labels, int64_t n, float* loss, bool backward) {
  __shared__ float2 warps[kLossThreads / 32], all;  // of max, and sum of exp(x - max)
  const auto cluster = cooperative_groups::this_cluster();
  const int blocks = int(cluster.num_blocks()), rank = int(cluster.block_rank());
  const int64_t row = blockIdx.x / blocks, step = int64_t(blocks) * blockDim.x * V;
  const int64_t first = (int64_t(rank) * blockDim.x + threadIdx.x) * V, rest = first + kHeld * step;
  const int label = labels[row];
  T* x = logits + row * n;
  if (label < 0) {
    const float zeros[V] = {};
    if (first == 0) loss[row] = 0;
    for (int64_t j = first; backward && j < n; j += step) store<V>(x + j, zeros);
    return;
  }
  const float own = first == 0 ? float(x[label]) : 0;  // before a gradient takes its place
  float high = -INFINITY, sum = 0;
  const auto merge = [&](float other_high, float other_sum) {
    const float top = fmaxf(high, other_high);
    if (top == -INFINITY) return;
    sum = sum * __expf(high - top) + other_sum * __expf(other_high - top);
    high = top;
  };
  const auto merge_values = [&](const float (&v)[V]) {
    float most = -INFINITY, total = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) most = fmaxf(most, v[i]);
#pragma unroll
    for (int i = 0; i < V; ++i) total += __expf(v[i] - most);
    merge(most, total);
  };
  Pack<V, T> held[kHeld];
#pragma unroll
  for (int p = 0; p < kHeld; ++p)
    if (first + p * step < n) held[p] = *reinterpret_cast<const Pack<V, T>*>(x + first + p * step);
#pragma unroll
  for (int p = 0; p < kHeld; ++p) {
    float v[V];
    load<V>(held[p].at, v);
    if (first + p * step < n) merge_values(v);
  }
  for (int64_t j = rest; j < n; j += step) {
    float v[V];
    load<V>(x + j, v);
    merge_values(v);
  }
  for (int d = 16; d > 0; d /= 2)
    merge(__shfl_xor_sync(~0u, high, d), __shfl_xor_sync(~0u, sum, d));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = {high, sum};
  __syncthreads();
  high = -INFINITY, sum = 0;
  for (const float2& w : warps) merge(w.x, w.y);
  if (threadIdx.x == 0) all = {high, sum};
  cluster.sync();
  high = -INFINITY, sum = 0;
  for (int b = 0; b < blocks; ++b) {
    const float2 other = *cluster.map_shared_rank(&all, b);
    merge(other.x, other.y);
  }
  const float scale = 1 / sum;
  if (first == 0) loss[row] = logf(sum) + high - own;
  const auto put = [&](int64_t j, float (&v)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = __expf(v[i] - high) * scale - (j + i == label ? 1.0f : 0.0f);
    store<V>(x + j, v);
  };
#pragma unroll
  for (int p = 0; p < kHeld; ++p) {
    float v[V];
    load<V>(held[p].at, v);
    if (backward && first + p * step < n) put(first + p * step, v);
  }
  for (int64_t j = rest; backward && j < n; j += step) {
    float v[V];
    load<V>(x + j, v);
    put(j, v);
  }
  cluster.sync();  // the others read this block's memory
}

}  // namespace

void embedding(const Tensor& ids, const Tensor& w, Tensor y, Stream stream) {
  const int rows = int(y.dim(0)), width = int(y.dim(1));
  if (rows == 0) return;
  by_vector(y.dtype(), width, {w, y}, [&](auto z, auto v) {
    using T = decltype(z);
    const int blocks = std::min(blocks_for(rows, kWarps), 16 * multiprocessors());
    take_rows<T, v><<<blocks, 32 * kWarps, 0, stream>>>(data<const T>(w), data<const int>(ids),
                                                        rows, width, data<T>(y));
    check(cudaGetLastError());
  });
}

void embedding_backward(const Tensor& ids, const Tensor& dy, Op::Into dw, Tensor workspace,
                        Stream stream) {
  const int rows = int(dy.dim(0)), width = int(dy.dim(1));
  if (!dw.add) dw.tensor.fill_zero();
  if (rows == 0) return;
  int *order = data<int>(workspace), *sorted = order + rows, *token = sorted + rows;
  void* rest = order + (3 * rows + 3) / 4 * 4;
  size_t bytes = workspace.nbytes() - (3 * rows + 3) / 4 * 4 * sizeof(int);
  count_up<<<blocks_for(rows, 256), 256, 0, stream>>>(order, rows);
  check(cub::DeviceRadixSort::SortPairs(rest, bytes, data<const int>(ids), sorted, order, token,
                                        rows, 0, 32, stream));
  by_vector(dy.dtype(), width, {dy, dw.tensor}, [&](auto z, auto v) {
    using T = decltype(z);
    add_rows_by_id<T, v><<<rows, 256, 0, stream>>>(data<const T>(dy), sorted, token, rows, width,
                                                   data<float>(dw.tensor));
    check(cudaGetLastError());
  });
}

void cross_entropy(Tensor logits, const Tensor& labels, Tensor loss, bool backward, Stream stream) {
  const int rows = int(labels.dim(0));
  const int64_t n = logits.dim(1);
  if (rows == 0) return;
  by_vector(logits.dtype(), n, {logits}, [&](auto z, auto v) {
    using T = decltype(z);
    const uint64_t held = uint64_t(kLossThreads) * kHeld * v;  // by a block
    cudaLaunchAttribute cluster{.id = cudaLaunchAttributeClusterDimension};
    cluster.val.clusterDim = {unsigned(std::min<uint64_t>(std::bit_ceil((n + held - 1) / held), 8)),
                              1, 1};
    const cudaLaunchConfig_t config{.gridDim = unsigned(rows) * cluster.val.clusterDim.x,
                                    .blockDim = kLossThreads,
                                    .stream = stream,
                                    .attrs = &cluster,
                                    .numAttrs = 1};
    check(cudaLaunchKernelEx(&config, cross_entropy<v, T>, data<T>(logits),
                             data<const int>(labels), n, data<float>(loss), backward));
  });
}

}  // namespace pith::cuda
