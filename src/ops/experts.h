#pragma once
// From expert ids to expert-sorted rows and back; model-blind. Letters: T rows, K slots of a row, E
// experts, N (row, expert) pairs. Stable counting sort, no atomics, so the order never depends on
// threads.

#include "core/op.h"

namespace pith {

struct ExpertOrder {
  Tensor offsets;  // i32 [E + 1]: pairs of expert e are [offsets[e], offsets[e + 1])
  Tensor slots;    // i32 [T K]: flat slot t * K + j of each pair, first offsets[E] valid
  Tensor pairs;    // i32 [T, K]: where each slot went, -1 for nobody
};

// Fails at the first of ids (i32 [T, K], cpu) that is neither in [0, experts) nor -1.
void check_expert_ids(const Tensor& ids, int64_t experts);

// ids i32 [T, K] in [0, E) or -1. Pairs are sorted by expert, then by slot. N = T K pairs are
// allocated; ids of -1 leave the tail unused (rows there are zero).
ExpertOrder order_by_expert(Tape& tape, const Tensor& ids, int64_t experts,
                            Loc at = Loc::current());

// x[T, H] -> [N, H]: a copy of its row for every pair. Backward sums the copies of a row in fp32.
Tensor gather_rows(Tape& tape, const Tensor& x, const ExpertOrder& order, Loc at = Loc::current());

// y[N, H] -> [T, H]: the sum of a row's pairs, in slot order, in fp32 (fp64); rows of nobody are
// zero.
Tensor sum_rows(Tape& tape, const Tensor& y, const ExpertOrder& order, Loc at = Loc::current());

// gate_up[N, 2 I] -> [N, I]: silu(gate) * up * weight, with weight[t, j] of the pair's slot
// (weights wide [T, K]; empty weights: 1). Rows are pairs of `order`, or without one plain rows.
// The gradient of the weights falls out of the same pass.
Tensor swiglu(Tape& tape, const Tensor& gate_up, const Tensor& weights = {},
              const ExpertOrder& order = {}, Loc at = Loc::current());

}  // namespace pith
