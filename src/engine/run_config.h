#pragma once
// The run file: plain structs, one member per key, whose defaults are the defaults of the keys.
// Paths are relative to the working directory.

#include "models/model.h"

namespace pith {

// The prefix of PREFIX.bin and PREFIX.idx, and its share of the tokens relative to other corpora.
using WeightedCorpus = std::pair<std::string, double>;

struct DataConfig {
  std::vector<WeightedCorpus> train;    // required
  std::vector<std::string> validation;  // corpus prefixes
  int64_t sequence_length = 2048;
  bool document_mask = false;  // packed documents do not see each other
};

struct TrainConfig {
  int64_t steps = 1000;            // length of the schedule, in updates
  int64_t stop_after = 0;          // end after that update, the schedule untouched; 0 = at `steps`
  int64_t global_batch_size = 64;  // sequences per update
  int64_t micro_batch_size = 1;
  int64_t seed = 1234;
  double max_minutes = 0;           // 0 = no limit
  int64_t wgrad_micro_batches = 1;  // weight gradients of so many micro-batches in one GEMM
  std::string main_grad = "fp32";   // fp32 | bf16
  std::vector<std::string> recompute;

  int64_t last_step() const { return stop_after > 0 ? std::min(stop_after, steps) : steps; }
};

struct OptimizerConfig {
  std::string name = "adamw";  // adamw | muon
  double lr = 3e-4;
  double final_lr = 3e-5;
  std::string schedule = "wsd";  // wsd | cosine | linear | constant (engine/optimizer.h)
  double warmup_ratio = 0.03;    // of train.steps
  double decay_ratio = 0.1;      // of train.steps; wsd only
  std::array<double, 2> betas = {0.9, 0.95};
  double eps = 1e-8;
  double momentum = 0.95;  // muon
  double weight_decay = 0.1;
  double clip_norm = 1.0;  // 0 = no clipping
};

struct RunConfig {
  std::string model;      // required: a config.json or a Hugging Face directory
  std::string tokenizer;  // tokenizer.json or a directory, copied into checkpoints; empty = none
  std::string out;        // required: run directory
  std::string device = "auto";  // cpu | cuda | auto
  std::string dtype = "bf16";   // compute: bf16 | fp32 | fp64
  bool deterministic = false;
  bool resume = true;  // false: refuse a directory that is not empty
  DataConfig data;
  TrainConfig train;
  OptimizerConfig optimizer;
  Balance balance;
  struct {
    int64_t every = 0;  // updates; 0 = never
    int64_t batches = 8;
  } eval;
  struct {
    int64_t every = 0;  // updates; 0 = only at the end
    int64_t keep_last = 3;
    bool background = false;
  } checkpoint;
  struct {
    int64_t pp = 1, cp = 1, ep = 1;
    std::string shard = "full";  // full | replicate_over_dp
    double timeout_seconds = 900;
  } mesh;
  struct {
    std::vector<int64_t> steps;  // updates of which a timeline is written
  } profile;
  struct {
    std::string routing;  // directory that the routing trace is written to; empty = none
    std::string replay;  // directory of a trace whose expert ids replace the router's; empty = none
  } trace;
  struct {
    bool sync = false;
    bool check_finite = false;
  } debug;

  // The resolved configuration, every key written out. load_run_config reads the same back.
  std::string to_toml() const;
};

// Reads the run file, applies `overrides` ("section.key=value" with a TOML value; what is no TOML
// value, as in device=cpu, is a string) and checks every rule that concerns the run file alone.
// InputError names file, line and key: "run.toml:12: train.step: unknown key; did you mean
// train.steps?", or the key, its value and what would be right.
RunConfig load_run_config(const std::string& path, const std::vector<std::string>& overrides = {});

}  // namespace pith
