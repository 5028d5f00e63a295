#pragma once
// The memory plan: the real engine run on meta. No second description of any model exists.

#include "core/memory.h"
#include "engine/pipeline.h"

namespace pith {

struct Plan {
  size_t peak_bytes;  // high-water mark of a step, workspaces included
  // What makes up the peak, by name; parameters that are trained; static: weights, masters,
  // gradients, moments and tables; FLOP of matrix multiplications and attention, forward and
  // backward.
  std::string table;
};

Context make_context(const RunConfig& run, Device device);
ModelOptions model_options(const RunConfig& run, Device device);  // of a training run

Plan make_plan(const RunConfig& run);

}  // namespace pith
