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
  __device__ float group_sum(float x) const {
    for (int d = lanes / 2; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
    return x;
  }
};

// Rotates pair p; `sign` -1 rotates back.
template <class T, int V>
__device__ void rotate(const Call<T>& c, int64_t table, int p, float sign, float (&a)[V],
                       float (&b)[V]) {
  float cos[V], sin[V];
  load<V>(c.cos + table + p, cos);
  load<V>(c.sin + table + p, sin);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const float x = a[v], s = sign * sin[v];
    a[v] = x * cos[v] - b[v] * s;
    b[v] = b[v] * cos[v] + x * s;
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
  __device__ bool has(const Call<T>& c, int p) const { return real && p < c.dim / 2; }
};

template <int V, int kPairs, class T> __global__ void forward(const Call<T> c, T* y) {
  const int groups = 32 / c.lanes, lane = threadIdx.x % c.lanes;
  const int64_t group = int64_t(blockIdx.x) * kWarps * groups + threadIdx.x / c.lanes;
  const Item<T> item(c, group);
  float a[kPairs][V], b[kPairs][V], squares = 0;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int p = (i * c.lanes + lane) * V;
    if (!item.has(c, p)) break;
    load<V>(c.x + item.at + c.low_of(p), a[i]);
    load<V>(c.x + item.at + c.high_of(p), b[i]);
#pragma unroll
    for (int v = 0; v < V; ++v) squares += a[i][v] * a[i][v] + b[i][v] * b[i][v];
  }
  const float r = 1 / sqrtf(c.group_sum(squares) / c.dim + c.eps);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int p = (i * c.lanes + lane) * V;
    if (!item.has(c, p)) break;
    if (item.weight) {
      float wa[V], wb[V];
      load<V>(item.weight + c.low_of(p), wa);
      load<V>(item.weight + c.high_of(p), wb);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        a[i][v] = rounded<T>(rounded<T>(a[i][v] * r) * wa[v]);
        b[i][v] = rounded<T>(rounded<T>(b[i][v] * r) * wb[v]);
      }
    }
    if (c.rotated(item.h) && p < c.half) rotate(c, item.table, p, 1, a[i], b[i]);
    store<V>(y + item.at + c.low_of(p), a[i]);
    store<V>(y + item.at + c.high_of(p), b[i]);
  }
}

// parts [blocks, 2, D]: each block's sums for the weights of q and k.
template <int V, int kPairs, class T>
__global__ void backward(const Call<T> c, const T* dy, T* dx, bool add, float* parts) {
  extern __shared__ float sums[];  // [groups of the block][2][D]
  const int groups = kWarps * 32 / c.lanes, lane = threadIdx.x % c.lanes,
            group = threadIdx.x / c.lanes;
  float dw[2][kPairs][2][V] = {};
  const int64_t items = c.tokens * c.all_heads();
  for (int64_t first = int64_t(blockIdx.x) * groups; first < items;
       first += int64_t(gridDim.x) * groups) {
    const Item<T> item(c, first + group);
    float a[kPairs][V], b[kPairs][V], da[kPairs][V], db[kPairs][V], squares = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int p = (i * c.lanes + lane) * V;
      if (!item.has(c, p)) break;
      load<V>(dy + item.at + c.low_of(p), da[i]);
      load<V>(dy + item.at + c.high_of(p), db[i]);
      if (item.weight) {
        load<V>(c.x + item.at + c.low_of(p), a[i]);
        load<V>(c.x + item.at + c.high_of(p), b[i]);
#pragma unroll
        for (int v = 0; v < V; ++v) squares += a[i][v] * a[i][v] + b[i][v] * b[i][v];
      }
      if (c.rotated(item.h) && p < c.half) rotate(c, item.table, p, -1, da[i], db[i]);
    }
    const float r = 1 / sqrtf(c.group_sum(squares) / c.dim + c.eps);
    float mean = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int p = (i * c.lanes + lane) * V;
      if (!item.has(c, p) || !item.weight) break;
      const float is_q = item.h < c.heads;
      float wa[V], wb[V];
      load<V>(item.weight + c.low_of(p), wa);
      load<V>(item.weight + c.high_of(p), wb);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float ga = da[i][v] * rounded<T>(a[i][v] * r),
                    gb = db[i][v] * rounded<T>(b[i][v] * r);
        dw[0][i][0][v] += is_q * ga;
        dw[0][i][1][v] += is_q * gb;
        dw[1][i][0][v] += (1 - is_q) * ga;
        dw[1][i][1][v] += (1 - is_q) * gb;
        da[i][v] *= wa[v];
        db[i][v] *= wb[v];
        mean += (da[i][v] * a[i][v] + db[i][v] * b[i][v]) * r;
      }
    }
    mean = c.group_sum(mean) * r / c.dim;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int p = (i * c.lanes + lane) * V;
      if (!item.has(c, p)) break;
#pragma unroll
      for (int v = 0; item.weight && v < V; ++v) {
        da[i][v] = r * (da[i][v] - mean * a[i][v]);
        db[i][v] = r * (db[i][v] - mean * b[i][v]);
      }
      store<V>(dx + item.at + c.low_of(p), da[i], add);
      store<V>(dx + item.at + c.high_of(p), db[i], add);
    }
  }
#pragma unroll
  for (int which = 0; which < 2; ++which)
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int p = (i * c.lanes + lane) * V;
      if (p >= c.dim / 2) break;
      float* to = sums + (group * 2 + which) * c.dim;
      store<V>(to + c.low_of(p), dw[which][i][0]);
      store<V>(to + c.high_of(p), dw[which][i][1]);
    }
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
    const int64_t items = q.qkv.numel() / q.shape.head_dim;
    forward<v, pairs>
        <<<blocks_for(items, kWarps * 32 / call.lanes), 32 * kWarps, 0, stream>>>(call, data<T>(y));
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
