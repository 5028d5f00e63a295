#pragma once
// The routing trace: DIR/step-%08d.npz per step, `expert_ids` int32 and `gate_weights` fp32, both
// [moe layer, global batch, sequence, k]. A trace can be replayed: its ids replace the router's
// choice.

#include "engine/pipeline.h"

namespace pith {

// The directory exists.
void write_routing_trace(const std::string& directory, int64_t step, const StepSums& sums,
                         const Batch& batch);

// Ids i32 [B * S, K] per MoE layer. InputError if the file is missing or shaped for another run.
std::vector<Tensor> read_routing_trace(const std::string& directory, int64_t step,
                                       const Model::Size& model, const Batch& batch);

}  // namespace pith
