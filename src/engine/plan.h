#pragma once
// The memory plan: the real engine run on meta. No second description of any model exists.

#include "core/memory.h"
#include "engine/run_config.h"
#include "models/model.h"

namespace pith {

struct Plan {
  size_t peak_bytes = 0;            // high-water mark of a step, workspaces included
  size_t static_bytes = 0;          // weights, masters, gradients, moments, tables
  std::vector<memory::Line> lines;  // what makes up the peak, largest first
  double step_flops = 0;            // matrix multiplications and attention, forward and backward
  int64_t parameters = 0;
  std::string table() const;
};

ModelOptions model_options(const RunConfig& run, Device device);  // of a training run

Plan make_plan(const RunConfig& run);

}  // namespace pith
