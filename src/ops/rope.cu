#include "ops/attention.h"
#include "ops/cuda.h"
#include "ops/cuda_helpers.cuh"

// A group of lanes works on one head of one token; each holds the pairs of channels (d, d + half) that are rotated
// together.

namespace pith::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kMaxPairs = 8;  // that a lane holds of V channels each: heads of up to 512 channels

template <class T> struct Call {
  const T* __restrict__ x;
  const T *wq, *wk;
  const float *cos, *sin;
  const int* positions;
  int64_t tokens;
  int heads, kv_heads, dim, half;  // half: rotated channels / 2
  float eps;
  int lanes;  // of a group, a power of two

  __device__ int all_heads() const { return heads + 2 * kv_heads; }
  __device__ bool rotated(int h) const { return h < heads + kv_heads; }
  __device__ const T* weight(int h) const { return h < heads ? wq : rotated(h) ? wk : nullptr; }
  // Channels of a head in the order of lanes: pair p is channels (p, p + half) of the rotated part, or (p, p + dim / 2
  // - half) of what is behind it: so dim / 2 pairs in all.
  __device__ int low_of(int p) const { return p < half ? p : p + half; }
  __device__ int high_of(int p) const { return p < half ? p + half : p + dim / 2; }
  __device__ float group_sum(float x) const {
    for (int d = lanes / 2; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
    return x;
  }
};

// What a lane holds of a head.
template <class T, int V, int kPairs> struct Pieces {
  Pack<V, T> low[kPairs], high[kPairs];

  // From where channel 0 of the head lies; nothing of a head that is not there.
  __device__ void read(const Call<T>& c, const T* head, int lane, bool real) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int p = (i * c.lanes + lane) * V;
      if (!real || p >= c.dim / 2) break;
      low[i] = *reinterpret_cast<const Pack<V, T>*>(head + c.low_of(p));
      high[i] = *reinterpret_cast<const Pack<V, T>*>(head + c.high_of(p));
    }
  }
};

// Of one token: the factors of the pairs that a lane holds; what is not rotated has 1 and 0.
template <class T, int V, int kPairs> struct Turn {
  float cos[kPairs][V], sin[kPairs][V];

  __device__ Turn(const Call<T>& c, int64_t t, int lane) {
    const int64_t row = int64_t(c.positions[t]) * c.half;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int p = (i * c.lanes + lane) * V;
      for (int v = 0; v < V; ++v) cos[i][v] = 1, sin[i][v] = 0;
      if (p < c.half) load<V>(c.cos + row + p, cos[i]), load<V>(c.sin + row + p, sin[i]);
    }
  }
  // `sign` -1 turns back.
  __device__ void apply(int i, float sign, float (&a)[V], float (&b)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float x = a[v], s = sign * sin[i][v];
      a[v] = x * cos[i][v] - b[v] * s;
      b[v] = b[v] * cos[i][v] + x * s;
    }
  }
};

// A group of lanes works on two heads of a token.
template <int V, int kPairs, class T> __global__ void forward(const Call<T> c, T* y) {
  const int lane = threadIdx.x % c.lanes, heads = c.all_heads(), twos = (heads + 1) / 2;
  const int64_t item = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / c.lanes, t = item / twos;
  const int h0 = int(item % twos) * 2;
  Pieces<T, V, kPairs> x[2];
  for (int u = 0; u < 2; ++u)
    x[u].read(c, c.x + (t * heads + h0 + u) * c.dim, lane, t < c.tokens && h0 + u < heads);
  const Turn<T, V, kPairs> turn(c, min(t, c.tokens - 1), lane);
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    const int h = h0 + u;
    float a[kPairs][V], b[kPairs][V], squares = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if ((i * c.lanes + lane) * V >= c.dim / 2) break;
      load<V>(x[u].low[i].at, a[i]);
      load<V>(x[u].high[i].at, b[i]);
#pragma unroll
      for (int v = 0; v < V; ++v) squares += a[i][v] * a[i][v] + b[i][v] * b[i][v];
    }
    const float r = 1 / sqrtf(c.group_sum(squares) / c.dim + c.eps);
    const T* weight = c.weight(h);
    T* out = y + (t * heads + h) * c.dim;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int p = (i * c.lanes + lane) * V;
      if (t >= c.tokens || h >= heads || p >= c.dim / 2) break;
      if (weight) {
        float wa[V], wb[V];
        load<V>(weight + c.low_of(p), wa);
        load<V>(weight + c.high_of(p), wb);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          a[i][v] = rounded<T>(rounded<T>(a[i][v] * r) * wa[v]);
          b[i][v] = rounded<T>(rounded<T>(b[i][v] * r) * wb[v]);
        }
      }
      if (c.rotated(h)) turn.apply(i, 1, a[i], b[i]);
      store<V>(out + c.low_of(p), a[i]);
      store<V>(out + c.high_of(p), b[i]);
    }
  }
}

// parts [blocks, 2, D]: each block's sums for the weights of q and k. All heads of q, then those of k, then those of v.
template <int V, int kPairs, class T>
__global__ void __launch_bounds__(32 * kWarps, kPairs == 1 ? 2 : 1)
    backward(const Call<T> c, const T* dy, T* dx, bool add, float* parts) {
  extern __shared__ float sums[];  // [groups of the block][2][D]
  const int groups = 32 / c.lanes, lane = threadIdx.x % c.lanes,
            group = threadIdx.x % 32 / c.lanes, heads = c.all_heads();
  const int end_of[] = {c.heads, c.heads + c.kv_heads, heads};
#pragma unroll 1
  for (int which = 0, begin = 0; which < 3; begin = end_of[which++]) {
    const int end = end_of[which];
    const T* weight = c.weight(begin);
    float dw[kPairs][2][V] = {};
    for (int64_t t = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; t < c.tokens;
         t += int64_t(gridDim.x) * kWarps) {
      const Turn<T, V, kPairs> turn(c, t, lane);
      for (int first = begin; first < end; first += groups) {
        const int h = first + group;
        const int64_t at = (t * heads + h) * c.dim;
        Pieces<T, V, kPairs> x, g;
        g.read(c, dy + at, lane, h < end);
        x.read(c, c.x + at, lane, h < end && weight);
        float a[kPairs][V], b[kPairs][V], da[kPairs][V], db[kPairs][V], squares = 0;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          if (h >= end || (i * c.lanes + lane) * V >= c.dim / 2) break;
          load<V>(x.low[i].at, a[i]);
          load<V>(x.high[i].at, b[i]);
          load<V>(g.low[i].at, da[i]);
          load<V>(g.high[i].at, db[i]);
          if (which < 2) turn.apply(i, -1, da[i], db[i]);
#pragma unroll
          for (int v = 0; v < V; ++v) squares += a[i][v] * a[i][v] + b[i][v] * b[i][v];
        }
        const float r = 1 / sqrtf(c.group_sum(squares) / c.dim + c.eps);
        float mean = 0;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          const int p = (i * c.lanes + lane) * V;
          if (h >= end || p >= c.dim / 2 || !weight) break;
          float wa[V], wb[V];
          load<V>(weight + c.low_of(p), wa);
          load<V>(weight + c.high_of(p), wb);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            dw[i][0][v] += da[i][v] * rounded<T>(a[i][v] * r);
            dw[i][1][v] += db[i][v] * rounded<T>(b[i][v] * r);
            da[i][v] *= wa[v];
            db[i][v] *= wb[v];
            mean += (da[i][v] * a[i][v] + db[i][v] * b[i][v]) * r;
          }
        }
        mean = c.group_sum(mean) * r / c.dim;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          const int p = (i * c.lanes + lane) * V;
          if (h >= end || p >= c.dim / 2) break;
#pragma unroll
          for (int v = 0; weight && v < V; ++v) {
            da[i][v] = r * (da[i][v] - mean * a[i][v]);
            db[i][v] = r * (db[i][v] - mean * b[i][v]);
          }
          store<V>(dx + at + c.low_of(p), da[i], add);
          store<V>(dx + at + c.high_of(p), db[i], add);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int p = (i * c.lanes + lane) * V;
      if (p >= c.dim / 2 || which == 2) break;
      float* to = sums + (threadIdx.x / c.lanes * 2 + which) * c.dim;
      store<V>(to + c.low_of(p), dw[i][0]);
      store<V>(to + c.high_of(p), dw[i][1]);
    }
  }
  __syncthreads();
  for (int j = threadIdx.x; j < 2 * c.dim; j += blockDim.x) {
    float sum = 0;
    for (int i = 0; i < kWarps * groups; ++i) sum += sums[i * 2 * c.dim + j];
    parts[int64_t(blockIdx.x) * 2 * c.dim + j] = sum;
  }
}

// Calls f(call, V, pairs of V channels that a lane holds): 8 and 1 where the halves of a head are whole 16-byte pieces.
template <class F> bool with_call(const QkNormRope& q, F f) {
  const AttentionShape& s = q.shape;
  const int half = int(q.rope.cos.dim(1)), pairs = int(s.head_dim / 2);
  if (s.head_dim > 64 * kMaxPairs || s.head_dim % 2) return false;
  by_float_on_device(q.qkv.dtype(), [&](auto z) {
    using T = decltype(z);
    if constexpr (sizeof(T) < 8) {
      const auto weight = [](const Param* p) { return p ? data<const T>(p->value) : nullptr; };
      Call<T> call{data<const T>(q.qkv),
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
                   q.eps,
                   32};
      if (half % 8 == 0 && pairs % 8 == 0 && pairs <= 256) {
        call.lanes = int(std::bit_ceil(unsigned(pairs / 8)));
        f(call, std::integral_constant<int, 8>(), std::integral_constant<int, 1>());
      } else {
        f(call, std::integral_constant<int, 1>(), std::integral_constant<int, kMaxPairs>());
      }
    }
  });
  return true;
}

}  // namespace

bool qk_norm_rope(const QkNormRope& q, Tensor y, Stream stream) {
  if (y.numel() == 0) return true;
  return with_call(q, [&]<class T>(const Call<T>& call, auto v, auto pairs) {
    const int64_t items = call.tokens * ((call.heads + 2 * call.kv_heads + 1) / 2);
    forward<v, pairs>
        <<<blocks_for(items * call.lanes, 32 * kWarps), 32 * kWarps, 0, stream>>>(call, data<T>(y));
    check(cudaGetLastError());
  });
}

bool qk_norm_rope_backward(const QkNormRope& q, const Tensor& dy, Op::Into dx, Op::Into dw_q,
                           Op::Into dw_k, Tensor parts, Stream stream) {
  const int dim = int(q.shape.head_dim);
  const bool fits = with_call(q, [&]<class T>(const Call<T>& call, auto v, auto pairs) {
    const size_t shared = kWarps * 32 / call.lanes * 2 * dim * sizeof(float);
    backward<v, pairs><<<int(kRopeParts), 32 * kWarps, shared, stream>>>(
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
