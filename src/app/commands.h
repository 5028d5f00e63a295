#pragma once
// The subcommands of `pith`, one function each. They return the exit code (0 done or PASS, 1 FAIL)
// and throw InputError (2) or Error (1).

#include "core/safetensors.h"
#include "data/tokenizer.h"
#include "engine/checkpoint.h"
#include "engine/pipeline.h"

namespace pith {

// Which model runs, and how: options that several subcommands share.
struct ModelArguments {
  std::string model, dtype = "fp32", device = "cpu";
};

// A model ready to run. Its parts refer to one another, so it stays where it is made.
struct Session {
  // With the weights of a Hugging Face directory, or with a config.json alone and parameters that
  // are not initialized; `training` allocates gradients and masters.
  Session(const ModelArguments& arguments, int64_t max_positions, int64_t micro_batch_size,
          bool training, const Value& config = {});
  Session(const Session&) = delete;

  Context context;
  std::unique_ptr<Model> model;
  Pipeline pipeline;
};

// `rows` sequences, row after row; labels below 0 are ignored. Positions count from the first in
// each.
Batch batch_of(const std::vector<int32_t>& tokens, const std::vector<int32_t>& labels, int64_t rows,
               int64_t first_position = 0);

// A directory that lives as long as this.
struct TemporaryDirectory {
  std::string path;
  TemporaryDirectory();
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  ~TemporaryDirectory();
};

// input_ids and labels (B, S) int64 of a golden file as one batch on the cpu, with ids of `model`.
Batch golden_batch(const Safetensors& golden, const std::string& model);

// One comparison; an error that is not a number is too large.
struct Row {
  std::string name;
  double error, allowed;
  bool ok() const { return error <= allowed; }
};
// What must be the same to the last bit.
inline Row exact(const std::string& name, bool same) { return {name, same ? 0.0 : HUGE_VAL, 0}; }
// Prints the worst rows and, on a line of its own, PASS or FAIL; gives the exit code.
int report(std::vector<Row> rows);

struct EvalOptions : ModelArguments {
  std::string data, choices, golden, dump;
  int64_t sequence_length = 0, batch_size = 8, max_batches = 0;
};
void run_eval(const EvalOptions& options);

struct GenerateOptions : ModelArguments {
  std::string prompt;
  int64_t tokens = 128, seed = 0;
  double temperature = 0.8, top_p = 0.95;
};
void run_generate(const GenerateOptions& options);

struct BenchOptions {
  std::string workload, routing = "balanced", model, trace;  // of train
  std::vector<std::string> overrides;
  int64_t steps = 20, warmup = 5;
  std::string filter;  // of ops
  std::string device = "auto", dtype = "bf16", json;
};
void bench_train(const BenchOptions& options);
void bench_ops(const BenchOptions& options);

struct VerifyOptions : ModelArguments {
  std::string golden, tokenizer, cases, checkpoint, against;
  double tolerance = 0;  // 0: the default of the mode
};
int run_verify(const VerifyOptions& options);

int run_check(const std::string& config);
int run_doctor();

}  // namespace pith
