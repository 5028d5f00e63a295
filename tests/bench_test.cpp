// pith bench: what it prints and writes, on the smallest workload.

#include <gtest/gtest.h>

#include <cmath>

#include "core/file.h"
#include "core/value.h"
#include "testing.h"

namespace pith {
namespace {

TEST(Bench, TrainGivesTheFiguresOfAWorkload) {
  const TempDir dir;
  const std::string file = dir / "bench.json", trace = dir / "trace.json";
  for (const char* routing : {"balanced", "real"}) {
    const Outcome o =
        run_pith("bench train --workload tiny --device cpu --steps 3 --warmup 1 --json " + file +
                 " --trace " + trace + " --routing " + routing);
    ASSERT_EQ(o.code, 0) << o.err;
    const Value result = parse_json(read_file(file), file);
    EXPECT_EQ(parse_json(o.out, "stdout").json(), result.json());
    const auto number = [&](const char* key) { return result.at(key).as_real(); };
    EXPECT_EQ(result.at("workload").as_string(), "tiny");
    EXPECT_EQ(result.at("routing").as_string(), routing);
    EXPECT_EQ(result.at("device").as_string(), "cpu");
    EXPECT_EQ(number("steps"), 3);
    EXPECT_NEAR(number("tokens_per_second") * number("step_seconds"), 8 * 64, 1e-6);
    EXPECT_GT(number("first_step_seconds"), 0);
    EXPECT_NEAR(number("peak_gb") / number("planned_gb"), 1, 0.05);
    EXPECT_GT(number("sol"), 0);
    EXPECT_EQ(number("host_syncs"), 0);
    EXPECT_NEAR(number("loss"), std::log(512), 0.2);  // random ids
    EXPECT_NE(read_file(trace + ".stages.csv").find("\noptimizer,"), std::string::npos);
  }
}

TEST(Bench, TrainTakesKeysOfTheRunFile) {
  const Outcome o = run_pith(
      "bench train --workload tiny --device cpu --steps 1 --warmup 1 dtype=fp32 "
      "train.global_batch_size=2 data.sequence_length=32");
  ASSERT_EQ(o.code, 0) << o.err;
  const Value result = parse_json(o.out, "stdout");
  EXPECT_EQ(result.at("dtype").as_string(), "fp32");
  EXPECT_NEAR(result.at("tokens_per_second").as_real() * result.at("step_seconds").as_real(),
              2 * 32, 1e-6);
}

TEST(Bench, OpsGivesEveryPassWithItsShareOfTheCeiling) {
  const TempDir dir;
  const std::string file = dir / "ops.json";
  const Outcome o = run_pith("bench ops --device cpu --dtype fp32 --filter l --json " + file);
  ASSERT_EQ(o.code, 0) << o.err;
  const Value result = parse_json(read_file(file), file);
  EXPECT_GT(result.at("peak_tflops").as_real(), 0);
  EXPECT_GT(result.at("copy_tbps").as_real(), 0);
  std::map<std::string, int> passes;
  for (const Value& row : result.at("ops").items()) {
    const std::string op = row.at("op").as_string();
    ++passes[op + " " + row.at("pass").as_string()];
    EXPECT_NE(o.out.find(op), std::string::npos);
    EXPECT_GT(row.at("microseconds").as_real(), 0) << op;
    EXPECT_GT(row.at("share").as_real(), 0) << op;
    EXPECT_GT(row.at("tflops").as_real() + row.at("tbps").as_real(), 0) << op;
  }
  EXPECT_EQ(passes["linear qkv forward"], 2);
  EXPECT_EQ(passes["linear o backward"], 2);
  EXPECT_EQ(passes["grouped_linear gate_up forward"], 3);
  EXPECT_EQ(passes["grouped_linear down backward"], 3);
  for (const char* records : {"x1", "x2", "x4", "x8"})
    EXPECT_EQ(passes[std::string("grouped_linear down wgrad ") + records + " forward"], 3);
  EXPECT_EQ(passes["swiglu backward"], 1);
  EXPECT_EQ(passes["head_loss forward"], 1);
  EXPECT_EQ(passes["adamw forward"], 0);  // not asked for
}

TEST(Bench, BadUsageIsOneClearLine) {
  const std::pair<const char*, const char*> cases[] = {
      {"bench train --workload W9", "--workload W9: expected W1, W2, W3, W4, W5, W6 or tiny"},
      {"bench train", "--workload is required"},
      {"bench train --workload tiny --routing skewed", "--routing"},
      {"bench train --workload tiny --steps 0", "--steps"},
      {"bench train --workload tiny train.step=3", "did you mean train.steps?"},
      {"bench ops --filter nothing_like_it", "--filter nothing_like_it"},
      {"bench ops --dtype fp8", "fp8"},
      {"bench", "bench"}};
  for (const auto& [arguments, says] : cases) {
    const Outcome o = run_pith(arguments);
    EXPECT_EQ(o.code, 2) << arguments;
    EXPECT_EQ(std::count(o.err.begin(), o.err.end(), '\n'), 1) << o.err;
    EXPECT_NE(o.err.find(says), std::string::npos) << o.err;
  }
}

}  // namespace
}  // namespace pith
