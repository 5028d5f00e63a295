#include <gtest/gtest.h>

#include <cmath>

#include "core/error.h"
#include "engine/optimizer.h"

namespace pith {
namespace {

OptimizerConfig with(const char* schedule, double warmup_ratio, double decay_ratio) {
  OptimizerConfig o;
  o.schedule = schedule;
  o.lr = 1.0;
  o.final_lr = 0.2;
  o.warmup_ratio = warmup_ratio;
  o.decay_ratio = decay_ratio;
  return o;
}

TEST(LearningRate, WarmUpIsLinearAndTheFirstUpdateCounts) {
  for (const char* schedule : {"wsd", "cosine", "linear", "constant"}) {
    const OptimizerConfig o = with(schedule, 0.04, 0.1);
    for (int64_t s = 1; s <= 4; ++s) {
      EXPECT_DOUBLE_EQ(learning_rate(o, 100, s), double(s) / 4) << schedule << " update " << s;
    }
  }
}

TEST(LearningRate, WsdIsFlatThenACosineToTheEnd) {
  const OptimizerConfig o = with("wsd", 0.04, 0.1);
  for (int64_t s = 4; s <= 90; ++s) EXPECT_EQ(learning_rate(o, 100, s), 1.0) << s;
  for (int64_t s = 91; s <= 100; ++s) {
    const double t = double(s - 90) / 10;
    EXPECT_NEAR(learning_rate(o, 100, s), 0.2 + 0.4 * (1 + std::cos(M_PI * t)), 1e-15) << s;
  }
  EXPECT_NEAR(learning_rate(o, 100, 95), 0.6, 1e-15);
}

TEST(LearningRate, CosineAndLinearFallAllTheWay) {
  // 104 updates: 4 of warm-up, 100 of descent; a quarter, half and three quarters down.
  const OptimizerConfig cosine = with("cosine", 4.0 / 104, 0.1),
                        linear = with("linear", 4.0 / 104, 0);
  EXPECT_NEAR(learning_rate(cosine, 104, 29), 0.2 + 0.4 * (1 + std::sqrt(0.5)), 1e-15);
  EXPECT_NEAR(learning_rate(cosine, 104, 54), 0.6, 1e-15);
  EXPECT_NEAR(learning_rate(linear, 104, 29), 0.8, 1e-15);
  EXPECT_NEAR(learning_rate(linear, 104, 54), 0.6, 1e-15);
  EXPECT_NEAR(learning_rate(linear, 104, 79), 0.4, 1e-15);
}

TEST(LearningRate, EndsAtExactlyTheFinalRate) {
  for (const char* schedule : {"wsd", "cosine", "linear"}) {
    for (const int64_t steps : {2, 3, 7, 100, 4096}) {
      OptimizerConfig o = with(schedule, 0.03, 0.5);
      o.lr = 3e-4;
      o.final_lr = 3e-5;
      EXPECT_EQ(learning_rate(o, steps, steps), 3e-5) << schedule << " of " << steps;
      EXPECT_EQ(learning_rate(o, steps, steps + 5), 3e-5) << schedule << " of " << steps;
      for (int64_t s = 1; s < steps; ++s) {
        EXPECT_GE(learning_rate(o, steps, s), 3e-5 * double(s > steps / 10)) << schedule << s;
        EXPECT_LE(learning_rate(o, steps, s), 3e-4) << schedule << s;
      }
    }
  }
  EXPECT_EQ(learning_rate(with("constant", 0.03, 0.5), 100, 100), 1.0);
}

TEST(LearningRate, SurvivesTheExtremes) {
  EXPECT_EQ(learning_rate(with("wsd", 0, 0), 10, 10), 1.0);    // nothing decays
  EXPECT_EQ(learning_rate(with("wsd", 0.5, 0.5), 3, 3), 0.2);  // rounded up, the phases overlap
  EXPECT_EQ(learning_rate(with("cosine", 1, 0), 10, 5), 0.5);  // nothing but warm-up
  EXPECT_EQ(learning_rate(with("linear", 1, 0), 10, 10), 1.0);
  EXPECT_EQ(learning_rate(with("wsd", 0.03, 0.1), 1, 1), 1.0);  // both round to no update
  EXPECT_EQ(learning_rate(with("cosine", 0.03, 0.1), 1, 1), 0.2);
  EXPECT_THROW(learning_rate(with("step", 0, 0), 10, 10), InputError);
}

}  // namespace
}  // namespace pith
