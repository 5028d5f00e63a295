#include "engine/metrics.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/file.h"
#include "core/value.h"
#include "testing.h"

namespace pith {
namespace {

StepMetrics example(int64_t step) {
  StepMetrics m;
  m.step = step;
  m.loss = 3.2147;
  m.balance_loss = 1.031;
  m.lr = 3e-4;
  m.grad_norm = 0.412;
  m.tokens_per_second = 82140;
  m.sol = 0.81;
  m.peak_gb = 96.3;
  m.seconds = 0.5;
  m.load = {{1, 1.25}, {7, 1.9}, {8, 1.5}};
  return m;
}

// Logs the steps [first, last] of a run that has done first - 1, and gives what it printed.
std::string log_steps(const std::string& out, int64_t first, int64_t last, int64_t stop_after = 0) {
  testing::internal::CaptureStdout();
  {
    RunConfig run;
    run.out = out;
    run.train.steps = 4096;
    run.train.stop_after = stop_after;
    Metrics metrics(run, first - 1);
    for (int64_t s = first; s <= last; ++s) metrics.log(example(s));
  }
  return testing::internal::GetCapturedStdout();
}

std::vector<int64_t> steps_in(const std::string& path) {
  std::vector<int64_t> steps;
  const std::string text = read_file(path);
  for (size_t begin = 0, end; (end = text.find('\n', begin)) != text.npos; begin = end + 1) {
    steps.push_back(parse_json(text.substr(begin, end - begin), path).at("step").as_int());
  }
  EXPECT_TRUE(text.empty() || text.back() == '\n');
  return steps;
}

TEST(Metrics, StepLineIsInTheWordsOfTheContract) {
  const std::string line =
      "step 200/4096  loss 3.2147  balance_loss 1.031  lr 3.00e-04  grad_norm 0.412  "
      "tokens_per_second 82140  sol 0.81  peak_gb 96.3  load_max 1.9@L07  eta 52m";
  StepMetrics m = example(200);
  EXPECT_EQ(step_line(m, 4096, 52 * 60), line);
  m.validation_loss = 3.1;
  EXPECT_EQ(step_line(m, 4096, 52 * 60), line + "  validation_loss 3.1000");
}

TEST(Metrics, EtaIsShort) {
  const std::pair<double, const char*> cases[] = {
      {0, "0s"},       {41.4, "41s"},   {59.6, "1m"},        {3569, "59m"},
      {3600, "1h00m"}, {3599, "1h00m"}, {11100, "3h05m"},    {187200, "2d04h"},
      {1e300, "?"},    {-1, "?"},       {std::nan(""), "?"},
  };
  for (const auto& [seconds, text] : cases) {
    const std::string line = step_line(example(1), 2, seconds);
    EXPECT_EQ(line.substr(line.find("eta ") + 4), text);
  }
}

TEST(Metrics, JsonRoundTripsEveryBit) {
  StepMetrics m = example(3);
  m.loss = std::nextafter(3.2147, 4);
  m.grad_norm = 1.0 / 3;
  m.z_loss = 5e-324;
  m.validation_loss = 3.0;
  const std::string json = step_json(m);
  EXPECT_EQ(json.find('\n'), json.npos);
  const Value v = parse_json(json, "line");
  EXPECT_EQ(v.at("step").as_int(), 3);
  EXPECT_EQ(v.at("loss").as_real(), m.loss);
  EXPECT_EQ(v.at("grad_norm").as_real(), m.grad_norm);
  EXPECT_EQ(v.at("z_loss").as_real(), 5e-324);
  EXPECT_EQ(v.at("validation_loss").as_real(), 3.0);
  EXPECT_EQ(v.at("load_max").as_real(), 1.9);
  EXPECT_EQ(v.at("load_max_layer").as_int(), 7);
  EXPECT_EQ(v.at("load_max_by_layer").items().size(), 3u);
  for (const char* key : {"balance_loss", "lr", "tokens_per_second", "sol", "peak_gb", "seconds"}) {
    EXPECT_NE(v.find(key), nullptr) << key;
  }
  EXPECT_EQ(parse_json(step_json(example(3)), "line").find("validation_loss"), nullptr);
}

TEST(Metrics, NonFiniteNumbersAreNull) {
  StepMetrics m = example(1);
  m.loss = std::numeric_limits<double>::quiet_NaN();
  m.grad_norm = std::numeric_limits<double>::infinity();
  const Value v = parse_json(step_json(m), "line");
  EXPECT_TRUE(v.at("loss").is_null());
  EXPECT_TRUE(v.at("grad_norm").is_null());
  EXPECT_NE(step_line(m, 10, 1).find("loss nan"), std::string::npos);
}

TEST(Metrics, WritesAllThreeAndContinuesWhereTheCheckpointIs) {
  TempDir dir;
  const std::string path = dir / "metrics.jsonl";
  const std::string printed = log_steps(dir.path, 1, 5);
  EXPECT_EQ(printed.find("step 1/4096  loss 3.2147"), 0u);
  EXPECT_EQ(std::count(printed.begin(), printed.end(), '\n'), 5);
  EXPECT_EQ(printed.find('\r'), printed.npos);
  EXPECT_EQ(steps_in(path), (std::vector<int64_t>{1, 2, 3, 4, 5}));

  // Killed while it wrote update 6; the checkpoint is of update 3.
  OutputFile(path, true).write("{\"step\":6,\"lo", 13);
  log_steps(dir.path, 4, 4);
  EXPECT_EQ(steps_in(path), (std::vector<int64_t>{1, 2, 3, 4}));

  // Half a line from the updates that are kept.
  OutputFile(path, true).write("{\"step\":5", 9);
  log_steps(dir.path, 10, 10);
  EXPECT_EQ(steps_in(path), (std::vector<int64_t>{1, 2, 3, 4, 10}));

  log_steps(dir.path, 1, 1);  // a new run
  EXPECT_EQ(steps_in(path), (std::vector<int64_t>{1}));

  struct stat info {};
  EXPECT_EQ(::stat((dir / "tensorboard").c_str(), &info), 0);
}

TEST(Metrics, EtaIsThatOfTheLastUpdateOfThisRun) {
  TempDir dir;
  const std::string whole = log_steps(dir.path, 1, 1), part = log_steps(dir.path, 1, 1, 1);
  EXPECT_NE(part.find("step 1/4096  "), part.npos) << part;
  EXPECT_NE(part.find("eta 0s"), part.npos) << part;
  EXPECT_NE(log_steps(dir.path, 4096, 4096, 5000).find("eta 0s"), part.npos);
  EXPECT_EQ(whole.find("step 1/4096  "), 0u) << whole;
}

TEST(Metrics, RefusesADirectoryThatIsNotThere) {
  RunConfig run;
  run.out = "/nonexistent/run";
  EXPECT_THROW(Metrics(run, 0), InputError);
}

TEST(RunLock, IsHeldByOneProcessAndFreedWhenItEnds) {
  TempDir dir;
  int ready[2], done[2];
  ASSERT_EQ(::pipe(ready), 0);
  ASSERT_EQ(::pipe(done), 0);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  char byte = 'x';
  if (child == 0) {
    const RunLock lock(dir.path);
    if (::write(ready[1], &byte, 1) != 1 || ::read(done[0], &byte, 1) != 1) ::_exit(1);
    ::_exit(0);  // no destructor runs
  }
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  try {
    RunLock second(dir.path);
    ADD_FAILURE() << "two processes hold the lock";
  } catch (const InputError& e) {
    const std::string expected = dir.path + " is in use by process " + std::to_string(child) + ":";
    EXPECT_EQ(std::string(e.what()).substr(0, expected.size()), expected);
  }
  ASSERT_EQ(::write(done[1], &byte, 1), 1);
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  { const RunLock free_again(dir.path); }
  EXPECT_EQ(read_file(dir / ".lock"), std::to_string(::getpid()));
  EXPECT_THROW(RunLock("/nonexistent/run"), InputError);
  for (const int fd : {ready[0], ready[1], done[0], done[1]}) ::close(fd);
}

}  // namespace
}  // namespace pith
