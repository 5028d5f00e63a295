#pragma once
// One step of the model: all micro-batches, forward and backward, through the five stages of every
// layer. Backward leaves sum gradients in the parameters.

#include "engine/run_config.h"

namespace pith {

// What one step added up, over the global batch.
struct StepSums {
  Tensor losses;        // wide [micro-batches], sums of cross entropy over their labels
  double loss() const;  // their sum; on a GPU it waits for the step
  double labels = 0;
  Statistics statistics;                    // see models/model.h
  std::vector<std::vector<Routing>> trace;  // [micro-batch][MoE layer], if it was asked for
};

class Pipeline {
 public:
  Pipeline(Model& model, Context& context, const TrainConfig& train);

  // Forward and backward of a global batch. `replay` holds ids i32 [T of the global batch, K] per
  // MoE layer, or nothing.
  StepSums train_step(const Batch& batch, bool trace = false,
                      const std::vector<Tensor>& replay = {}) {
    return run_batch(batch, true, trace, replay);
  }

  // Forward only: the loss sum and the number of labels.
  StepSums evaluate(const Batch& batch) { return run_batch(batch, false, false, {}); }

  // Forward only, to logits: wide [T, V]. With caches in `mb`: generation.
  Tensor logits(const MicroBatch& mb);

 private:
  StepSums run_batch(const Batch& batch, bool train, bool trace, const std::vector<Tensor>& replay);
  struct LayerRecord;
  struct Record;  // what the forward of a micro-batch keeps for its backward
  Record forward(const MicroBatch& mb, WgradQueue* queue);  // nullptr: forward only
  void backward(Record& r);
  void forward_layer(Record& r, int64_t layer);
  void repeat_stage1(Record& r, int64_t layer);
  Carry backward_layer(Record& r, int64_t layer, Carry d_out);
  void flush();

  Model& model_;
  Context& context_;
  const TrainConfig train_;
  const Tensor one_;                // the gradient of a loss
  std::vector<WgradQueue> queues_;  // one per micro-batch whose weight gradients are outstanding
};

}  // namespace pith
