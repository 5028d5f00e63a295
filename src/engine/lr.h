#pragma once
// Learning-rate schedules.

#include <numbers>

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
inline double learning_rate(const OptimizerConfig& optimizer, int64_t total_steps, int64_t step) {
  const double lr = optimizer.lr, final_lr = optimizer.final_lr;
  const std::string& schedule = optimizer.schedule;
  const int64_t warmup = std::llround(optimizer.warmup_ratio * double(total_steps));
  const int64_t decay = std::llround(optimizer.decay_ratio * double(total_steps));
  step = std::min(step, total_steps);
  if (step <= warmup) return lr * double(step) / double(warmup);
  if (schedule == "constant") return lr;

  // The falling part is updates begin + 1 to total_steps.
  const int64_t begin = schedule == "wsd" ? total_steps - decay : warmup;
  if (step <= begin) return lr;
  const double t = double(step - begin) / double(total_steps - begin);
  if (schedule == "linear") return final_lr + (lr - final_lr) * (1 - t);
  if (schedule == "wsd" || schedule == "cosine")
    return final_lr + (lr - final_lr) * (1 + std::cos(std::numbers::pi * t)) / 2;
  fail_input("optimizer.schedule = \"{}\": expected wsd | cosine | linear | constant", schedule);
}

}  // namespace pith
