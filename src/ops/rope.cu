#include "core/cuda_helpers.cuh"
#include "ops/attention.h"
#include "ops/cuda.h"

// A group of lanes works on one head of one token; each holds the pairs of channels (d, d + half) that are rotated
// together.

namespace pith::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kMaxPairs = 8;  // that a lane holds of V channels each: heads of up to 512 channels

template <class T> struct Call {
  const T *x, *wq, *wk;
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
  template <int V, class X>
  __device__ void load_pair(const X* from, int p, float (&to)[2][V]) const {
    load<V>(from + low_of(p), to[0]);
    load<V>(from + high_of(p), to[1]);
  }
  template <int V, class X>
  __device__ void store_pair(X* to, int p, const float (&from)[2][V], bool add = false) const {
    store<V>(to + low_of(p), from[0], add);
    store<V>(to + high_of(p), from[1], add);
  }
  __device__ float group_sum(float x) const {
    for (int d = lanes / 2; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
    return x;
  }
};

// Rotates pair p; `sign` -1 rotates back.
template <class T, int V>
__device__ void rotate(const Call<T>& c, int64_t table, int p, float sign, float (&to)[2][V]) {
  float cos[V], sin[V];
  load<V>(c.cos + table + p, cos);
  load<V>(c.sin + table + p, sin);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const float a = to[0][v], b = to[1][v], s = sign * sin[v];
    to[0][v] = a * cos[v] - b * s;
    to[1][v] = b * cos[v] + a * s;
  }
}

// One head of one token as a group of lanes sees it. Past the last item nothing is loaded or stored, but the lanes take
// part in the sums.
template <class T> struct Item {
  bool real;
  int h;
  int64_t at, table;  // element of the head; row of the tables
  const T* weight;

  __device__ Item(const Call<T>& c, int64_t item)
      : real(item < c.tokens * c.all_heads()),
        h(int(item % c.all_heads())),
        at(item * c.dim),
        table(real && c.rotated(h) ? int64_t(c.positions[item / c.all_heads()]) * c.half : 0),
        weight(c.weight(h)) {}
  __device__ bool rotated(const Call<T>& c, int p) const { return c.rotated(h) && p < c.half; }
};

// f(i, p) for the pairs p, from p on V of them, that this lane holds, if any.
template <int V, int kPairs, class T, class F>
__device__ void for_pairs(const Call<T>& c, bool any, F f) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int p = (i * c.lanes + (threadIdx.x & (c.lanes - 1))) * V;
    if (!any || p >= c.dim / 2) break;
    f(i, p);
  }
}

template <int V, int kPairs, class T> __global__ void forward(const Call<T> c, T* y) {
  const Item<T> item(c, int64_t(blockIdx.x) * (kWarps * 32 / c.lanes) + threadIdx.x / c.lanes);
  float x[kPairs][2][V], squares = 0;
  for_pairs<V, kPairs>(c, item.real, [&](int i, int p) {
    c.load_pair(c.x + item.at, p, x[i]);
#pragma unroll
    for (int v = 0; v < V; ++v) squares += x[i][0][v] * x[i][0][v] + x[i][1][v] * x[i][1][v];
  });
  const float r = 1 / sqrtf(c.group_sum(squares) / c.dim + c.eps);
  for_pairs<V, kPairs>(c, item.real, [&](int i, int p) {
    if (item.weight) {
      float w[2][V];
      c.load_pair(item.weight, p, w);
#pragma unroll
      for (int v = 0; v < 2 * V; ++v) {
        float& to = x[i][v / V][v % V];
        to = rounded<T>(rounded<T>(to * r) * w[v / V][v % V]);
      }
    }
    if (item.rotated(c, p)) rotate(c, item.table, p, 1, x[i]);
    c.store_pair(y + item.at, p, x[i]);
  });
}

// parts [blocks, 2, D]: each block's sums for the weights of q and k.
template <int V, int kPairs, class T>
__global__ void backward(const Call<T> c, const T* dy, T* dx, bool add, float* parts) {
  extern __shared__ float sums[];  // [groups of the block][2][D]
  const int groups = kWarps * 32 / c.lanes, group = threadIdx.x / c.lanes;
  float dw[2][kPairs][2][V] = {};
  const int64_t items = c.tokens * c.all_heads();
  for (int64_t first = int64_t(blockIdx.x) * groups; first < items;
       first += int64_t(gridDim.x) * groups) {
    const Item<T> item(c, first + group);
    float x[kPairs][2][V], g[kPairs][2][V], squares = 0;
    for_pairs<V, kPairs>(c, item.real, [&](int i, int p) {
      c.load_pair(dy + item.at, p, g[i]);
      if (item.weight) {
        c.load_pair(c.x + item.at, p, x[i]);
#pragma unroll
        for (int v = 0; v < V; ++v) squares += x[i][0][v] * x[i][0][v] + x[i][1][v] * x[i][1][v];
      }
      if (item.rotated(c, p)) rotate(c, item.table, p, -1, g[i]);
    });
    const float r = 1 / sqrtf(c.group_sum(squares) / c.dim + c.eps), is_q = item.h < c.heads;
    float mean = 0;
    for_pairs<V, kPairs>(c, item.real && item.weight, [&](int i, int p) {
      float w[2][V];
      c.load_pair(item.weight, p, w);
#pragma unroll
      for (int v = 0; v < V; ++v) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const float d = g[i][side][v] * rounded<T>(x[i][side][v] * r);
          dw[0][i][side][v] += is_q * d;
          dw[1][i][side][v] += (1 - is_q) * d;
          g[i][side][v] *= w[side][v];
        }
        mean += (g[i][0][v] * x[i][0][v] + g[i][1][v] * x[i][1][v]) * r;
      }
    });
    mean = c.group_sum(mean) * r / c.dim;
    for_pairs<V, kPairs>(c, item.real, [&](int i, int p) {
#pragma unroll
      for (int v = 0; item.weight && v < 2 * V; ++v) {
        float& to = g[i][v / V][v % V];
        to = r * (to - mean * x[i][v / V][v % V]);
      }
      c.store_pair(dx + item.at, p, g[i], add);
    });
  }
#pragma unroll
  for (int which = 0; which < 2; ++which)
    for_pairs<V, kPairs>(c, true, [&](int i, int p) {
      c.store_pair(sums + (group * 2 + which) * c.dim, p, dw[which][i]);
    });
  __syncthreads();
  for (int j = threadIdx.x; j < 2 * c.dim; j += blockDim.x) {
    float sum = 0;
    for (int i = 0; i < groups; ++i) sum += sums[i * 2 * c.dim + j];
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
    const auto weight = [](const Param* p) { return p ? data<const T>(p->value) : nullptr; };
    Call<T> call(data<const T>(q.qkv), weight(q.q_norm), weight(q.k_norm),
                 data<const float>(q.rope.cos), data<const float>(q.rope.sin),
                 data<const int>(q.positions), q.qkv.dim(0), int(s.heads), int(s.kv_heads),
                 int(s.head_dim), half, q.eps, 32);
    if (half % 8 == 0 && pairs % 8 == 0 && pairs <= 256) {
      call.lanes = int(std::bit_ceil(unsigned(pairs / 8)));
      f(call, std::integral_constant<int, 8>(), std::integral_constant<int, 1>());
    } else {
      f(call, std::integral_constant<int, 1>(), std::integral_constant<int, kMaxPairs>());
    }
  });
  return true;
}

}  // namespace

bool qk_norm_rope(const QkNormRope& q, Tensor y, Stream stream) {
  return with_call(q, [&]<class T>(const Call<T>& call, auto v, auto pairs) {
    const int blocks = blocks_for(q.qkv.numel() / q.shape.head_dim, kWarps * 32 / call.lanes);
    launch(forward<v, pairs, T>, {blocks, 32 * kWarps}, stream, call, y);
  });
}

bool qk_norm_rope_backward(const QkNormRope& q, const Tensor& dy, Op::Into dx, Op::Into dw_q,
                           Op::Into dw_k, Tensor parts, Stream stream) {
  const int dim = int(q.shape.head_dim);
  const bool fits = with_call(q, [&]<class T>(const Call<T>& call, auto v, auto pairs) {
    const Grid grid{kRopeParts, 32 * kWarps, kWarps * 32 / call.lanes * 2 * dim * sizeof(float)};
    launch(backward<v, pairs, T>, grid, stream, call, dy, dx.tensor, dx.add, parts);
  });
  // The two columns of parts side by side: [parts, 2, D].
  if (fits && dw_q) sum_parts(parts, int(kRopeParts), 2 * dim, 0, dw_q, stream);
  if (fits && dw_k) sum_parts(parts, int(kRopeParts), 2 * dim, dim, dw_k, stream);
  return fits;
}

}  // namespace pith::cuda
