#include <cub/device/device_radix_sort.cuh>

#include "ops/cuda.h"
#include "ops/cuda_helpers.cuh"

namespace pith::cuda {
namespace {

constexpr int kWarps = 8;

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

// One block for each row of logits [rows, V]; see the CPU kernel.
template <int V, class T>
__global__ void __launch_bounds__(1024, 2)
    cross_entropy(T* logits, const int* labels, int64_t n, float* loss, bool backward) {
  __shared__ float2 warps[32];  // of max, and sum of exp(x - max)
  const int label = labels[blockIdx.x];
  T* x = logits + int64_t(blockIdx.x) * n;
  const auto for_pieces = [&](auto f) {
    for (int64_t j = threadIdx.x * V; j < n; j += 1024 * V) {
      float v[V];
      load<V>(x + j, v);
      f(j, v);
    }
  };
  if (label < 0) {
    if (threadIdx.x == 0) loss[blockIdx.x] = 0;
    if (backward) for_pieces([&](int64_t j, float (&)[V]) { store<V>(x + j, {}); });
    return;
  }
  const float own = x[label];
  float high = -INFINITY, sum = 0;
  const auto merge = [&](float other_high, float other_sum) {
    const float top = fmaxf(high, other_high);
    if (top == -INFINITY) return;
    sum = sum * __expf(high - top) + other_sum * __expf(other_high - top);
    high = top;
  };
  for_pieces([&](int64_t, float (&v)[V]) {
    float most = v[0];
#pragma unroll
    for (int i = 1; i < V; ++i) most = fmaxf(most, v[i]);
    if (most > high) merge(most, 0);
#pragma unroll
    for (int i = 0; i < V; ++i) sum += high == -INFINITY ? 0 : __expf(v[i] - high);
  });
  const auto merge_warp = [&] {
    for (int d = 16; d > 0; d /= 2)
      merge(__shfl_xor_sync(~0u, high, d), __shfl_xor_sync(~0u, sum, d));
  };
  merge_warp();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = {high, sum};
  __syncthreads();  // also before a gradient takes the place of `own`
  high = warps[threadIdx.x % 32].x, sum = warps[threadIdx.x % 32].y;
  merge_warp();
  const float log_sum = logf(sum) + high;
  if (threadIdx.x == 0) loss[blockIdx.x] = log_sum - own;
  if (backward)
    for_pieces([&](int64_t j, float (&v)[V]) {
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = __expf(v[i] - log_sum) - (j + i == label ? 1.0f : 0.0f);
      store<V>(x + j, v);
    });
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
    cross_entropy<v><<<rows, 1024, 0, stream>>>(data<decltype(z)>(logits), data<const int>(labels),
                                                n, data<float>(loss), backward);
    check(cudaGetLastError());
  });
}

}  // namespace pith::cuda
