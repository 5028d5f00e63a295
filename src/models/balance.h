#pragma once
// Routing as the run asks for it: the model's rule surrounded by replay, forced balance, balance
// losses, the auxiliary-loss-free bias, load statistics and the trace.

#include "models/model.h"

namespace pith {

// State of one router, declared by declare_router_state when the run needs it.
struct RouterState {
  Param* bias = nullptr;  // wide [E], added to the scores for the choice
  // wide [1, E]: expert fractions of the previous step's whole batch, uniform at first
  Param* fractions = nullptr;
};
// `prefix`: HF name of the router ("model.layers.3.mlp.gate"), where HF has no tensor for its bias.
RouterState declare_router_state(ParamSet& params, const Balance& balance,
                                 const std::string& prefix, int64_t experts);

// logits wide [T, E] of MoE layer `moe_layer`.
Routing route(Tape& t, MicroBatch& mb, const Balance& balance, const RouterRule& rule,
              const RouterState& state, int64_t moe_layer, int64_t moe_layers, const Tensor& logits,
              Loc at = Loc::current());

// bias += rate * sign(mean count - count), then centered (Wang et al. 2024, "Auxiliary-Loss-Free
// Load Balancing"); fractions = counts / sum. counts: wide [E], this router's row of
// "expert_count".
void update_router_state(const RouterState& state, const Balance& balance, const Tensor& counts);

}  // namespace pith
