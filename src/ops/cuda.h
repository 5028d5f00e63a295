#pragma once
// Launchers of the CUDA kernels, one block per name.cu; name.cpp calls them where its tape runs on a GPU, after its
// checks. All are asynchronous on `stream`, read and write device memory only, and may be called again before they
// have run. Shapes, dtypes and formulas are those of the op in name.h; "wide" is fp32.

#include "ops/attention.h"
#include "ops/experts.h"
#include "ops/norm.h"
#include "ops/optimizer.h"
#include "ops/router.h"

namespace pith::cuda {

// grouped_gemm.cu. Rows [offsets[e], offsets[e + 1]) belong to expert e; w is [E, N, K]; no host reads offsets.
// y[R, N] = x[R, K] w[e]^T with trans_w, else x[R, K] w[e, K, N]; rows behind the last expert's are zeros.
void grouped_multiply(const Tensor& x, const Tensor& w, bool trans_w, const Tensor& offsets,
                      Tensor y, Stream);
// dw[e][N, K] (+)= the sum over the records of dy[rows of e, N]^T x[rows of e, K]. One pass over dw for up to 8
// records. fp32 or bf16 dw.
void grouped_weight_gradient(std::span<WgradRecord* const> records, Op::Into dw, Stream);

// norm.cu. delta and dsum may be empty; out.sum is x itself without a delta. parts: fp32 [norm_parts(T), H].
void add_rms_norm(const Tensor& x, const Tensor& delta, const Tensor& w, const AddNorm& out,
                  Tensor rstd, float eps, Stream);
inline int64_t norm_parts(int64_t rows) { return std::min<int64_t>(rows, 660); }
void add_rms_norm_backward(const Tensor& sum, const Tensor& dy, const Tensor& dsum, const Tensor& w,
                           const Tensor& rstd, Op::Into dx, Op::Into ddelta, Op::Into dw,
                           Tensor parts, Stream);

// experts.cu. workspace: i32 [sort_workspace(pairs)].
inline int64_t sort_workspace(int64_t ids) { return 8 * ids + (1 << 18); }
void order_by_expert(const Tensor& ids, unsigned experts, const ExpertOrder& to, Tensor workspace,
                     Stream);
// to[pairs[t, k]] (+)= from[t]; the tail is zeros.
void spread_rows(const Tensor& from, const ExpertOrder& order, Op::Into to, Stream);
// to[t] (+)= the sum of from[pairs[t, k]] over k, in fp32.
void collect_rows(const Tensor& from, const Tensor& pairs, Op::Into to, Stream);
void swiglu(const Tensor& gate_up, const Tensor& weights, const ExpertOrder& order, Tensor y,
            Stream);
void swiglu_backward(const Tensor& gate_up, const Tensor& weights, const ExpertOrder& order,
                     const Tensor& dy, Op::Into d, Op::Into dweights, Stream);

// rope.cu. parts: fp32, kRopeParts of [2, D].
constexpr int64_t kRopeParts = 528;
struct QkNormRope {
  Tensor qkv;
  const Param *q_norm, *k_norm;
  float eps;
  RopeTable rope;
  Tensor positions;
  AttentionShape shape;
};
bool qk_norm_rope(const QkNormRope& q, Tensor y, Stream);  // false: odd or too long heads
bool qk_norm_rope_backward(const QkNormRope& q, const Tensor& dy, Op::Into dx, Op::Into dw_q,
                           Op::Into dw_k, Tensor parts, Stream);

// router.cu. Up to 512 experts. Without `choose`, out.ids are given.
void route_top_k(const Tensor& logits, const RouterRule& rule, const Tensor& bias, bool choose,
                 const Routing& out, Stream);
void route_top_k_backward(const RouterRule& rule, const Routing& out, const Tensor& dweights,
                          const Tensor& dscores, Op::Into into, Stream);
void balanced_ids(Tensor ids, int64_t experts, Stream);
// counts [groups, E] (+)= scale * how often the ids of each group of rows chose each expert.
void count_ids(const Tensor& ids, int64_t groups, double scale, Tensor counts, bool add, Stream);
// Per token the term of the loss (its sum over tokens is the loss) and the slope to the scores or logits.
void balance_terms(const Tensor& scores, const Tensor& fractions, int64_t groups, Tensor terms,
                   Tensor slopes, Stream);
void z_terms(const Tensor& logits, Tensor terms, Tensor slopes, Stream);
void sum_terms(const Tensor& terms, Tensor sum, Stream);  // in fp64
void scale_by(const Tensor& slopes, const Tensor& seed, Op::Into into, Stream);

// embedding.cu. Forward is collect_rows. workspace: i32 [sort_workspace(T)].
void embedding_backward(const Tensor& ids, const Tensor& dy, Op::Into dw, Tensor workspace, Stream);
// Of a chunk of rows [rows, V], whose gradients take the place of the logits if they are wanted.
void cross_entropy(Tensor logits, const Tensor& labels, Tensor loss, bool backward, Stream);

// optimizer.cu. parts: fp64 [kSquareParts]; out: fp64 [1].
constexpr int64_t kSquareParts = 2048;
void sum_of_squares(const Tensor& g, Tensor parts, Tensor out, Stream);  // fp32 and bf16 g
void clip_by_norm(const Tensor& squares, double labels, double clip, Tensor norm, Stream);
void adamw_update(const AdamW& rule, const Tensor& norm, const Tensor& grad, Tensor m, Tensor v,
                  Tensor value, Tensor rest, Stream);

// muon.cu. work: fp32 [slots, muon_work(r, c)], for so many matrices at a time.
constexpr int64_t kMuonParts = 64;
inline int64_t muon_work(int64_t r, int64_t c) {
  const auto padded = [](int64_t n) { return (n + 63) / 64 * 64; };
  const int64_t small = std::min(r, c);
  return 2 * (padded(r * c) + padded(small * small)) + kMuonParts;
}
void muon_update(const Muon& rule, const Tensor& grad, Tensor buf, Tensor master, Tensor value,
                 Tensor work, Stream);

// gemm.cu: cpu::gemm of ops/gemm.h in device memory, bf16 and fp32; bf16 out may add. cuBLASLt keeps a workspace.
constexpr int64_t kGemmWorkspace = 64 << 20;
void gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const void* a, const void* b,
          DType in, void* c, DType out, bool add, Stream);
// d = alpha op(a) op(b) + beta c for `batch` fp32 matrices, one behind the other; operands rounded to TF32, sums and
// c in fp32. c may be d.
struct Scaled {
  float alpha, beta;
  const void* c;
};
void gemm_tf32(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const void* a,
               const void* b, const Scaled& scaled, void* d, int64_t batch, Stream);

// linear.cu. y [T, N] += bias [N], rounded once. parts: fp32 [bias_parts(T), N].
void add_bias(Tensor y, const Tensor& bias, Stream);
inline int64_t bias_parts(int64_t rows) { return std::clamp<int64_t>(rows / 8, 1, 64); }
void bias_gradient(const Tensor& dy, Op::Into db, Tensor parts, Stream);

// attention_cudnn.cpp. bf16, heads of up to 256 channels, a multiple of 8; sequences of two
// tokens at least; no documents. stats: fp32 [B, Hq, S].
// Backward adds to dq by atomics unless `deterministic`, which keeps the scores instead: [B, Hq, S, S] bf16.
inline bool attention_fits(const Tensor& qkv, const AttentionShape& shape) {
  return qkv.dtype() == DType::bf16 && shape.head_dim % 8 == 0 && shape.head_dim <= 256 &&
         shape.batch > 0 && shape.sequence > 1;
}
void attention(const Tensor& qkv, const AttentionShape& shape, float scale, int64_t window,
               Tensor y, Tensor stats, Stream);
void attention_backward(const Tensor& qkv, const AttentionShape& shape, float scale, int64_t window,
                        const Tensor& y, const Tensor& stats, const Tensor& dy, Tensor d_qkv,
                        bool deterministic, Stream);

}  // namespace pith::cuda
