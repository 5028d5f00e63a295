#pragma once
// What a run reports after each update: the step line on stdout and in its log, metrics.jsonl and
// TensorBoard, all in the same words.

#include <chrono>

#include "core/file.h"
#include "core/tensor.h"
#include "engine/run_config.h"

namespace pith {

// The peak of this machine in FLOP/s for fp64, fp32 or bf16: the best rate of products after one
// another, for about 0.1 s. On the CPU every OpenMP thread multiplies matrices of its own at the
// same time and the rates are added, which no barrier and little other load can spoil; their memory
// is not counted in core/memory.h.
double measure_peak_flops(DType dtype, Device device);

struct StepMetrics {
  int64_t step = 0;              // updates done, this one included
  double loss = 0;               // cross entropy alone, mean over the labels of the step
  double balance_loss = 0;       // before the coefficient
  std::optional<double> z_loss;  // before the coefficient
  std::optional<double> validation_loss;
  double lr = 0;         // the one used
  double grad_norm = 0;  // before clipping
  double tokens_per_second = 0;
  double sol = 0;      // time of the necessary matmuls and attention at measured peak / step time
  double peak_gb = 0;  // 1e9 bytes
  double seconds = 0;  // of the step
  // By decoder layer of each MoE layer: tokens of its busiest expert / mean over its experts;
  // load_max is the largest of them.
  std::map<int, double> load;
};

// "step 200/4096  loss 3.2147  ...  load_max 1.9@L07  eta 52m", then "  validation_loss 3.1000"
// where measured.
std::string step_line(const StepMetrics& m, int64_t total_steps, double eta_seconds);

// One JSON object without the line end; reals round-trip, a non-finite number is null.
std::string step_json(const StepMetrics& m);

class Metrics {
 public:
  // Continues OUT/metrics.jsonl after update `done_steps`: lines of later updates and half-written
  // ones are dropped, atomically. TensorBoard events go to a new file,
  // OUT/tensorboard/events.out.tfevents.<time>.<pid>. OUT must exist. Formats: TFRecord
  // (tensorflow/core/lib/io/record_writer.h), event.proto and summary.proto of TensorFlow.
  Metrics(const RunConfig& run, int64_t done_steps);

  // Prints the line, whose eta is that of the run's last update, and appends to both files, a line
  // or an event in one write.
  void log(const StepMetrics& m);

 private:
  const TrainConfig train_;
  OutputFile json_, events_;
  const double start_;
  int64_t logged_ = 0;  // since then
};

}  // namespace pith
