#include "ops/cuda.h"
#include "ops/cuda_helpers.cuh"

namespace pith::cuda {
namespace {

// A fixed share of the elements for each block, so that the order of additions does not change.
__global__ void squares(const float* g, int64_t n, double* parts) {
  __shared__ double scratch[8];
  double sum = 0;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n / 4;
       i += int64_t(gridDim.x) * blockDim.x) {
    const float4 v = reinterpret_cast<const float4*>(g)[i];
    sum += double(v.x * v.x) + double(v.y * v.y) + double(v.z * v.z) + double(v.w * v.w);
  }
  if (blockIdx.x == 0 && threadIdx.x < n % 4)
    sum += double(g[n - 1 - threadIdx.x]) * double(g[n - 1 - threadIdx.x]);
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < 8; ++w) sum += scratch[w];
  parts[blockIdx.x] = sum;
}

__global__ void sum_squares(const double* parts, int n, double* out) {
  double sum = 0;
  for (int i = threadIdx.x; i < n; i += 32) sum += parts[i];
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (threadIdx.x == 0) *out = sum;
}

struct Rates {
  float lr, b1, b2, eps, decay, grad_scale, m_scale, v_scale;
};

template <int V, class T>
__global__ void adamw(const Rates r, int64_t n, const float* grad, float* m, float* v,
                      float* master, T* value) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (i >= n) return;
  float g[V], first[V], second[V], w[V];
  load<V>(grad + i, g);
  load<V>(m + i, first);
  load<V>(v + i, second);
  load<V>(master + i, w);
#pragma unroll
  for (int x = 0; x < V; ++x) {
    const float scaled = g[x] * r.grad_scale;
    first[x] = r.b1 * first[x] + (1 - r.b1) * scaled;
    second[x] = r.b2 * second[x] + (1 - r.b2) * scaled * scaled;
    const float step = first[x] * r.m_scale / (sqrtf(second[x]) * r.v_scale + r.eps);
    w[x] -= r.lr * (step + r.decay * w[x]);
  }
  store<V>(m + i, first);
  store<V>(v + i, second);
  store<V>(master + i, w);
  store<V>(value + i, w);
}

}  // namespace

void sum_of_squares(const Tensor& g, Tensor parts, Tensor out, Stream stream) {
  squares<<<int(kSquareParts), 256, 0, stream>>>(data<const float>(g), g.numel(),
                                                 data<double>(parts));
  sum_squares<<<1, 32, 0, stream>>>(data<const double>(parts), int(kSquareParts),
                                    data<double>(out));
  check(cudaGetLastError());
}

void adamw_update(const AdamW& rule, const Tensor& grad, Tensor m, Tensor v, Tensor master,
                  Tensor value, Stream stream) {
  const int64_t n = grad.numel();
  if (n == 0) return;
  const Rates r{float(rule.lr),
                float(rule.beta1),
                float(rule.beta2),
                float(rule.eps),
                float(rule.weight_decay),
                float(rule.grad_scale),
                float(1 / (1 - std::pow(rule.beta1, double(rule.step)))),
                float(1 / std::sqrt(1 - std::pow(rule.beta2, double(rule.step))))};
  by_vector(value.dtype(), n, {grad, m, v, master, value}, [&](auto z, auto width) {
    using T = decltype(z);
    adamw<width, T><<<blocks_for(n, 256 * width), 256, 0, stream>>>(
        r, n, data<const float>(grad), data<float>(m), data<float>(v), data<float>(master),
        data<T>(value));
    check(cudaGetLastError());
  });
}

}  // namespace pith::cuda
