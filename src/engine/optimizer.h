#pragma once
// The optimizer over all parameters. Backward leaves *sum* gradients; 1 / labels and the clip
// factor enter here, as one scale.

#include "core/op.h"
#include "engine/run_config.h"

namespace pith {

class Optimizer {
 public:
  Optimizer(ParamSet& params, const RunConfig& run, Context& context);

  struct Norm {
    double value = 0;       // L2 norm of the mean gradient: every parameter once
    std::string first_bad;  // the first parameter with a non-finite gradient, or ""
    bool finite() const { return first_bad.empty(); }
  };
  Norm grad_norm(double labels);

  // One update (`step` is 1-based) with gradients scaled by min(1, clip / (norm + 1e-6)) / labels.
  // Does nothing if the norm is not finite.
  void update(double lr, int64_t step, const Norm& norm, double labels);

  // Moments by parameter, for checkpoints: "m" and "v" (AdamW) or "momentum" (Muon), shaped like
  // the parameter.
  struct State {
    std::string kind;
    Param* param;
    Tensor tensor;
  };
  std::vector<State> states() const;

 private:
  struct Slot {
    Param* param;
    Tensor first, second;  // AdamW's moments, or Muon's momentum and nothing
  };
  ParamSet& params_;
  OptimizerConfig rule_;
  Context& context_;
  std::vector<Slot> slots_;
};

}  // namespace pith
