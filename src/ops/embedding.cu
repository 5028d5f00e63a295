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

// One block for each row of logits [rows, V]; see the CPU kernel. dlogits may be the logits, or null.
template <int V, class T>
__global__ void cross_entropy(const float* logits, const int* labels, int64_t n, float* loss,
                              T* dlogits) {
  __shared__ float scratch_max[32], scratch_sum[32];
  const int64_t row = int64_t(blockIdx.x) * n, step = int64_t(blockDim.x) * V;
  const int label = labels[blockIdx.x];
  const float* x = logits + row;
  if (label < 0) {
    const float zeros[V] = {};
    if (threadIdx.x == 0) loss[blockIdx.x] = 0;
    for (int64_t j = threadIdx.x * V; dlogits && j < n; j += step)
      store<V>(dlogits + row + j, zeros);
    return;
  }
  float high = -INFINITY, sum = 0;  // sum of exp(x - high)
  const auto merge = [&](float other_high, float other_sum) {
    const float top = fmaxf(high, other_high);
    if (top == -INFINITY) return;
    sum = sum * __expf(high - top) + other_sum * __expf(other_high - top);
    high = top;
  };
  for (int64_t j = threadIdx.x * V; j < n; j += step) {
    float v[V], most = -INFINITY, total = 0;
    load<V>(x + j, v);
#pragma unroll
    for (int i = 0; i < V; ++i) most = fmaxf(most, v[i]);
#pragma unroll
    for (int i = 0; i < V; ++i) total += __expf(v[i] - most);
    merge(most, total);
  }
  for (int d = 16; d > 0; d /= 2)
    merge(__shfl_xor_sync(~0u, high, d), __shfl_xor_sync(~0u, sum, d));
  if (threadIdx.x % 32 == 0)
    scratch_max[threadIdx.x / 32] = high, scratch_sum[threadIdx.x / 32] = sum;
  __syncthreads();
  high = -INFINITY, sum = 0;
  for (int w = 0; w < int(blockDim.x) / 32; ++w) merge(scratch_max[w], scratch_sum[w]);
  const float own = x[label], scale = 1 / sum;
  __syncthreads();  // before the gradient takes the place of x
  if (threadIdx.x == 0) loss[blockIdx.x] = logf(sum) + high - own;
  for (int64_t j = threadIdx.x * V; dlogits && j < n; j += step) {
    float v[V];
    load<V>(x + j, v);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = __expf(v[i] - high) * scale - (j + i == label ? 1.0f : 0.0f);
    store<V>(dlogits + row + j, v);
  }
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

void cross_entropy(const Tensor& logits, const Tensor& labels, Tensor loss, Tensor dlogits,
                   Stream stream) {
  const int rows = int(labels.dim(0));
  if (rows == 0) return;
  const int64_t n = logits.dim(1);
  const auto run = [&]<class T>(T* to) {
    const auto kernel = n % 4 == 0 ? cross_entropy<4, T> : cross_entropy<1, T>;
    kernel<<<rows, 1024, 0, stream>>>(data<const float>(logits), data<const int>(labels), n,
                                      data<float>(loss), to);
    check(cudaGetLastError());
  };
  if (dlogits && dlogits.dtype() == DType::bf16)
    run(data<Bf16>(dlogits));
  else
    run(dlogits ? data<float>(dlogits) : nullptr);
}

}  // namespace pith::cuda
