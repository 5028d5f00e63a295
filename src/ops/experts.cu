#include "ops/cuda.h"
#include "ops/cuda_helpers.cuh"

// Sorting pairs by expert, moving rows, SwiGLU. A warp works on a row. Letters as in experts.h.

namespace pith::cuda {
namespace {

constexpr int kWarps = 8;     // of a block that works row by row
constexpr int kChunk = 1024;  // pairs that a block sorts
constexpr int kMaxExperts = 512;
constexpr int kHeld = 8;  // pieces of a row that a lane holds

// counts[chunk][expert], of consecutive chunks of ids.
__global__ void count_chunks(const int* ids, int pairs, int experts, int* counts) {
  __shared__ int count[kMaxExperts];
  for (int e = threadIdx.x; e < experts; e += blockDim.x) count[e] = 0;
  __syncthreads();
  const int i = blockIdx.x * kChunk + threadIdx.x;
  if (i < pairs && ids[i] >= 0) atomicAdd(&count[ids[i]], 1);
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += blockDim.x)
    counts[int64_t(blockIdx.x) * experts + e] = count[e];
}

// One block, a thread for each expert: counts become the first position of each chunk's pairs.
__global__ void scan_counts(int* counts, int chunks, int experts, int* offsets) {
  __shared__ int sums[kMaxExperts];
  const int e = threadIdx.x;
  int total = 0;
  for (int c = 0; c < chunks; ++c) total += counts[int64_t(c) * experts + e];
  sums[e] = total;
  __syncthreads();
  for (int d = 1; d < experts; d *= 2) {
    const int left = e >= d ? sums[e - d] : 0;
    __syncthreads();
    sums[e] += left;
    __syncthreads();
  }
  int at = sums[e] - total;
  offsets[e] = at;
  if (e == experts - 1) offsets[experts] = sums[e];
  for (int c = 0; c < chunks; ++c) {
    int& count = counts[int64_t(c) * experts + e];
    at += std::exchange(count, at);
  }
}

// Pairs of one expert keep their order: warp after warp, and in a warp by lane.
__global__ void place(const int* ids, int pairs, int experts, const int* begin, const int* offsets,
                      int* slots, int* pair_of) {
  __shared__ int next[kMaxExperts];
  for (int e = threadIdx.x; e < experts; e += blockDim.x)
    next[e] = begin[int64_t(blockIdx.x) * experts + e];
  __syncthreads();
  const int i = blockIdx.x * kChunk + threadIdx.x, lane = threadIdx.x % 32;
  const int id = i < pairs ? ids[i] : -1;
  const unsigned same = __match_any_sync(~0u, id);
  const int before = __popc(same & ((1u << lane) - 1)), last = 31 - __clz(same);
  int position = -1;
  for (int w = 0; w < kChunk / 32; ++w) {
    if (int(threadIdx.x) / 32 == w && id >= 0) {
      position = next[id] + before;
      __syncwarp(same);
      if (lane == last) next[id] = position + 1;
    }
    __syncthreads();
  }
  if (i >= pairs) return;
  pair_of[i] = position;
  if (position >= 0) slots[position] = i;
  if (i >= offsets[experts]) slots[i] = -1;  // nobody's place
}

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

// weights and slots may be null: weight 1; used may be null: all rows.
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

int row_blocks(int64_t rows) { return std::min(blocks_for(rows, kWarps), 16 * multiprocessors()); }
const int* used_of(const Tensor& offsets) {
  return offsets ? data<const int>(offsets) + offsets.dim(0) - 1 : nullptr;
}

}  // namespace

void order_by_expert(const Tensor& ids, int64_t experts, Tensor offsets, Tensor slots, Tensor pairs,
                     Tensor counts, Stream stream) {
  if (experts > kMaxExperts) fail("{} experts: the CUDA sort takes up to {}", experts, kMaxExperts);
  const int n = int(ids.numel()), e = int(experts), chunks = (n + kChunk - 1) / kChunk;
  if (n == 0) return Tensor(offsets).fill_zero();
  const int* id = data<const int>(ids);
  int *count = data<int>(counts), *offset = data<int>(offsets);
  count_chunks<<<chunks, kChunk, 0, stream>>>(id, n, e, count);
  scan_counts<<<1, e, 0, stream>>>(count, chunks, e, offset);
  place<<<chunks, kChunk, 0, stream>>>(id, n, e, count, offset, data<int>(slots), data<int>(pairs));
  check(cudaGetLastError());
}

void spread_rows(const Tensor& from, const Tensor& pairs, const Tensor& offsets, Tensor to, bool add,
                 Stream stream) {
  const int width = int(to.dim(1)), rows = int(from.dim(0));
  if (rows == 0) return;
  by_vector(to.dtype(), width, {from, to}, [&](auto z, auto v) {
    using T = decltype(z);
    spread_rows<T, v><<<row_blocks(rows), 32 * kWarps, 0, stream>>>(
        data<const T>(from), data<const int>(pairs), used_of(offsets), rows, int(pairs.dim(1)),
        width, data<T>(to), add);
    check(cudaGetLastError());
  });
}

void collect_rows(const Tensor& from, const Tensor& pairs, Tensor to, bool add, Stream stream) {
  const int width = int(to.dim(1)), rows = int(to.dim(0));
  if (rows == 0) return;
  by_vector(to.dtype(), width, {from, to}, [&](auto z, auto v) {
    using T = decltype(z);
    collect_rows<T, v><<<row_blocks(rows), 32 * kWarps, 0, stream>>>(
        data<const T>(from), data<const int>(pairs), rows, int(pairs.dim(1)), width, data<T>(to),
        add);
    check(cudaGetLastError());
  });
}

void swiglu(const Tensor& gate_up, const Tensor& weights, const Tensor& slots,
            const Tensor& offsets, Tensor y, Stream stream) {
  const int width = int(y.dim(1)), rows = int(y.dim(0));
  if (rows == 0) return;
  by_vector(y.dtype(), width, {gate_up, y}, [&](auto z, auto v) {
    using T = decltype(z);
    swiglu_forward<T, v><<<row_blocks(rows), 32 * kWarps, 0, stream>>>(
        data<const T>(gate_up), weights ? data<const float>(weights) : nullptr,
        weights ? data<const int>(slots) : nullptr, used_of(offsets), rows, width, data<T>(y));
    check(cudaGetLastError());
  });
}

void swiglu_backward(const Tensor& gate_up, const Tensor& weights, const Tensor& slots,
                     const Tensor& offsets, const Tensor& dy, Op::Into d, Op::Into dweights,
                     Stream stream) {
  const int width = int(dy.dim(1)), rows = int(dy.dim(0));
  if (dweights && !dweights.add) Tensor(dweights.tensor).fill_zero();  // slots of nobody
  if (rows == 0) return;
  by_vector(dy.dtype(), width, {gate_up, dy, d.tensor}, [&](auto z, auto v) {
    using T = decltype(z);
    swiglu_backward<T, v><<<row_blocks(rows), 32 * kWarps, 0, stream>>>(
        data<const T>(gate_up), weights ? data<const float>(weights) : nullptr,
        weights ? data<const int>(slots) : nullptr, used_of(offsets), data<const T>(dy), rows,
        width, data<T>(d.tensor), d.add, dweights ? data<float>(dweights.tensor) : nullptr,
        dweights.add);
    check(cudaGetLastError());
  });
}

}  // namespace pith::cuda
