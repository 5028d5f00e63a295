#include "ops/attention.h"
#include "ops/cuda.h"
#include "ops/cuda_helpers.cuh"

// A warp works on one head of one token; its lanes hold the pairs of channels (d, d + half) that are rotated together.

namespace pith::cuda {
namespace {

constexpr int kWarps = 8,
              kMaxPairs = 8;  // pairs of V channels that a lane holds: heads of up to 512 channels

template <class T> struct Call {
  const T *x, *wq, *wk;
  const float *cos, *sin;
  const int* positions;
  int64_t tokens;
  int heads, kv_heads, dim, half;  // half: rotated channels / 2
  float eps;

  __device__ int all_heads() const { return heads + 2 * kv_heads; }
  __device__ bool rotated(int h) const { return h < heads + kv_heads; }
  __device__ const T* weight(int h) const { return h < heads ? wq : rotated(h) ? wk : nullptr; }
};

// Channels of a head in the order of lanes: pair p is channels (p, p + half) of the rotated part, or (p, p + dim / 2 -
// half) of what is behind it: so dim / 2 pairs in all.
template <class T> __device__ int low_of(const Call<T>& c, int p) {
  return p < c.half ? p : p + c.half;
}
template <class T> __device__ int high_of(const Call<T>& c, int p) {
  return p < c.half ? p + c.half : p + c.dim / 2;
}

template <class T, int V, int kPairs> __global__ void forward(Call<T> c, T* y) {
  const int lane = threadIdx.x % 32, pairs = c.dim / 2;
  const int64_t items = c.tokens * c.all_heads();
  for (int64_t item = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; item < items;
       item += int64_t(gridDim.x) * kWarps) {
    const int h = int(item % c.all_heads());
    const int64_t t = item / c.all_heads();
    const T* in = c.x + item * c.dim;
    T* out = y + item * c.dim;
    float a[kPairs][V], b[kPairs][V], squares = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int p = (i * 32 + lane) * V;
      if (p >= pairs) break;
      load<V>(in + low_of(c, p), a[i]);
      load<V>(in + high_of(c, p), b[i]);
#pragma unroll
      for (int v = 0; v < V; ++v) squares += a[i][v] * a[i][v] + b[i][v] * b[i][v];
    }
    const T* w = c.weight(h);
    const float r = w ? 1 / sqrtf(warp_sum(squares) / c.dim + c.eps) : 1;
    const int64_t table = c.rotated(h) ? int64_t(c.positions[t]) * c.half : 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int p = (i * 32 + lane) * V;
      if (p >= pairs) break;
      if (w) {
        float wa[V], wb[V];
        load<V>(w + low_of(c, p), wa);
        load<V>(w + high_of(c, p), wb);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          a[i][v] = rounded<T>(rounded<T>(a[i][v] * r) * wa[v]);
          b[i][v] = rounded<T>(rounded<T>(b[i][v] * r) * wb[v]);
        }
      }
      if (c.rotated(h) && p < c.half) {
        float cos[V], sin[V];
        load<V>(c.cos + table + p, cos);
        load<V>(c.sin + table + p, sin);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float x = a[i][v];
          a[i][v] = x * cos[v] - b[i][v] * sin[v];
          b[i][v] = b[i][v] * cos[v] + x * sin[v];
        }
      }
      store<V>(out + low_of(c, p), a[i]);
      store<V>(out + high_of(c, p), b[i]);
    }
  }
}

// parts [blocks, 2, D]: each block's sums for the weights of q and k.
template <class T, int V, int kPairs>
__global__ void backward(Call<T> c, const T* dy, T* dx, bool add, float* parts) {
  extern __shared__ float sums[];  // [warps][2][D]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, pairs = c.dim / 2;
  const int64_t items = c.tokens * c.all_heads();
  float dw[2][kPairs][2][V] = {};
  for (int64_t item = int64_t(blockIdx.x) * kWarps + warp; item < items;
       item += int64_t(gridDim.x) * kWarps) {
    const int h = int(item % c.all_heads());
    const int64_t t = item / c.all_heads();
    const T *in = c.x + item * c.dim, *g = dy + item * c.dim;
    float a[kPairs][V], b[kPairs][V], da[kPairs][V], db[kPairs][V], squares = 0;
    const int64_t table = c.rotated(h) ? int64_t(c.positions[t]) * c.half : 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int p = (i * 32 + lane) * V;
      if (p >= pairs) break;
      load<V>(in + low_of(c, p), a[i]);
      load<V>(in + high_of(c, p), b[i]);
      load<V>(g + low_of(c, p), da[i]);
      load<V>(g + high_of(c, p), db[i]);
      if (c.rotated(h) && p < c.half) {
        float cos[V], sin[V];
        load<V>(c.cos + table + p, cos);
        load<V>(c.sin + table + p, sin);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float x = da[i][v];
          da[i][v] = x * cos[v] + db[i][v] * sin[v];
          db[i][v] = db[i][v] * cos[v] - x * sin[v];
        }
      }
#pragma unroll
      for (int v = 0; v < V; ++v) squares += a[i][v] * a[i][v] + b[i][v] * b[i][v];
    }
    const T* w = c.weight(h);
    float r = 1, mean = 0;
    if (w) {
      r = 1 / sqrtf(warp_sum(squares) / c.dim + c.eps);
      const bool is_q = h < c.heads;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int p = (i * 32 + lane) * V;
        if (p >= pairs) break;
        float wa[V], wb[V];
        load<V>(w + low_of(c, p), wa);
        load<V>(w + high_of(c, p), wb);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float ga = da[i][v] * rounded<T>(a[i][v] * r),
                      gb = db[i][v] * rounded<T>(b[i][v] * r);
          dw[0][i][0][v] += is_q ? ga : 0;
          dw[0][i][1][v] += is_q ? gb : 0;
          dw[1][i][0][v] += is_q ? 0 : ga;
          dw[1][i][1][v] += is_q ? 0 : gb;
          da[i][v] *= wa[v];
          db[i][v] *= wb[v];
          mean += (da[i][v] * a[i][v] + db[i][v] * b[i][v]) * r;
        }
      }
      mean = warp_sum(mean) * r / c.dim;
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int p = (i * 32 + lane) * V;
      if (p >= pairs) break;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        da[i][v] = r * (da[i][v] - mean * a[i][v]);
        db[i][v] = r * (db[i][v] - mean * b[i][v]);
      }
      store<V>(dx + item * c.dim + low_of(c, p), da[i], add);
      store<V>(dx + item * c.dim + high_of(c, p), db[i], add);
    }
  }
#pragma unroll
  for (int which = 0; which < 2; ++which)
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int p = (i * 32 + lane) * V;
      if (p >= pairs) break;
      float* to = sums + (warp * 2 + which) * c.dim;
      store<V>(to + low_of(c, p), dw[which][i][0]);
      store<V>(to + high_of(c, p), dw[which][i][1]);
    }
  __syncthreads();
  for (int j = threadIdx.x; j < 2 * c.dim; j += blockDim.x) {
    float sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += sums[i * 2 * c.dim + j];
    parts[int64_t(blockIdx.x) * 2 * c.dim + j] = sum;
  }
}

// Calls f(call, V, pairs of V channels that a lane holds): V is 2 where the halves of a head are even.
template <class F> bool with_call(const QkNormRope& q, F f) {
  const AttentionShape& s = q.shape;
  const int half = int(q.rope.cos.dim(1));
  if (s.head_dim > 64 * kMaxPairs || s.head_dim % 2) return false;
  by_float_on_device(q.qkv.dtype(), [&](auto z) {
    using T = decltype(z);
    if constexpr (sizeof(T) < 8) {
      const auto weight = [](const Param* p) { return p ? data<const T>(p->value) : nullptr; };
      const Call<T> call{data<const T>(q.qkv),
                         weight(q.q_norm),
                         weight(q.k_norm),
                         data<const float>(q.rope.cos),
                         data<const float>(q.rope.sin),
                         data<const int>(q.positions),
                         q.qkv.dim(0),
                         int(s.heads),
                         int(s.kv_heads),
                         int(s.head_dim),
                         half,
                         q.eps};
      const auto held = [&](auto v) {
        if (s.head_dim <= 64 * v)
          f(call, v, std::integral_constant<int, 1>());
        else
          f(call, v, std::integral_constant<int, kMaxPairs>());
      };
      if (half % 2 == 0 && s.head_dim % 4 == 0)
        held(std::integral_constant<int, 2>());
      else
        held(std::integral_constant<int, 1>());
    }
  });
  return true;
}

}  // namespace

bool qk_norm_rope(const QkNormRope& q, Tensor y, Stream stream) {
  if (y.numel() == 0) return true;
  return with_call(q, [&]<class T>(const Call<T>& call, auto v, auto pairs) {
    const int64_t items = q.qkv.numel() / q.shape.head_dim;
    forward<T, v, pairs><<<blocks_for(items, kWarps), 32 * kWarps, 0, stream>>>(call, data<T>(y));
    check(cudaGetLastError());
  });
}

bool qk_norm_rope_backward(const QkNormRope& q, const Tensor& dy, Op::Into dx, Op::Into dw_q,
                           Op::Into dw_k, Tensor parts, Stream stream) {
  const int dim = int(q.shape.head_dim);
  const bool fits = with_call(q, [&]<class T>(const Call<T>& call, auto v, auto pairs) {
    backward<T, v, pairs>
        <<<int(kRopeParts), 32 * kWarps, kWarps * 2 * dim * sizeof(float), stream>>>(
            call, data<const T>(dy), data<T>(dx.tensor), dx.add, data<float>(parts));
    check(cudaGetLastError());
  });
  // The two columns of parts side by side: [parts, 2, D].
  for (int which = 0; which < 2; ++which)
    if (const Op::Into& dw = which ? dw_k : dw_q; fits && dw)
      sum_parts(data<const float>(parts) + which * dim, int(kRopeParts), dim, 2 * dim,
                data<float>(dw.tensor), dw.add, stream);
  return fits;
}

}  // namespace pith::cuda
