#include "core/cuda_helpers.cuh"
#include "ops/cuda.h"

// A warp works on a token; lane l holds experts l, l + 32, ... Letters as in router.h.

namespace pith::cuda {
namespace {

constexpr int kWarps = 4, kHeld = 16;  // experts of a lane: up to 512 in all
using Score = RouterRule::Score;

__device__ float warp_max(float x) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
  return x;
}

// The best of the warp's keys and its expert; of equal keys the lower expert.
__device__ void warp_best(float& key, int& expert) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) {
    const float other = __shfl_xor_sync(~0u, key, d);
    const int other_expert = __shfl_xor_sync(~0u, expert, d);
    if (other > key || (other == key && other_expert < expert)) key = other, expert = other_expert;
  }
}

// x becomes its softmax over the warp; returns logsumexp. What is past the experts is -infinity.
__device__ float softmax(float (&x)[kHeld]) {
  float high = -INFINITY, sum = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) high = fmaxf(high, x[i]);
  high = warp_max(high);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) sum += x[i] = expf(x[i] - high);
  sum = warp_sum(sum);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) x[i] /= sum;
  return high + logf(sum);
}

__device__ void load_row(const float* from, int experts, int lane, float past, float (&to)[kHeld]) {
#pragma unroll
  for (int i = 0; i < kHeld; ++i) to[i] = i * 32 + lane < experts ? from[i * 32 + lane] : past;
}

__device__ void store_row(const float (&from)[kHeld], int experts, int lane, float* to) {
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    if (i * 32 + lane < experts) to[i * 32 + lane] = from[i];
}

__device__ bool is_normalized(const RouterRule& rule) {
  return rule.renormalize || rule.score == Score::softmax_after_top_k;
}

// Weight of a chosen expert per unit of its score.
__device__ float factor(const RouterRule& rule, const float* scores, const int* ids) {
  if (!is_normalized(rule)) return float(rule.scaling);
  float sum = 0;
  for (int j = 0; j < rule.top_k; ++j) sum += ids[j] < 0 ? 0 : scores[ids[j]];
  return float(rule.scaling) / (sum == 0 ? 1 : sum);
}

__global__ void route(int tokens, int experts, const float* logits, RouterRule rule,
                      const float* bias, bool choose, int* ids, float* weights, float* scores) {
  const int lane = threadIdx.x % 32, t = blockIdx.x * kWarps + threadIdx.x / 32;
  if (t >= tokens) return;
  float x[kHeld], key[kHeld];
  load_row(logits + int64_t(t) * experts, experts, lane, -INFINITY, x);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) key[i] = x[i];
  if (rule.score == Score::sigmoid) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) x[i] = 1 / (1 + expf(-x[i]));
  } else {
    softmax(x);
  }
  scores += int64_t(t) * experts;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int e = i * 32 + lane;
    if (e >= experts) break;
    scores[e] = x[i];
    // Logits tell apart what softmax rounds to one score.
    if (rule.score != Score::softmax_after_top_k || bias) key[i] = x[i] + (bias ? bias[e] : 0);
    if (isnan(key[i])) key[i] = INFINITY;  // reaches the weights, where it will be noticed
  }
  ids += int64_t(t) * rule.top_k;
  unsigned taken = 0;  // of the experts of this lane
  for (int j = 0; choose && j < rule.top_k; ++j) {
    float best = -INFINITY;
    int expert = INT_MAX;
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (i * 32 + lane < experts && !(taken >> i & 1) && (key[i] > best || expert == INT_MAX))
        best = key[i], expert = i * 32 + lane;
    warp_best(best, expert);
    if (expert % 32 == lane) taken |= 1u << expert / 32;
    if (lane == 0) ids[j] = expert;
  }
  __syncwarp();
  const float f = factor(rule, scores, ids);
  for (int j = lane; j < rule.top_k; j += 32)
    weights[int64_t(t) * rule.top_k + j] = ids[j] < 0 ? 0 : scores[ids[j]] * f;
}

__global__ void route_backward(int tokens, int experts, RouterRule rule, const int* ids,
                               const float* weights, const float* scores, const float* dweights,
                               const float* dscores, float* to, bool add) {
  const int lane = threadIdx.x % 32, t = blockIdx.x * kWarps + threadIdx.x / 32;
  if (t >= tokens) return;
  const int64_t row = int64_t(t) * experts, chosen = int64_t(t) * rule.top_k;
  float s[kHeld], d[kHeld];
  load_row(scores + row, experts, lane, 0, s);
  load_row(dscores + row, experts, lane, 0, d);
  const float f = factor(rule, scores + row, ids + chosen);
  float mean = 0;
  for (int j = 0; is_normalized(rule) && j < rule.top_k; ++j)
    mean += dweights[chosen + j] * weights[chosen + j] / float(rule.scaling);
  for (int j = 0; j < rule.top_k; ++j) {
    const int e = ids[chosen + j];
    const float dw = f * (dweights[chosen + j] - mean);
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (e >= 0 && e == i * 32 + lane) d[i] += dw;
  }
  float through = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) through += d[i] * s[i];
  through = warp_sum(through);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int e = i * 32 + lane;
    if (e >= experts) break;
    const float dx =
        rule.score == Score::sigmoid ? d[i] * s[i] * (1 - s[i]) : s[i] * (d[i] - through);
    to[row + e] = (add ? to[row + e] : 0) + dx;
  }
}

// counts[g][e] (+)= scale * how often group g's ids chose e. A block for each group; sums of integers, so exact.
__global__ void count_group(const int* ids, int64_t per_group, int experts, float scale,
                            float* counts, bool add) {
  extern __shared__ int count[];
  for (int e = threadIdx.x; e < experts; e += blockDim.x) count[e] = 0;
  __syncthreads();
  const int* from = ids + blockIdx.x * per_group;
  for (int64_t i = threadIdx.x; i < per_group; i += blockDim.x)
    if (from[i] >= 0) atomicAdd(&count[from[i]], 1);
  __syncthreads();
  float* to = counts + int64_t(blockIdx.x) * experts;
  for (int e = threadIdx.x; e < experts; e += blockDim.x)
    to[e] = (add ? to[e] : 0) + scale * count[e];
}

// See the CPU code: a term and its slope for every token. fractions [groups or 1][experts].
__global__ void balance_term(int tokens, int experts, const float* scores, const float* fractions,
                             int per_group, bool shared, float scale, float* terms, float* slopes) {
  const int lane = threadIdx.x % 32, t = blockIdx.x * kWarps + threadIdx.x / 32;
  if (t >= tokens) return;
  float s[kHeld], f[kHeld], sum = 0, weighted = 0;
  load_row(scores + int64_t(t) * experts, experts, lane, 0, s);
  load_row(fractions + (shared ? 0 : int64_t(t / per_group) * experts), experts, lane, 0, f);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) sum += s[i], weighted += s[i] * f[i];
  sum = warp_sum(sum);
  weighted = warp_sum(weighted) / sum;
  if (lane == 0) terms[t] = scale * weighted;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) f[i] = scale * (f[i] - weighted) / sum;
  store_row(f, experts, lane, slopes + int64_t(t) * experts);
}

__global__ void z_term(int tokens, int experts, const float* logits, float* terms, float* slopes) {
  const int lane = threadIdx.x % 32, t = blockIdx.x * kWarps + threadIdx.x / 32;
  if (t >= tokens) return;
  float x[kHeld];
  load_row(logits + int64_t(t) * experts, experts, lane, -INFINITY, x);
  const float z = softmax(x);
  if (lane == 0) terms[t] = z * z;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) x[i] *= 2 * z;
  store_row(x, experts, lane, slopes + int64_t(t) * experts);
}

// One block: the same order of additions every time.
__global__ void sum_all(const float* terms, int n, float* sum) {
  double x = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) x += terms[i];
  x = block_sum(x);
  if (threadIdx.x == 0) *sum = float(x);
}

// A warp for each row of logits or scores.
template <class... P, class... A>
void launch_rows(void (*kernel)(P...), const Tensor& rows, Stream stream, const A&... a) {
  const int64_t tokens = rows.dim(0), experts = rows.dim(1);
  if (experts > 32 * kHeld) fail("{} experts: the CUDA router takes up to {}", experts, 32 * kHeld);
  launch(kernel, {blocks_for(tokens, kWarps), 32 * kWarps}, stream, tokens, experts, a...);
}

}  // namespace

void route_top_k(const Tensor& logits, const RouterRule& rule, const Tensor& bias, bool choose,
                 const Routing& out, Stream stream) {
  launch_rows(route, logits, stream, logits, rule, bias, choose, out.ids, out.weights, out.scores);
}

void route_top_k_backward(const RouterRule& rule, const Routing& out, const Tensor& dweights,
                          const Tensor& dscores, Op::Into into, Stream stream) {
  launch_rows(route_backward, into.tensor, stream, rule, out.ids, out.weights, out.scores, dweights,
              dscores, into.tensor, into.add);
}

void balanced_ids(Tensor ids, int64_t experts, Stream stream) {
  each(ids.numel(), stream, [=, to = data<int>(ids), k = ids.dim(1)] __device__(int64_t i) {
    to[i] = int((i / k + i % k * (experts / k)) % experts);
  });
}

void count_ids(const Tensor& ids, int64_t groups, double scale, Tensor counts, bool add,
               Stream stream) {
  const int64_t experts = counts.numel() / groups;
  launch(count_group, {unsigned(groups), 1024, experts * sizeof(int)}, stream, ids,
         ids.numel() / groups, experts, scale, counts, add);
}

void balance_terms(const Tensor& scores, const Tensor& fractions, int64_t groups, Tensor terms,
                   Tensor slopes, Stream stream) {
  const int64_t tokens = scores.dim(0);
  launch_rows(balance_term, scores, stream, scores, fractions, tokens / groups,
              fractions.dim(0) == 1, double(scores.dim(1)) / tokens, terms, slopes);
}

void z_terms(const Tensor& logits, Tensor terms, Tensor slopes, Stream stream) {
  launch_rows(z_term, logits, stream, logits, terms, slopes);
}

void sum_terms(const Tensor& terms, Tensor sum, Stream stream) {
  launch(sum_all, {1, 1024}, stream, terms, terms.numel(), sum);
}

void scale_by(const Tensor& slopes, const Tensor& seed, Op::Into into, Stream stream) {
  each(slopes.numel(), stream,
       [from = data<float>(slopes), by = data<float>(seed), to = data<float>(into.tensor),
        add = into.add] __device__(int64_t i) { to[i] = (add ? to[i] : 0) + *by * from[i]; });
}

}  // namespace pith::cuda
