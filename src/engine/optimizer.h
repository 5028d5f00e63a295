#pragma once
// The optimizer over all parameters. Backward leaves *sum* gradients; 1 / labels and the clip
// factor enter here, as one scale.

#include "engine/run_config.h"

namespace pith {

// The rate of update s = `step` (1-based) of N = `total_steps`. With W = round(warmup_ratio N),
// D = round(decay_ratio N) and f(t) falling from lr at t = 0 to final_lr at t = 1:
//   all       s <= W     lr s / W, so that the first update already counts and update W runs at lr
//   constant  s > W      lr
//   wsd       s <= N - D lr, then f((s - N + D) / D)
//   cosine    s > W      f((s - W) / (N - W))
//   linear    s > W      f((s - W) / (N - W))
// f(t) = final_lr + (lr - final_lr) (1 - t) for linear, otherwise (1 + cos(pi t)) / 2 instead of
// (1 - t). Update N runs at exactly final_lr, unless it belongs to the warm-up or wsd has no decay
// (D = 0). Updates past N count as N.
double learning_rate(const OptimizerConfig& optimizer, int64_t total_steps, int64_t step);

class Optimizer {
 public:
  Optimizer(ParamSet& params, const RunConfig& run, Context& context);

  // One update (`step` is 1-based) with gradients scaled by min(1, clip / (norm + 1e-6)) / labels.
  // Does nothing if the norm is not finite. Asynchronous on a GPU, but for Muon.
  void update(double lr, int64_t step, double labels);

  struct Norm {
    double value = 0;       // L2 norm of the mean gradient: every parameter once
    std::string first_bad;  // the first parameter with a non-finite gradient, or ""
    bool finite() const { return std::isfinite(value); }
  };
  Norm norm();  // of the last update; waits for it. The gradients must still be there.

  // Moments by parameter, for checkpoints: "m" and "v" (AdamW) or "momentum" (Muon), shaped like
  // the parameter.
  struct State {
    std::string kind;
    Param* param;
    Tensor tensor;
  };
  const std::vector<State>& states() const { return states_; }

 private:
  ParamSet& params_;
  OptimizerConfig rule_;
  Context& context_;
  std::vector<State> states_;  // of one parameter after the other; "v" follows "m"
  Tensor norm_;                // of the last update; see clip_by_norm
};

}  // namespace pith
