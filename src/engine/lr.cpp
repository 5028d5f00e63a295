#include "engine/lr.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/error.h"

namespace pith {

double learning_rate(const OptimizerConfig& optimizer, int64_t total_steps, int64_t step) {
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
  if (schedule == "wsd" || schedule == "cosine") {
    return final_lr + (lr - final_lr) * (1 + std::cos(std::numbers::pi * t)) / 2;
  }
  fail_input("optimizer.schedule = \"{}\": expected wsd | cosine | linear | constant", schedule);
}

}  // namespace pith
