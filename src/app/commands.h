#pragma once
// The subcommands of `pith`, one function each. They return the exit code (0 done or PASS, 1 FAIL)
// and throw InputError (2) or Error (1).

#include <memory>
#include <string>
#include <vector>

#include "engine/pipeline.h"
#include "models/model.h"

namespace pith {

// A model read from a Hugging Face directory, ready to run.
struct LoadedModel {
  Context context;
  std::unique_ptr<Model> model;
  std::unique_ptr<Pipeline> pipeline;
  int64_t max_positions = 0;
};
// `training` allocates gradients and masters. `device` is cpu; anything else is refused.
std::unique_ptr<LoadedModel> load_model(const std::string& directory, const std::string& dtype,
                                        const std::string& device, int64_t max_positions,
                                        int64_t micro_batch_size, bool training);

// `rows` sequences, row after row; labels below 0 are ignored. Positions count from 0 in each.
Batch batch_of(const std::vector<int32_t>& tokens, const std::vector<int32_t>& labels,
               int64_t rows);

// input_ids and labels (B, S) int64 of a golden file as one batch on the cpu.
Batch golden_batch(const class Safetensors& golden, int64_t vocabulary);

struct EvalOptions {
  std::string model, data, choices, golden, dump, dtype = "fp32", device = "cpu";
  int64_t sequence_length = 0, batch_size = 8, max_batches = 0;
};
int run_eval(const EvalOptions& options);

struct GenerateOptions {
  std::string model, prompt, dtype = "fp32", device = "cpu";
  int64_t tokens = 128;
  double temperature = 0.8, top_p = 0.95;
  int64_t seed = 0;
};
int run_generate(const GenerateOptions& options);

struct VerifyOptions {
  std::string model, golden, tokenizer, cases, checkpoint, against, dtype = "fp32", device = "cpu";
  double tolerance = -1;  // negative: the default of the mode
};
int run_verify(const VerifyOptions& options);

int run_check(const std::string& config);
int run_doctor();

}  // namespace pith
