#pragma once
// A run from its run file: what it will need, and the training itself.

#include "core/memory.h"
#include "engine/checkpoint.h"
#include "engine/metrics.h"
#include "engine/pipeline.h"

namespace pith {

struct Plan {
  size_t peak_bytes;  // high-water mark of a step, workspaces included
  // What makes up the peak, by name; parameters that are trained; static: weights, masters,
  // gradients, moments and tables; FLOP of matrix multiplications and attention, forward and
  // backward.
  std::string table;
};

Context make_context(const RunConfig& run, Device device);
ModelOptions model_options(const RunConfig& run, Device device);  // of a training run

// The memory plan: the real engine run on meta. No second description of any model exists.
Plan make_plan(const RunConfig& run);

// One run: everything that lives from the first step to the last. OUT must exist.
struct Trainer {
  const RunConfig& run;
  Device device = parse_device(run.device);
  double peak_flops = measure_peak_flops(parse_dtype(run.dtype), device);
  Context context = make_context(run, device);
  std::unique_ptr<Model> model =
      make_model(read_model_config(run.model), model_options(run, device));
  Optimizer optimizer = {model->params, run, context};
  Pipeline pipeline = {*model, context, run.train};
  Loader loader = {run.data.train, run.data.sequence_length, model->size.vocabulary,
                   run.data.document_mask, uint64_t(run.train.seed)};
  std::optional<Loader> validation = {};
  Checkpoints checkpoints = {run, *model, optimizer};
  int64_t host_syncs = 0;  // of the last timeline

  // From the newest checkpoint, the weights of a directory or random ones; gives the updates done.
  int64_t start();
  double validation_loss();
  // One update; `step` is its 1-based number. With a file it writes a timeline (core/tape.h).
  StepMetrics step(int64_t step, const std::string& timeline_file = "");
};

// Trains as the run file says, continuing from OUT/latest if there is one. SIGTERM, SIGUSR1 and
// SIGINT set a flag: the step under way is finished, a checkpoint written, and train returns.
void train(const RunConfig& run);

}  // namespace pith
