#include "core/cuda_helpers.cuh"
#include "ops/cuda.h"

// Muon for a stack of matrices, as many at a time as have room: momentum and the sum of squares, division by the norm,
// five iterations of three products each, whose other terms the products add themselves, and the step.

namespace pith::cuda {
namespace {

constexpr int kThreads = 256;

// blockIdx.y is the matrix; a fixed share of its elements for each of gridDim.x blocks.
template <int V> struct Share {
  int64_t begin = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V;
  int64_t step = int64_t(gridDim.x) * kThreads * V;
};

// buf = lerp(buf, g, 1 - momentum), x = lerp(g, buf, momentum) of g = grad scale.
template <int V>
__global__ void blend(const float* grad, float* buf, float* x, int64_t area, float scale,
                      float momentum, float* parts) {
  __shared__ float scratch[32];
  const int64_t matrix = blockIdx.y * area;
  const Share<V> share;
  float squares = 0;
  for (int64_t i = share.begin; i < area; i += share.step) {
    float g[V], b[V];
    load<V>(grad + matrix + i, g);
    load<V>(buf + matrix + i, b);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      g[j] *= scale;
      b[j] += (1 - momentum) * (g[j] - b[j]);
      g[j] += momentum * (b[j] - g[j]);
      squares += g[j] * g[j];
    }
    store<V>(buf + matrix + i, b);
    store<V>(x + matrix + i, g);
  }
  squares = block_sum(squares, scratch);
  if (threadIdx.x == 0) parts[blockIdx.y * kMuonParts + blockIdx.x] = squares;
}

template <int V> __global__ void normalize(float* x, int64_t area, const float* parts) {
  __shared__ float scratch[32];
  const bool has_part = threadIdx.x < gridDim.x;
  const float part = has_part ? parts[blockIdx.y * kMuonParts + threadIdx.x] : 0;
  const float factor = 1 / (sqrtf(block_sum(part, scratch)) + 1e-7f);
  const Share<V> share;
  x += blockIdx.y * area;
  for (int64_t i = share.begin; i < area; i += share.step) {
    float v[V];
    load<V>(x + i, v);
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] *= factor;
    store<V>(x + i, v);
  }
}

template <class T>
void step(const float* update, float* master, T* value, int64_t n, float keep, float rate,
          Stream stream) {
  each(n, stream, [=] __device__(int64_t i) {
    master[i] = master[i] * keep - rate * update[i];
    value[i] = T(master[i]);
  });
}

// See orthogonalize in optimizer.cpp. Returns x or next, where the result lies.
const float* iterate(int64_t count, int64_t r, int64_t c, float* x, float* next, float* gram,
                     float* poly, Stream stream) {
  const bool wide = r <= c;
  const int64_t k = std::min(r, c);
  for (int iteration = 0; iteration < 5; ++iteration) {
    gemm_tf32(!wide, wide, k, k, std::max(r, c), x, x, {1, 0, gram}, gram, count, stream);
    gemm_tf32(false, false, k, k, k, gram, gram, {2.0315f, -4.7750f, gram}, poly, count, stream);
    gemm_tf32(false, false, r, c, k, wide ? poly : x, wide ? x : poly, {1, 3.4445f, x}, next, count,
              stream);
    std::swap(x, next);
  }
  return x;
}

}  // namespace

void muon_update(const Muon& rule, const Tensor& grad, Tensor buf, Tensor master, Tensor value,
                 Tensor work, Stream stream) {
  const int64_t r = grad.dim(grad.rank() - 2), c = grad.dim(grad.rank() - 1), area = r * c;
  if (grad.numel() == 0) return;
  const int64_t batch = grad.numel() / area, slots = work.dim(0), small = std::min(r, c);
  const int64_t of_matrix = (area + 63) / 64 * 64, of_square = (small * small + 63) / 64 * 64;
  float *x = data<float>(work), *next = x + slots * of_matrix, *gram = next + slots * of_matrix,
        *poly = gram + slots * of_square, *parts = poly + slots * of_square;
  const float keep = float(1 - rule.lr * rule.weight_decay),
              rate = float(rule.lr * 0.2 * std::sqrt(double(std::max(r, c))));
  by_vector(value.dtype(), area, {grad, buf, master, value}, [&](auto z, auto v) {
    for (int64_t first = 0; first < batch; first += slots) {
      const int64_t at = first * area, count = std::min(slots, batch - first);
      const dim3 blocks(std::min(blocks_for(area, 4 * kThreads * v), int(kMuonParts)), count);
      launch(blend<v>, {blocks, kThreads}, stream, data<float>(grad) + at, data<float>(buf) + at, x,
             area, rule.grad_scale, rule.momentum, parts);
      launch(normalize<v>, {blocks, kThreads}, stream, x, area, parts);
      step(iterate(count, r, c, x, next, gram, poly, stream), data<float>(master) + at,
           data<decltype(z)>(value) + at, count * area, keep, rate, stream);
    }
  });
}

}  // namespace pith::cuda
