#include "core/cuda_helpers.cuh"
#include "core/param.h"
#include "ops/cuda.h"

namespace pith::cuda {
namespace {

// A fixed share of the elements for each block, so that the order of additions does not change.
template <int V, class T> __global__ void squares(const T* g, int64_t n, double* parts) {
  double sum = 0;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V; i < n;
       i += int64_t(gridDim.x) * blockDim.x * V) {
    float v[V];
    load<V>(g + i, v);
#pragma unroll
    for (int x = 0; x < V; ++x) sum += double(v[x] * v[x]);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// By one warp.
__device__ double sum_of(const double* parts, int n) {
  double sum = 0;
  for (int i = threadIdx.x; i < n; i += 32) sum += parts[i];
  return warp_sum(sum);
}

__global__ void sum_squares(const double* parts, int n, double* out) {
  const double sum = sum_of(parts, n);
  if (threadIdx.x == 0) *out = sum;
}

__global__ void clip(const double* squares, int n, double labels, double most, double* out) {
  const double norm = sqrt(sum_of(squares, n)) / labels;
  out[0] = norm;
  out[1] = (most > 0 ? fmin(1.0, most / (norm + 1e-6)) : 1.0) / labels;
}

struct Rates {
  float lr, b1, b2, eps, decay, m_scale, v_scale;
};

// rest is null where T is the master dtype.
template <int V, class G, class T>
__global__ void adamw(const Rates r, const double* norm, int64_t n, const G* grad, float* m,
                      float* v, T* value, uint16_t* rest) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (i >= n || !isfinite(norm[0])) return;
  const float scale = float(norm[1]);
  float g[V], first[V], second[V], w[V];
  load<V>(grad + i, g);
  load<V>(m + i, first);
  load<V>(v + i, second);
  const auto before = *reinterpret_cast<const Pack<V, T>*>(value + i);
  Pack<V, uint16_t> low;
  if (rest) low = *reinterpret_cast<const Pack<V, uint16_t>*>(rest + i);
#pragma unroll
  for (int x = 0; x < V; ++x) {
    if constexpr (sizeof(T) == 2)
      w[x] = pith::join_master(reinterpret_cast<const uint16_t&>(before.at[x]), low.at[x]);
    else
      w[x] = before.at[x];
    const float scaled = g[x] * scale;
    first[x] = r.b1 * first[x] + (1 - r.b1) * scaled;
    second[x] = r.b2 * second[x] + (1 - r.b2) * scaled * scaled;
    const float step = first[x] * r.m_scale / (sqrtf(second[x]) * r.v_scale + r.eps);
    w[x] -= r.lr * (step + r.decay * w[x]);
    const T rounded = T(w[x]);
    if constexpr (sizeof(T) == 2)
      low.at[x] = rest_of_master(w[x], reinterpret_cast<const uint16_t&>(rounded));
  }
  store<V>(m + i, first);
  store<V>(v + i, second);
  store<V>(value + i, w);
  if (rest) *reinterpret_cast<Pack<V, uint16_t>*>(rest + i) = low;
}

}  // namespace

void sum_of_squares(const Tensor& g, Tensor parts, Tensor out, Stream stream) {
  by_vector(g.dtype(), g.numel(), {g}, [&](auto z, auto v) {
    launch(squares<v, decltype(z)>, {kSquareParts, 256}, stream, g, g.numel(), parts);
  });
  launch(sum_squares, {1, 32}, stream, parts, kSquareParts, out);
}

void clip_by_norm(const Tensor& squares, double labels, double clip_norm, Tensor norm,
                  Stream stream) {
  launch(clip, {1, 32}, stream, squares, squares.numel(), labels, clip_norm, norm);
}

void adamw_update(const AdamW& rule, const Tensor& norm, const Tensor& grad, Tensor m, Tensor v,
                  Tensor value, Tensor rest, Stream stream) {
  const int64_t n = grad.numel();
  const double m_scale = 1 / (1 - std::pow(rule.beta1, double(rule.step))),
               v_scale = 1 / std::sqrt(1 - std::pow(rule.beta2, double(rule.step)));
  const Rates r(float(rule.lr), float(rule.beta1), float(rule.beta2), float(rule.eps),
                float(rule.weight_decay), float(m_scale), float(v_scale));
  by_vector(value.dtype(), n, {grad, m, v, value, rest}, [&](auto z, auto width) {
    by_float_on_device(grad.dtype(), [&](auto g) {
      launch(adamw<width, decltype(g), decltype(z)>, {blocks_for(n, 256 * width), 256}, stream, r,
             norm, n, grad, m, v, value, rest);
    });
  });
}

}  // namespace pith::cuda
