#include "core/cuda_helpers.cuh"
#include "ops/cuda.h"

namespace pith::cuda {
namespace {

template <int V, class T, class Bias>
__global__ void add_bias(T* y, const Bias* bias, int64_t elements, int64_t n) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (i >= elements) return;
  float b[V];
  load<V>(bias + i % n, b);
  store<V>(y + i, b, true);
}

// parts[p, j] = the sum of dy[r, j] over the rows p, p + gridDim.y, ...
template <int V, class T>
__global__ void sum_columns(const T* dy, int64_t rows, int64_t n, float* parts) {
  const int64_t j = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (j >= n) return;
  float sum[V] = {};
  for (int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    float v[V];
    load<V>(dy + r * n + j, v);
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] += v[i];
  }
  store<V>(parts + blockIdx.y * n + j, sum);
}

}  // namespace

void add_bias(Tensor y, const Tensor& bias, Stream stream) {
  const int64_t n = y.dim(1);
  by_vector(y.dtype(), n, {y, bias}, [&](auto z, auto v) {
    by_float_on_device(bias.dtype(), [&](auto b) {
      launch(add_bias<v, decltype(z), decltype(b)>, {blocks_for(y.numel(), 256 * v), 256}, stream,
             y, bias, y.numel(), n);
    });
  });
}

void bias_gradient(const Tensor& dy, Op::Into db, Tensor parts, Stream stream) {
  const int64_t n = dy.dim(1), count = parts.dim(0);
  by_vector(dy.dtype(), n, {dy, parts}, [&](auto z, auto v) {
    const dim3 blocks(blocks_for(n, 128 * v), count);
    launch(sum_columns<v, decltype(z)>, {blocks, 128}, stream, dy, dy.dim(0), n, parts);
  });
  sum_parts(parts, int(count), int(n), 0, db, stream);
}

}  // namespace pith::cuda
