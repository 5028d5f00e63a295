#include "engine/plan.h"

#include "engine/checkpoint.h"
#include "engine/optimizer.h"
#include "engine/pipeline.h"

namespace pith {

DType run_dtype(const RunConfig& run) { return parse_dtype(run.dtype); }

ModelOptions model_options(const RunConfig& run, Device device) {
  ModelOptions o;
  o.dtype = run_dtype(run);
  o.device = device;
  o.max_positions = run.data.sequence_length;
  const std::string& loss = run.balance.loss;
  o.balance.loss = loss == "micro_batch"    ? Balance::Loss::micro_batch
                   : loss == "sequence"     ? Balance::Loss::sequence
                   : loss == "global_batch" ? Balance::Loss::global_batch
                                            : Balance::Loss::none;
  o.balance.coefficient = run.balance.coefficient;
  o.balance.z_loss = run.balance.z_loss;
  o.balance.bias_update_rate = run.balance.bias_update_rate;
  o.balance.force = run.train.force_balance;
  return o;
}

namespace {

Batch meta_batch(int64_t rows, int64_t sequence, bool document_mask) {
  const auto ids = [&] { return Tensor({rows * sequence}, DType::i32, Device::meta, "batch"); };
  Batch b;
  b.tokens = ids();
  b.labels = ids();
  b.positions = ids();
  if (document_mask) b.document_start = ids();
  b.batch = rows;
  b.sequence = sequence;
  b.label_count = rows * sequence;
  return b;
}

}  // namespace

Plan make_plan(const RunConfig& run) {
  memory::reset_peak(Device::meta);
  memory::track(true);
  Context context;
  context.device = Device::meta;
  context.dtype = run_dtype(run);
  std::unique_ptr<Model> model = make_model(read_model_config(run.model), model_options(run, Device::meta));
  Optimizer optimizer(model->params, run, context);
  Plan plan;
  plan.static_bytes = memory::live(Device::meta);
  plan.parameters = model->params.trained_elements();
  Pipeline pipeline(*model, context, run.train);
  {
    const Batch batch = meta_batch(run.train.global_batch_size, run.data.sequence_length, run.data.document_mask);
    pipeline.train_step(batch, !run.trace.routing.empty());
    plan.step_flops = context.total.flops;
    const Optimizer::Norm norm = optimizer.grad_norm(double(batch.label_count));
    optimizer.update(run.optimizer.lr, 1, norm, double(batch.label_count));
  }
  plan.peak_bytes = memory::peak(Device::meta);
  plan.lines = memory::at_peak(Device::meta);
  memory::track(false);
  return plan;
}

std::string Plan::table() const {
  std::string out = fmt::format("{:<24} {:>7} {:>12}\n", "memory at the peak", "count", "MB");
  size_t other = 0;
  for (const memory::Line& line : lines) {
    if (line.bytes * 200 < peak_bytes) {
      other += line.bytes;
      continue;
    }
    out += fmt::format("  {:<22} {:>7} {:>12.2f}\n", line.name, line.count, double(line.bytes) / 1e6);
  }
  out += fmt::format("  {:<22} {:>7} {:>12.2f}\n", "everything smaller", "", double(other) / 1e6);
  out += fmt::format("  {:<22} {:>7} {:>12.2f}\n", "peak", "", double(peak_bytes) / 1e6);
  out += fmt::format("parameters {:.3f} M, static {:.2f} MB, {:.3f} TFLOP per step\n", double(parameters) / 1e6,
                     double(static_bytes) / 1e6, step_flops / 1e12);
  return out;
}

}  // namespace pith
