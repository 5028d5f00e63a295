#include "core/cuda_helpers.cuh"
#include "ops/cuda.h"

// Ordering pairs by expert, moving rows, SwiGLU. A warp works on a row. Letters as in experts.h.

namespace pith::cuda {
namespace {

constexpr int kWarps = 8;  // of a block
constexpr int kHeld = 8;   // pieces of a row that a lane holds

// to[n] (+)= from[t] for each pair n of row t, which is read once and written a whole row at a time; rows from `used` on
// become zeros.
template <class T, int V>
__global__ void spread_rows(const T* from, const int* pair_of, const int* used, int rows, int top_k,
                            int width, T* to, bool add) {
  const int lane = threadIdx.x % 32, warps = gridDim.x * kWarps,
            first = blockIdx.x * kWarps + threadIdx.x / 32;
  for (int t = first; t < rows; t += warps)
    for (int begin = lane * V; begin < width; begin += kHeld * 32 * V) {
      float v[kHeld][V];
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        if (const int j = begin + i * 32 * V; j < width)
          load<V>(from + int64_t(t) * width + j, v[i]);
      for (int k = 0; k < top_k; ++k) {
        const int n = pair_of[int64_t(t) * top_k + k];
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
          if (const int j = begin + i * 32 * V; n >= 0 && j < width)
            store<V>(to + int64_t(n) * width + j, v[i], add);
      }
    }
  for (int n = *used + first; !add && n < rows * top_k; n += warps)
    for (int j = lane * V; j < width; j += 32 * V) store<V>(to + int64_t(n) * width + j, {});
}

// to[t] (+)= the sum of its pairs' rows, in order of choice.
template <class T, int V>
__global__ void collect_rows(const T* from, const int* pair_of, int rows, int top_k, int width,
                             T* to, bool add) {
  const int lane = threadIdx.x % 32;
  for (int t = blockIdx.x * kWarps + threadIdx.x / 32; t < rows; t += gridDim.x * kWarps)
    for (int j = lane * V; j < width; j += 32 * V) {
      float sum[V] = {};
      for (int k = 0; k < top_k; ++k) {
        const int n = pair_of[int64_t(t) * top_k + k];
        if (n < 0) continue;
        float v[V];
        load<V>(from + int64_t(n) * width + j, v);
#pragma unroll
        for (int i = 0; i < V; ++i) sum[i] += v[i];
      }
      store<V>(to + int64_t(t) * width + j, sum, add);
    }
}

__device__ float sigmoid(float x) { return 1 / (1 + __expf(-x)); }

// weights may be null: weight 1; used may be null: all rows.
template <class T, int V>
__global__ void swiglu_forward(const T* gate_up, const float* weights, const int* slots,
                               const int* used, int rows, int width, T* y) {
  const int lane = threadIdx.x % 32;
  for (int n = blockIdx.x * kWarps + threadIdx.x / 32; n < rows; n += gridDim.x * kWarps) {
    const bool real = !used || n < *used;
    const float weight = real && weights ? weights[slots[n]] : 1;
    const T* row = gate_up + int64_t(n) * 2 * width;
    for (int j = lane * V; j < width; j += 32 * V) {
      float g[V] = {}, u[V] = {};
      if (real) load<V>(row + j, g), load<V>(row + width + j, u);
#pragma unroll
      for (int i = 0; i < V; ++i) g[i] = g[i] * sigmoid(g[i]) * u[i] * weight;
      store<V>(y + int64_t(n) * width + j, g);
    }
  }
}

template <class T, int V>
__global__ void swiglu_backward(const T* gate_up, const float* weights, const int* slots,
                                const int* used, const T* dy, int rows, int width, T* d, bool add,
                                float* dweights, bool add_weights) {
  const int lane = threadIdx.x % 32;
  for (int n = blockIdx.x * kWarps + threadIdx.x / 32; n < rows; n += gridDim.x * kWarps) {
    const bool real = !used || n < *used;
    const float weight = real && weights ? weights[slots[n]] : 1;
    const T *row = gate_up + int64_t(n) * 2 * width, *above = dy + int64_t(n) * width;
    T* to = d + int64_t(n) * 2 * width;
    float sum = 0;
    for (int j = lane * V; j < width; j += 32 * V) {
      float g[V] = {}, u[V] = {}, z[V] = {};
      if (real) load<V>(row + j, g), load<V>(row + width + j, u), load<V>(above + j, z);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float s = sigmoid(g[i]), silu = g[i] * s, up = u[i];
        sum += z[i] * silu * up;
        u[i] = z[i] * weight * silu;
        g[i] = z[i] * weight * up * (s + silu * (1 - s));
      }
      if (!real && add) continue;
      store<V>(to + j, g, add);
      store<V>(to + width + j, u, add);
    }
    sum = warp_sum(sum);
    if (real && dweights && lane == 0)
      dweights[slots[n]] = (add_weights ? dweights[slots[n]] : 0) + sum;
  }
}

Grid grid_for(int64_t rows) {
  return {unsigned(std::min(blocks_for(rows, kWarps), 16 * multiprocessors())), 32 * kWarps};
}
const int* used_of(const ExpertOrder& order) {
  return order.offsets ? data<const int>(order.offsets) + order.offsets.dim(0) - 1 : nullptr;
}

}  // namespace

void order_by_expert(const Tensor& ids, unsigned experts, const ExpertOrder& to, Tensor workspace,
                     Stream stream) {
  const int n = int(ids.numel());
  if (n == 0) return Tensor(to.offsets).fill_zero();
  // As wide as all experts and one more: nobody's -1 is the last.
  const SortedIds sorted = sort_ids(ids, std::bit_width(experts), workspace, stream);
  int *offsets = data<int>(to.offsets), *slots = data<int>(to.slots), *pairs = data<int>(to.pairs);
  each(n, stream, [=] __device__(int64_t i) {
    const auto expert_at = [&](int64_t j) { return min(unsigned(sorted.ids[j]), experts); };
    const unsigned e = expert_at(i), at = unsigned(i), pair = sorted.from[i];
    slots[i] = e < experts ? int(pair) : -1;
    pairs[pair] = e < experts ? int(at) : -1;
    for (unsigned begun = i ? expert_at(i - 1) + 1 : 0; begun <= e; ++begun) offsets[begun] = at;
    for (unsigned absent = e + 1; i == n - 1 && absent <= experts; ++absent) offsets[absent] = n;
  });
}

void spread_rows(const Tensor& from, const ExpertOrder& order, Op::Into to, Stream stream) {
  const int64_t rows = from.dim(0), width = from.dim(1);
  by_vector(from.dtype(), width, {from, to.tensor}, [&](auto z, auto v) {
    launch(spread_rows<decltype(z), v>, grid_for(rows), stream, from, order.pairs, used_of(order),
           rows, order.pairs.cols(), width, to.tensor, to.add);
  });
}

void collect_rows(const Tensor& from, const Tensor& pairs, Op::Into to, Stream stream) {
  const int64_t rows = to.tensor.dim(0), width = from.dim(1);
  by_vector(from.dtype(), width, {from, to.tensor}, [&](auto z, auto v) {
    launch(collect_rows<decltype(z), v>, grid_for(rows), stream, from, pairs, rows, pairs.cols(),
           width, to.tensor, to.add);
  });
}

void swiglu(const Tensor& gate_up, const Tensor& weights, const ExpertOrder& order, Tensor y,
            Stream stream) {
  const int64_t rows = y.dim(0), width = y.dim(1);
  by_vector(y.dtype(), width, {gate_up, y}, [&](auto z, auto v) {
    launch(swiglu_forward<decltype(z), v>, grid_for(rows), stream, gate_up, weights, order.slots,
           used_of(order), rows, width, y);
  });
}

void swiglu_backward(const Tensor& gate_up, const Tensor& weights, const ExpertOrder& order,
                     const Tensor& dy, Op::Into d, Op::Into dweights, Stream stream) {
  const int64_t rows = dy.dim(0), width = dy.dim(1);
  if (dweights && !dweights.add) Tensor(dweights.tensor).fill_zero();  // slots of nobody
  by_vector(dy.dtype(), width, {gate_up, dy, d.tensor}, [&](auto z, auto v) {
    launch(swiglu_backward<decltype(z), v>, grid_for(rows), stream, gate_up, weights, order.slots,
           used_of(order), dy, rows, width, d.tensor, d.add, dweights.tensor, dweights.add);
  });
}

}  // namespace pith::cuda
