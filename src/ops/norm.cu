#include "core/cuda_helpers.cuh"
#include "ops/cuda.h"

// A block of threads holds a row in registers, in pieces of V elements: one pass over memory.

namespace pith::cuda {
namespace {

// f(p, j) for each piece p of this thread, which begins at column j of a row of h elements.
template <int V, int kPieces, class F> __device__ void for_pieces(int h, F f) {
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int j = (p * blockDim.x + threadIdx.x) * V;
    if (j >= h) break;
    f(p, j);
  }
}

template <int V, int kPieces, class T>
__global__ void forward(const T* x, const T* delta, const T* w, T* y, T* sum, float* rstd, int h,
                        float eps) {
  __shared__ float scratch[32];
  const int64_t row = int64_t(blockIdx.x) * h;
  float v[kPieces][V], squares = 0;
  for_pieces<V, kPieces>(h, [&](int p, int j) {
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
  });
  const float r = 1 / sqrtf(block_sum(squares, scratch) / h + eps);
  if (threadIdx.x == 0) rstd[blockIdx.x] = r;
  for_pieces<V, kPieces>(h, [&](int p, int j) {
    float weight[V];
    load<V>(w + j, weight);
#pragma unroll
    for (int i = 0; i < V; ++i) v[p][i] = rounded<T>(v[p][i] * r) * weight[i];
    store<V>(y + row + j, v[p]);
  });
}

// See the CPU kernel for the formula. Every block sums dw over its rows in registers.
template <int V, int kPieces, class T>
__global__ void backward(const T* x, const T* dy, const T* dsum, const T* w, const float* rstd,
                         T* dx, bool add_dx, T* ddelta, bool add_ddelta, float* parts, int rows,
                         int h) {
  __shared__ float scratch[32];
  float dw[kPieces][V] = {};
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const int64_t row = r * h;
    const float scale = rstd[r];
    float v[kPieces][V], g[kPieces][V], dot = 0;
    Pack<V, T> extra[kPieces];
    for_pieces<V, kPieces>(h, [&](int p, int j) {
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
    });
    const float mean = scale * scale * block_sum(dot, scratch) / h;
    for_pieces<V, kPieces>(h, [&](int p, int j) {
#pragma unroll
      for (int i = 0; i < V; ++i)
        g[p][i] = g[p][i] * scale - v[p][i] * mean + (dsum ? float(extra[p].at[i]) : 0);
      if (dx) store<V>(dx + row + j, g[p], add_dx);
      if (ddelta) store<V>(ddelta + row + j, g[p], add_ddelta);
    });
  }
  for_pieces<V, kPieces>(
      h, [&](int p, int j) { store<V>(parts + int64_t(blockIdx.x) * h + j, dw[p]); });
}

// f(pieces of V elements that a thread holds, threads): whole warps that hold a row of h elements.
template <class F> void by_pieces(int h, auto v, F f) {
  if (h > 4096 * v) fail("rows of {} are too long for the CUDA norm", h);
  if (h <= 512 * v)
    f(std::integral_constant<int, 1>(), blocks_for(h, 32 * v) * 32);
  else
    f(std::integral_constant<int, 4>(), blocks_for(h, 128 * v) * 32);
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

void sum_parts(const Tensor& parts, int rows, int stride, int first, Op::Into out, Stream stream) {
  const int64_t n = out.tensor.numel();
  launch(column_sums, {blocks_for(n, 32), 1024}, stream, data<const float>(parts) + first, rows, n,
         stride, out.tensor, out.add);
}

void add_rms_norm(const Tensor& x, const Tensor& delta, const Tensor& w, const AddNorm& out,
                  Tensor rstd, float eps, Stream stream) {
  const int rows = int(x.dim(0)), h = int(x.dim(1));
  by_vector(x.dtype(), h, {x, delta, w, out.y, out.sum}, [&](auto z, auto v) {
    by_pieces(h, v, [&](auto pieces, int threads) {
      launch(forward<v, pieces, decltype(z)>, {unsigned(rows), threads}, stream, x, delta, w, out.y,
             out.sum, rstd, h, eps);
    });
  });
}

void add_rms_norm_backward(const Tensor& sum, const Tensor& dy, const Tensor& dsum, const Tensor& w,
                           const Tensor& rstd, Op::Into dx, Op::Into ddelta, Op::Into dw,
                           Tensor parts, Stream stream) {
  const int count = int(parts.dim(0)), h = int(sum.dim(1));
  by_vector(sum.dtype(), h, {sum, dy, dsum, w, dx.tensor, ddelta.tensor}, [&](auto z, auto v) {
    by_pieces(h, v, [&](auto pieces, int threads) {
      launch(backward<v, pieces, decltype(z)>, {unsigned(count), threads}, stream, sum, dy, dsum, w,
             rstd, dx.tensor, dx.add, ddelta.tensor, ddelta.add, parts, sum.dim(0), h);
    });
  });
  if (dw) sum_parts(parts, count, h, 0, dw, stream);
}

}  // namespace pith::cuda
