#pragma once
// The routing trace: DIR/step-%08d.npz per step, `expert_ids` int32 and `gate_weights` fp32, both
// [moe layer, global batch, sequence, k]. A trace can be replayed: its ids replace the router's
// choice.

#include "engine/pipeline.h"

namespace pith {

// An .npz is a zip archive of .npy arrays, as numpy.savez writes it. The zip is libarchive's; the
// arrays are those of numpy.lib.format, version 1.
using Arrays = std::map<std::string, Tensor>;  // by name, without ".npy"; i32 or fp32 on the cpu

// Replaces `path` atomically. Entries are stored, not compressed; equal arrays give equal files.
void write_npz(const std::string& path, const Arrays& arrays);

// InputError: not a zip, damaged, no array, a dtype other than little-endian int32 and float32,
// Fortran order, more than 4 dimensions.
Arrays read_npz(const std::string& path);

// The directory exists.
void write_routing_trace(const std::string& directory, int64_t step, const StepSums& sums,
                         const Batch& batch);

// Ids i32 [B * S, K] per MoE layer. InputError if the file is missing or shaped for another run.
std::vector<Tensor> read_routing_trace(const std::string& directory, int64_t step,
                                       const Model::Size& model, const Batch& batch);

}  // namespace pith
