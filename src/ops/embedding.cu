#include <cub/device/device_radix_sort.cuh>

#include "core/cuda_helpers.cuh"
#include "ops/cuda.h"

namespace pith::cuda {
namespace {

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
    if (backward) for_pieces([&](int64_t j, float(&)[V]) { store<V>(x + j, {}); });
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
  for_pieces([&](int64_t, float(&v)[V]) {
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
    for_pieces([&](int64_t j, float(&v)[V]) {
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = __expf(v[i] - log_sum) - (j + i == label ? 1.0f : 0.0f);
      store<V>(x + j, v);
    });
}

}  // namespace

SortedIds sort_ids(const Tensor& ids, int bits, Tensor workspace, Stream stream) {
  const int n = int(ids.numel()), used = (3 * n + 3) / 4 * 4;
  int *order = data<int>(workspace), *sorted = order + n, *from = sorted + n;
  size_t bytes = workspace.nbytes() - used * sizeof(int);
  each(n, stream, [=] __device__(int64_t i) { order[i] = int(i); });
  check(cub::DeviceRadixSort::SortPairs(order + used, bytes, data<const unsigned>(ids),
                                        reinterpret_cast<unsigned*>(sorted), order, from, n, 0,
                                        bits, stream));
  return {sorted, from};
}

void embedding_backward(const Tensor& ids, const Tensor& dy, Op::Into dw, Tensor workspace,
                        Stream stream) {
  const int64_t rows = dy.dim(0), width = dy.dim(1);
  if (!dw.add) dw.tensor.fill_zero();
  if (rows == 0) return;
  const SortedIds sorted = sort_ids(ids, 32, workspace, stream);
  by_vector(dy.dtype(), width, {dy, dw.tensor}, [&](auto z, auto v) {
    launch(add_rows_by_id<decltype(z), v>, {unsigned(rows), 256}, stream, dy, sorted.ids,
           sorted.from, rows, width, dw.tensor);
  });
}

void cross_entropy(Tensor logits, const Tensor& labels, Tensor loss, bool backward, Stream stream) {
  const int64_t n = logits.dim(1);
  by_vector(logits.dtype(), n, {logits}, [&](auto z, auto v) {
    launch(cross_entropy<v, decltype(z)>, {unsigned(labels.dim(0)), 1024}, stream, logits, labels,
           n, loss, backward);
  });
}

}  // namespace pith::cuda
