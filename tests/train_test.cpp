// Whole runs of the real program.

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <filesystem>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <thread>

#include "core/file.h"
#include "core/safetensors.h"
#include "core/value.h"
#include "engine/checkpoint.h"
#include "engine/trace.h"
#include "testing.h"

namespace pith {
namespace {

std::string last_line(const std::string& text) {
  const size_t end = text.find_last_not_of('\n');
  if (end == std::string::npos) return "";
  const size_t begin = text.rfind('\n', end);
  return text.substr(begin + 1, end - begin);
}

void expect_close(const std::vector<double>& a, const std::vector<double>& b, double tolerance) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i)
    EXPECT_NEAR(a[i], b[i], tolerance * std::max(1e-12, std::abs(b[i]))) << "step " << i + 1;
}

void expect_same_checkpoint(const TinyRun& run, const std::string& a, const std::string& b,
                            double tolerance = 0) {
  const Outcome o =
      run_pith(fmt::format("verify --checkpoint {}/latest --against {}/latest --tolerance {}",
                           run.path(a), run.path(b), tolerance));
  EXPECT_EQ(last_line(o.out), "PASS") << o.out << o.err;
  EXPECT_EQ(o.code, 0);
}

TEST(Golden, Qwen3MoeMatchesTransformers) {
  const std::string dir = golden_dir() + "/qwen3_moe";
  for (const char* dtype : {"fp32", "fp64", "bf16"}) {
    const Outcome o = run_pith(
        fmt::format("verify --model {0} --golden {0}/golden.safetensors --dtype {1}", dir, dtype));
    EXPECT_EQ(last_line(o.out), "PASS") << dtype << "\n" << o.out << o.err;
    EXPECT_EQ(o.code, 0);
  }
}

TEST(Golden, AWrongModelFails) {
  const std::string dir = golden_dir() + "/qwen3_moe";
  const TempDir other;
  std::filesystem::copy(dir + "/model.safetensors", other / "model.safetensors");
  std::string config = read_file(dir + "/config.json");
  const size_t at = config.find("1e-06");
  ASSERT_NE(at, std::string::npos);
  write_file_atomic(other / "config.json", config.replace(at, 5, "1e-02"));
  const Outcome o =
      run_pith(fmt::format("verify --model {} --golden {}/golden.safetensors", other.path, dir));
  EXPECT_EQ(last_line(o.out), "FAIL") << o.out << o.err;
  EXPECT_EQ(o.code, 1);
}

TEST(Train, LearnsAndEvaluates) {
  const TinyRun run;
  const Outcome o = run.train("x", "eval.every=10 train.steps=60");
  ASSERT_EQ(o.code, 0) << o.err;
  const std::vector<double> loss = run.series("x", "loss");
  ASSERT_EQ(loss.size(), 60u);
  EXPECT_NEAR(loss[0], std::log(61.0), 0.3);
  EXPECT_LT(loss.back(), loss[0] - 1.0);
  const auto metrics = run.metrics("x");
  EXPECT_EQ(metrics[9].count("validation_loss"), 1u);
  EXPECT_EQ(metrics[8].count("validation_loss"), 0u);
  EXPECT_NE(o.out.find("step 0/60  validation_loss "), std::string::npos) << o.out;
  EXPECT_NE(o.out.find("step 60/60  loss "), std::string::npos) << o.out;
  EXPECT_EQ(o.out.find('\r'), std::string::npos);
  const Outcome e = run_pith("eval --model " + run.path("x") +
                             "/latest --sequence-length 24 --data " + run.dir / "v");
  EXPECT_EQ(e.code, 0) << e.err;
  EXPECT_EQ(e.out.rfind("loss ", 0), 0u) << e.out;
}

// What went to the screen is in the log too: the plan, step lines, the end, errors.
TEST(Train, KeepsALog) {
  const TinyRun run;
  const std::string log = run.path("x") + "/logs/rank-0.log";
  const Outcome first = run.train("x", "eval.every=2 train.stop_after=2 train.steps=4");
  ASSERT_EQ(first.code, 0) << first.err;
  const std::string before = read_file(log);
  EXPECT_EQ(before.size(), first.out.size() + first.err.size());
  size_t at = 0;
  for (const char* text : {"memory at the peak", "step 0/4  validation_loss ", "step 1/4  loss ",
                           "step 2/4  loss ", "step 2/4  validation_loss", "done after step 2"}) {
    EXPECT_NE(at = before.find(text, at), before.npos) << text << "\n" << before;
    EXPECT_NE((first.out + first.err).find(text), before.npos) << text;
  }
  const Outcome second = run.train("x", "eval.every=2 train.steps=4 train.seed=2");
  ASSERT_EQ(second.code, 0) << second.err;
  EXPECT_EQ(read_file(log).substr(0, before.size()), before);
  const std::string after = read_file(log).substr(before.size());
  EXPECT_EQ(after.size(), second.out.size() + second.err.size());
  EXPECT_NE(after.find("warning: "), after.npos) << after;
  EXPECT_NE(after.find("continuing from "), after.npos) << after;

  const Outcome failed = run.train("y", "train.steps=1 data.train=/nowhere/c");
  EXPECT_EQ(failed.code, 2);
  EXPECT_EQ(read_file(run.path("y") + "/logs/rank-0.log"), failed.err);
  EXPECT_EQ(run.train("y", "train.steps=1 resume=false").code, 0);
}

TEST(Train, WritesATimeline) {
  const TinyRun run;
  const Outcome o = run.train("x", "train.steps=3 profile.steps=[2] eval.every=1");
  ASSERT_EQ(o.code, 0) << o.err;
  const std::string path = run.path("x") + "/profile/step-00000002.json";
  const Value trace = parse_json(read_file(path), path);
  std::map<std::string, std::set<int64_t>> layers;  // by stage
  for (const Value& event : trace.at("traceEvents").items()) {
    const Value& args = event.at("args");
    EXPECT_NE(args.at("at").as_string().find(".cpp:"), std::string::npos);
    layers[args.at("stage").as_string()].insert(args.at("layer").as_int());
  }
  const std::set<int64_t> none = {-1}, both = {0, 1};
  EXPECT_EQ(layers, (std::map<std::string, std::set<int64_t>>{{"embed", none},
                                                              {"stage1_attention_router", both},
                                                              {"stage3_experts", both},
                                                              {"head", none},
                                                              {"wgrad", both},
                                                              {"optimizer", none}}));
  EXPECT_TRUE(read_file(path + ".csv").starts_with("kernel_name,total_time_ms,instances,mean"));
  const std::string stages = read_file(path + ".stages.csv");
  EXPECT_TRUE(stages.starts_with("stage,total_time_ms,instances,share\n")) << stages;
  for (const char* stage : {"embed", "embed backward", "stage1_attention_router backward",
                            "stage3_experts", "head", "wgrad", "optimizer", "idle"})
    EXPECT_NE(stages.find(std::string("\n") + stage + ","), std::string::npos) << stages;
  EXPECT_NE(o.err.find("step 2, time by stage, in " + path + ".stages.csv"), std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(run.path("x") + "/profile/step-00000003.json"));
}

TEST(Train, ResumingRepeatsTheUninterruptedRun) {
  const TinyRun run;
  for (const char* dtype : {"fp32", "bf16", "fp64"}) {
    const std::string common = fmt::format(
        "dtype={} balance.loss=global_batch balance.coefficient=0.01 "
        "balance.bias_update_rate=0.01 balance.bias_export=drop eval.every=4",
        dtype);
    const std::string whole = std::string("whole-") + dtype, parts = std::string("parts-") + dtype;
    ASSERT_EQ(run.train(whole, common).code, 0);
    const Outcome first = run.train(parts, common + " train.stop_after=10");
    ASSERT_EQ(first.code, 0) << first.err;
    EXPECT_EQ(run.metrics(parts).size(), 10u);
    const Outcome second = run.train(parts, common);
    ASSERT_EQ(second.code, 0) << second.err;
    EXPECT_NE(second.err.find("continuing from"), std::string::npos);
    EXPECT_EQ(run.metrics(whole), run.metrics(parts));
    expect_same_checkpoint(run, whole, parts);
  }
}

TEST(Train, ASecondRunOfTheSameSeedIsBitIdenticalAndAnotherSeedIsNot) {
  const TinyRun run;
  for (const char* out : {"a", "b"}) ASSERT_EQ(run.train(out, "train.steps=8").code, 0);
  ASSERT_EQ(run.train("c", "train.steps=8 train.seed=2").code, 0);
  EXPECT_EQ(run.metrics("a"), run.metrics("b"));
  EXPECT_NE(run.metrics("a"), run.metrics("c"));
  const Outcome o = run_pith(fmt::format("verify --checkpoint {}/latest --against {}/latest",
                                         run.path("a"), run.path("c")));
  EXPECT_EQ(last_line(o.out), "FAIL");
  EXPECT_EQ(o.code, 1);
}

// The result does not depend on how the global batch is cut. micro_batch balancing is defined per
// micro-batch and is left out.
TEST(Train, MicroBatchSplitsAgreeInFp64) {
  const TinyRun run;
  const char* variants[] = {
      "", "balance.loss=sequence balance.coefficient=0.05",
      "balance.loss=global_batch balance.coefficient=0.05 balance.z_loss=0.01",
      "balance.bias_update_rate=0.01 balance.bias_export=drop",
      "data.document_mask=true optimizer.name=muon train.wgrad_micro_batches=4"};
  int n = 0;
  for (const char* variant : variants) {
    const std::string one = fmt::format("one{}", n), four = fmt::format("four{}", n++);
    const std::string common = std::string("dtype=fp64 ") + variant;
    const Outcome a = run.train(one, common + " train.micro_batch_size=8");
    const Outcome b = run.train(four, common + " train.micro_batch_size=2");
    ASSERT_EQ(a.code, 0) << a.err;
    ASSERT_EQ(b.code, 0) << b.err;
    for (const char* key : {"loss", "grad_norm"})
      expect_close(run.series(four, key), run.series(one, key), 1e-9);
    expect_same_checkpoint(run, four, one, 1e-9);
  }
}

TEST(Train, DeferredWeightGradientsChangeNothing) {
  const TinyRun run;
  ASSERT_EQ(run.train("now", "train.steps=6").code, 0);
  ASSERT_EQ(run.train("later", "train.steps=6 train.wgrad_micro_batches=3").code, 0);
  EXPECT_EQ(run.metrics("now"), run.metrics("later"));
  expect_same_checkpoint(run, "now", "later");
}

// Only memory changes.
TEST(Train, RecomputingChangesNothing) {
  const TinyRun run;
  const std::string settings =
      "train.steps=3 train.wgrad_micro_batches=2 balance.loss=micro_batch balance.coefficient=0.1 "
      "balance.z_loss=0.01 ";
  ASSERT_EQ(run.train("kept", settings).code, 0);
  for (const char* what :
       {"norm", "swiglu", "gather", "stage1", "norm\",\"swiglu\",\"gather\",\"stage1"}) {
    const Outcome o = run.train("again", settings + "'train.recompute=[\"" + what + "\"]'");
    ASSERT_EQ(o.code, 0) << o.err;
    EXPECT_EQ(run.metrics("kept"), run.metrics("again")) << what;
    expect_same_checkpoint(run, "kept", "again");
    std::filesystem::remove_all(run.dir / "again");
  }
}

TEST(Train, AReplayedTraceRepeatsTheRun) {
  const TinyRun run;
  ASSERT_EQ(run.train("traced", "train.steps=4 trace.routing=" + run.dir / "trace").code, 0);
  const Arrays arrays = read_npz(run.dir / "trace" + "/step-00000001.npz");
  ASSERT_EQ(arrays.size(), 2u);
  EXPECT_EQ(arrays.at("expert_ids").str(), "int32[2, 8, 24, 2] cpu");
  EXPECT_EQ(arrays.at("gate_weights").str(), "fp32[2, 8, 24, 2] cpu");
  const Outcome o = run.train("replayed", "train.steps=4 trace.replay=" + run.dir / "trace");
  ASSERT_EQ(o.code, 0) << o.err;
  EXPECT_EQ(run.metrics("traced"), run.metrics("replayed"));
  const Outcome other = run.train(
      "other", "train.steps=4 train.micro_batch_size=1 trace.replay=" + run.dir / "trace");
  ASSERT_EQ(other.code, 0) << other.err;
  expect_close(run.series("other", "loss"), run.series("traced", "loss"), 1e-5);
}

TEST(Train, ForcedBalanceIsBalanced) {
  const TinyRun run;
  ASSERT_EQ(run.train("x", "train.steps=2 train.force_balance=true").code, 0);
  for (double load : run.series("x", "load_max")) EXPECT_NEAR(load, 1.0, 1e-9);
}

TEST(Train, BalancingLowersTheLoad) {
  const TinyRun run;
  const std::string steps = "train.steps=80 ";
  ASSERT_EQ(run.train("none", steps).code, 0);
  ASSERT_EQ(run.train("loss", steps + "balance.loss=micro_batch balance.coefficient=0.3").code, 0);
  ASSERT_EQ(
      run.train("bias", steps + "balance.bias_update_rate=0.003 balance.bias_export=drop").code, 0);
  const auto tail = [&](const char* out) {
    const std::vector<double> load = run.series(out, "load_max");
    return std::accumulate(load.end() - 20, load.end(), 0.0) / 20;
  };
  EXPECT_LT(tail("loss"), 0.9 * tail("none"));
  EXPECT_LT(tail("bias"), 0.9 * tail("none"));
  EXPECT_GE(run.series("loss", "balance_loss").back(), 1.0 - 1e-6);
}

TEST(Train, ThePlanIsThePeak) {
  const TinyRun run;
  for (const char* variant :
       {"", "train.micro_batch_size=8 data.document_mask=true dtype=bf16",
        "optimizer.name=muon train.wgrad_micro_batches=4 balance.loss=sequence",
        "checkpoint.background=true checkpoint.every=1"}) {
    const std::string common = std::string("model=") + PITH_SOURCE_DIR +
                               "/examples/tiny/config.json " +
                               "train.steps=2 data.sequence_length=128 " + variant;
    const std::string out = fmt::format("x{}", std::string(variant).size());
    const Outcome o = run.train(out, common);
    ASSERT_EQ(o.code, 0) << o.err;
    const std::string text = read_file(run.path(out) + "/metrics.jsonl");
    const Value line = parse_json(text.substr(text.find('\n') + 1), "metrics.jsonl");
    const Outcome p =
        run_pith("plan " + run.dir / "run.toml" + " out=" + run.path(out) + " " + common);
    ASSERT_EQ(p.code, 0) << p.err;
    const double planned = std::stod(last_line(p.out).substr(std::string("peak_gb ").size()));
    EXPECT_NEAR(line.at("peak_gb").as_real() / planned, 1.0, 0.05) << variant << "\n" << p.out;
  }
}

TEST(Train, ASignalSavesAndExits) {
  const TinyRun run;
  for (int signal : {SIGTERM, SIGUSR1}) {
    const std::string out = fmt::format("signal-{}", signal);
    const std::string command = std::string(PITH_BINARY) + " " +
                                run.arguments(out, "train.steps=100000") + " >" + run.dir / "log" +
                                " 2>&1";
    const pid_t child = fork();
    if (child == 0) {
      execl("/bin/sh", "sh", "-c", ("exec " + command).c_str(), nullptr);
      _exit(127);
    }
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (std::chrono::steady_clock::now() < deadline) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      if (std::filesystem::exists(run.path(out) + "/metrics.jsonl") && !run.metrics(out).empty())
        break;
    }
    kill(child, signal);
    int status = 0;
    waitpid(child, &status, 0);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << read_file(run.dir / "log");
    const std::string latest = Checkpoints::latest(run.path(out));
    ASSERT_FALSE(latest.empty());
    EXPECT_NE(latest.find(fmt::format("step-{:08d}", run.metrics(out).size())), std::string::npos)
        << latest;
  }
}

TEST(Train, KillingAtRandomMomentsLosesNothing) {
  const TinyRun run;
  const std::string settings = "train.steps=60 checkpoint.every=2 checkpoint.keep_last=2";
  ASSERT_EQ(run.train("whole", settings).code, 0);
  std::mt19937 random(7);
  int64_t reached = 0;
  for (int kills = 0; kills < 20; ++kills) {
    const std::string command = "exec " + std::string(PITH_BINARY) + " " +
                                run.arguments("killed", settings) + " >" + run.dir / "log" +
                                " 2>&1";
    const pid_t child = fork();
    if (child == 0) {
      execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
      _exit(127);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(250 + random() % 300));
    kill(child, SIGKILL);
    int status = 0;
    waitpid(child, &status, 0);
    EXPECT_TRUE(WIFSIGNALED(status) || WEXITSTATUS(status) == 0) << read_file(run.dir / "log");
    const std::string latest = Checkpoints::latest(run.path("killed"));
    const int64_t step = latest.empty() ? 0 : std::stoll(latest.substr(latest.rfind('-') + 1));
    EXPECT_GE(step, reached) << "a checkpoint was lost";
    reached = step;
  }
  const Outcome o = run.train("killed", settings);
  ASSERT_EQ(o.code, 0) << o.err;
  EXPECT_EQ(run.metrics("whole"), run.metrics("killed"));
  expect_same_checkpoint(run, "whole", "killed");
}

TEST(Train, ANonFiniteGradientStopsTheRunAndNamesTheParameter) {
  const TinyRun run;
  ASSERT_EQ(run.train("good", "train.steps=1").code, 0);
  // A Hugging Face directory whose second layer holds a NaN.
  std::filesystem::copy(run.path("good") + "/step-00000001", run.dir / "bad");
  const Safetensors file(run.dir / "bad");
  const SafetensorsEntry entry = file.entry("model.layers.1.mlp.experts.3.down_proj.weight");
  const std::string path = run.dir / "bad" + "/model.safetensors";
  std::string bytes = read_file(path);
  const uint64_t header = *reinterpret_cast<const uint64_t*>(bytes.data());
  for (uint64_t i = entry.begin; i < entry.end; i += 2)
    bytes.replace(8 + header + i, 2, "\xff\x7f");
  write_file_atomic(path, bytes);
  const Outcome o = run.train("x", "train.steps=3 model=" + run.dir / "bad");
  EXPECT_EQ(o.code, 1);
  EXPECT_NE(o.err.find("step 1:"), std::string::npos) << o.err;
  EXPECT_NE(o.err.find("not finite"), std::string::npos) << o.err;
  EXPECT_NE(o.err.find("gradient of model."), std::string::npos) << o.err;
  EXPECT_EQ(Checkpoints::latest(run.path("x")), "");
  const Outcome named =
      run.train("y", "train.steps=3 debug.check_finite=true model=" + run.dir / "bad");
  EXPECT_EQ(named.code, 1);
  EXPECT_NE(named.err.find("qwen3_moe.cpp:"), std::string::npos) << named.err;
}

TEST(Train, StartsFromAHuggingFaceDirectory) {
  const TinyRun run;
  ASSERT_EQ(run.train("first", "train.steps=60").code, 0);
  ASSERT_EQ(run.train("second", "train.steps=2 model=" + run.path("first") + "/latest").code, 0);
  EXPECT_LT(run.series("second", "loss")[0], run.series("first", "loss")[0] - 0.8);
}

TEST(Train, BackgroundCheckpointsAreTheSame) {
  const TinyRun run;
  ASSERT_EQ(run.train("front", "train.steps=6 checkpoint.every=2").code, 0);
  ASSERT_EQ(run.train("back", "train.steps=6 checkpoint.every=2 checkpoint.background=true").code,
            0);
  expect_same_checkpoint(run, "front", "back");
}

TEST(Train, RefusesToStartTwiceInOneDirectory) {
  const TinyRun run;
  ASSERT_EQ(run.train("x", "train.steps=2").code, 0);
  const Outcome o = run.train("x", "train.steps=2 resume=false");
  EXPECT_EQ(o.code, 2);
  EXPECT_NE(o.err.find("not empty"), std::string::npos) << o.err;
}

TEST(Check, TheTinyModelPassesAndABigOneIsShrunk) {
  const Outcome o = run_pith("check " + golden_dir() + "/qwen3_moe");
  EXPECT_EQ(last_line(o.out), "PASS") << o.out << o.err;
}

}  // namespace
}  // namespace pith
