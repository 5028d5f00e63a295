#pragma once
// A checkpoint is a Hugging Face model directory: OUT/step-00000200/ with config.json,
// generation_config.json, tokenizer files and model*.safetensors (bf16), beside trainer/ with
// everything an exact continuation needs. It is written under a temporary name, synced and renamed;
// OUT/latest is a relative symlink replaced by rename. A crash at any moment leaves the last good
// one.

#include <future>

#include "engine/optimizer.h"

namespace pith {

// Reads weights by Hugging Face name into value and master of every trained or exported parameter,
// slicing what it needs. For each parameter the first source form whose tensors all exist is taken.
// InputError for a missing tensor, a wrong shape, or a tensor in the directory that is neither read
// nor matched by `ignored` (fnmatch patterns).
void load_weights(ParamSet& params, const std::string& directory,
                  const std::vector<std::string>& ignored);
bool has_weights(const std::string& path);  // a directory with model.safetensors or its index

// The config.json of a model argument: a file, or a directory holding one.
Value read_model_config(const std::string& path);

class Checkpoints {
 public:
  // Removes what an interrupted save left behind. `out` exists. InputError if the model trains a
  // router bias that Hugging Face has no tensor for and balance.bias_export is "refuse", or if the
  // tokenizer cannot be read or has more tokens than the model. Destruction waits for a background
  // save.
  Checkpoints(const RunConfig& run, Model& model, Optimizer& optimizer);

  // The state after `step` updates. With checkpoint.background the tensors are copied and written
  // by a thread; at most one is under way, and its failure is thrown by the next call. InputError
  // when it cannot be written (full disk, no permission): nothing of it is left then, and `latest`
  // is as it was. Keeps the newest checkpoint.keep_last.
  void save(int64_t step);
  void finish();  // waits for a background save and throws its failure

  // What OUT/latest points to; if that is no complete checkpoint, the newest one of OUT ("" if
  // none).
  static std::string latest(const std::string& out);

  // Restores masters, values, moments and untrained state exactly; returns the step. InputError if
  // the checkpoint is another model's or another optimizer's, naming the first difference. Warns
  // when seed, dtype, threads or ISA differ (the continuation is then not bit-identical).
  int64_t load(const std::string& directory);

 private:
  const RunConfig& run_;
  Model& model_;
  Optimizer& optimizer_;
  const std::map<std::string, std::string> files_;  // the text files of every checkpoint, by name
  std::future<void> pending_;
};

}  // namespace pith
