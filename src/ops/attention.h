#pragma once
// Rotary embedding with optional q/k norm, and causal attention, on packed rows. A row of `qkv`
// holds the q heads, then the k heads, then the v heads of one token: [T, (Hq + 2 Hkv) D] with T =
// batch * sequence, sequence fastest.

#include "core/op.h"

namespace pith {

struct AttentionShape {
  int64_t batch = 1, sequence = 0;  // T = batch * sequence
  int64_t heads = 0, kv_heads = 0, head_dim = 0;
  int64_t width() const { return (heads + 2 * kv_heads) * head_dim; }
};

// Rotary tables for positions 0 .. P-1, rotating the first `rotary` channels of each head in the
// half-split layout of Hugging Face (rotate_half): cos and sin are [P, rotary / 2] in the master
// dtype, already scaled.
struct RopeTable {
  Tensor cos, sin;
};

// Normalizes every q and k head with its weight (q_norm, k_norm [D]; nullptr: no norm), rotates
// them by the token's position (positions i32 [T]), and copies v. Same layout out.
Tensor qk_norm_rope(Tape& tape, const Tensor& qkv, Param* q_norm, Param* k_norm, float eps,
                    const RopeTable& rope, const Tensor& positions, const AttentionShape& shape,
                    Loc at = Loc::current());

// softmax(scale q k^T) v, causal, grouped-query, blocked: never S x S. A query at position i sees
// the keys j <= i of its sequence with j > i - window (window 0: no limit) and j >=
// document_start[i]; document_start i32 [T] holds positions within the sequence (empty: one
// document). Returns [T, Hq D].
Tensor attention(Tape& tape, const Tensor& qkv, const AttentionShape& shape, float scale,
                 const Tensor& document_start = {}, int64_t window = 0, Loc at = Loc::current());

// For generation, not recorded: appends the k and v of `shape.sequence` new tokens to the cache (kv
// [capacity, 2 Hkv D], batch 1) and attends over everything in it.
struct KvCache {
  Tensor kv;
  int64_t length = 0;
};
Tensor attention_cached(Tape& tape, const Tensor& qkv, KvCache& cache, const AttentionShape& shape,
                        float scale, int64_t window, Loc at = Loc::current());

}  // namespace pith
