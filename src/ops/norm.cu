#include "ops/cuda.h"
#include "ops/cuda_helpers.cuh"

// A block of threads holds a row in registers: one pass over memory.

namespace pith::cuda {
namespace {

template <int V, int kPieces, class T>
__global__ void forward(const T* x, const T* delta, const T* w, T* y, T* sum, float* rstd, int h,
                        float eps) {
  __shared__ float scratch[32];
  const int64_t row = int64_t(blockIdx.x) * h;
  float v[kPieces][V], squares = 0;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int j = (p * blockDim.x + threadIdx.x) * V;
    if (j >= h) break;
    load<V>(x + row + j, v[p]);
    if (delta) {
      float d[V];
      load<V>(delta + row + j, d);
#pragma unroll
      for (int i = 0; i < V; ++i) v[p][i] = rounded<T>(v[p][i] + d[i]);
      store<V>(sum + row + j, v[p]);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) squares += v[p][i] * v[p][i];
  }
  const float r = 1 / sqrtf(block_sum(squares, scratch) / h + eps);
  if (threadIdx.x == 0) rstd[blockIdx.x] = r;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int j = (p * blockDim.x + threadIdx.x) * V;
    if (j >= h) break;
    float weight[V];
    load<V>(w + j, weight);
#pragma unroll
    for (int i = 0; i < V; ++i) v[p][i] = rounded<T>(v[p][i] * r) * weight[i];
    store<V>(y + row + j, v[p]);
  }
}

template <class T> struct Gradient {
  T* to;
  bool add;
};

// See the CPU kernel for the formula. Every block sums dw over its rows in registers.
template <int V, int kPieces, class T>
__global__ void backward(const T* x, const T* dy, const T* dsum, const T* w, const float* rstd,
                         Gradient<T> dx, Gradient<T> ddelta, float* parts, int rows, int h) {
  __shared__ float scratch[32];
  float dw[kPieces][V] = {};
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const int64_t row = r * h;
    const float scale = rstd[r];
    float v[kPieces][V], g[kPieces][V], dot = 0;
    Pack<V, T> extra[kPieces];
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int j = (p * blockDim.x + threadIdx.x) * V;
      if (j >= h) break;
      float weight[V];
      load<V>(x + row + j, v[p]);
      load<V>(dy + row + j, g[p]);
      if (dsum) extra[p] = *reinterpret_cast<const Pack<V, T>*>(dsum + row + j);
      load<V>(w + j, weight);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float n = v[p][i] * scale;
        dw[p][i] += g[p][i] * rounded<T>(n);
        g[p][i] *= weight[i];
        dot += g[p][i] * n;
      }
    }
    const float mean = scale * scale * block_sum(dot, scratch) / h;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int j = (p * blockDim.x + threadIdx.x) * V;
      if (j >= h) break;
#pragma unroll
      for (int i = 0; i < V; ++i)
        g[p][i] = g[p][i] * scale - v[p][i] * mean + (dsum ? float(extra[p].at[i]) : 0);
      if (dx.to) store<V>(dx.to + row + j, g[p], dx.add);
      if (ddelta.to) store<V>(ddelta.to + row + j, g[p], ddelta.add);
    }
  }
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int j = (p * blockDim.x + threadIdx.x) * V;
    if (j < h) store<V>(parts + int64_t(blockIdx.x) * h + j, dw[p]);
  }
}

// f(pieces of V elements that a thread holds, threads): whole warps that hold a row of h elements.
template <class F> void by_pieces(int h, auto v, F f) {
  const int threads = blocks_for(h, v);
  const auto whole_warps = [](int n) { return (n + 31) / 32 * 32; };
  if (threads > 4096) fail("rows of {} are too long for the CUDA norm", h);
  if (threads <= 512)
    f(std::integral_constant<int, 1>(), whole_warps(threads));
  else
    f(std::integral_constant<int, 4>(), whole_warps((threads + 3) / 4));
}

// A warp's lanes are columns, the warps of a block take turns at the rows.
__global__ void column_sums(const float* parts, int rows, int n, int stride, float* out, bool add) {
  __shared__ float sums[32][33];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, j = blockIdx.x * 32 + lane;
  float sum = 0;
  if (j < n)
    for (int r = warp; r < rows; r += 32) sum += parts[int64_t(r) * stride + j];
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || j >= n) return;
  for (int w = 1; w < 32; ++w) sum += sums[w][lane];
  out[j] = (add ? out[j] : 0) + sum;
}

}  // namespace

void sum_parts(const float* parts, int rows, int n, int stride, float* out, bool add,
               cudaStream_t stream) {
  column_sums<<<blocks_for(n, 32), 1024, 0, stream>>>(parts, rows, n, stride, out, add);
  check(cudaGetLastError());
}

void add_rms_norm(const Tensor& x, const Tensor& delta, const Tensor& w, Tensor y, Tensor sum,
                  Tensor rstd, float eps, Stream stream) {
  const int rows = int(x.dim(0)), h = int(x.dim(1));
  if (rows == 0) return;
  by_vector(x.dtype(), h, {x, delta, w, y, sum}, [&](auto z, auto v) {
    using T = decltype(z);
    by_pieces(h, v, [&](auto pieces, int threads) {
      forward<v, pieces><<<rows, threads, 0, stream>>>(
          data<const T>(x), delta ? data<const T>(delta) : nullptr, data<const T>(w), data<T>(y),
          data<T>(sum), data<float>(rstd), h, eps);
    });
    check(cudaGetLastError());
  });
}

void add_rms_norm_backward(const Tensor& sum, const Tensor& dy, const Tensor& dsum, const Tensor& w,
                           const Tensor& rstd, Op::Into dx, Op::Into ddelta, Op::Into dw,
                           Tensor parts, Stream stream) {
  const int rows = int(sum.dim(0)), h = int(sum.dim(1));
  by_vector(sum.dtype(), h, {sum, dy, dsum, w, dx.tensor, ddelta.tensor}, [&](auto z, auto v) {
    using T = decltype(z);
    const auto into = [](const Op::Into& g) {
      return Gradient<T>{g ? data<T>(g.tensor) : nullptr, g.add};
    };
    if (rows > 0)
      by_pieces(h, v, [&](auto pieces, int threads) {
        backward<v, pieces><<<int(parts.dim(0)), threads, 0, stream>>>(
            data<const T>(sum), data<const T>(dy), dsum ? data<const T>(dsum) : nullptr,
            data<const T>(w), data<const float>(rstd), into(dx), into(ddelta), data<float>(parts),
            rows, h);
      });
    check(cudaGetLastError());
  });
  if (dw)
    sum_parts(data<const float>(parts), int(parts.dim(0)), h, h, data<float>(dw.tensor), dw.add,
              stream);
}

}  // namespace pith::cuda
