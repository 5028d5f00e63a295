#pragma once
// From router logits to expert ids and weights, and the losses that balance the load. Letters: T
// tokens, E experts, K chosen per token, G groups of rows. "wide" is fp64 in fp64 runs and fp32
// otherwise.

#include "core/op.h"

namespace pith {

struct RouterRule {
  enum class Score { softmax, sigmoid, softmax_after_top_k };
  Score score = Score::softmax;
  int64_t top_k = 1;
  // The weights of a token sum to 1 before scaling; the divisor gets no epsilon.
  bool renormalize = false;
  double scaling = 1.0;
};

struct Routing {
  Tensor ids;      // i32 [T, K], best first; -1 is nobody
  Tensor weights;  // wide [T, K]; 0 where the id is -1
  // wide [T, E]: softmax or sigmoid over all, for the balance losses; differentiable
  Tensor scores;
};

// logits wide [T, E]. `bias` (wide [E], or empty) is added to the scores for the choice only
// (auxiliary-loss-free balancing, Wang et al. 2024), never to the weights. `replay` (i32 [T, K], or
// empty) replaces the chosen ids; the weights are then those scores. Ties go to the lower expert
// id.
Routing route_top_k(Tape& tape, const Tensor& logits, const RouterRule& rule,
                    const Tensor& bias = {}, const Tensor& replay = {}, Loc at = Loc::current());

// Forced balance for benchmarks: ids of token t, choice j are (t + j * floor(E / K)) mod E.
Tensor balanced_ids(Tape& tape, int64_t tokens, int64_t top_k, int64_t experts,
                    Loc at = Loc::current());

// counts[E] += how often each expert was chosen (wide). Not differentiable.
void count_experts(Tape& tape, const Tensor& ids, Tensor& counts, Loc at = Loc::current());

// fractions wide [G, E]: of each group's T / G consecutive tokens, counts / (tokens * K). Not
// differentiable.
Tensor expert_fractions(Tape& tape, const Tensor& ids, int64_t experts, int64_t groups,
                        Loc at = Loc::current());

// Mean over groups of E * sum_i f_i P_i, with P_i the mean score of expert i over the group's
// tokens (Switch Transformer, Fedus et al. 2021, eq. 4-6); 1 when balanced. fractions is [G, E], or
// [1, E] given for all. Scores are normalized per token to sum to 1 (nothing to do for softmax).
// Gradient to the scores only. Scalar, wide [1].
Tensor balance_loss(Tape& tape, const Tensor& scores, const Tensor& fractions, int64_t groups,
                    Loc at = Loc::current());

// Sum over tokens of logsumexp(logits)^2 (ST-MoE, Zoph et al. 2022, eq. 5). Scalar, wide [1].
Tensor z_loss(Tape& tape, const Tensor& logits, Loc at = Loc::current());

}  // namespace pith
