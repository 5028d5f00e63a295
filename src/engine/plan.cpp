#include "engine/train.h"
#include "ops/cuda.h"

namespace pith {

ModelOptions model_options(const RunConfig& run, Device device) {
  return {.dtype = parse_dtype(run.dtype),
          .device = device,
          .max_positions = run.data.sequence_length,
          .balance = run.balance,
          .bf16_grads = run.train.main_grad == "bf16"};
}

Context make_context(const RunConfig& run, Device device) {
  Context context{.device = device,
                  .planned = parse_device(run.device),
                  .dtype = parse_dtype(run.dtype),
                  .check_finite = run.debug.check_finite,
                  .sync = run.debug.sync,
                  .deterministic = run.deterministic};
  const auto wanted = [&](const char* what) {
    return std::ranges::count(run.train.recompute, what) > 0;
  };
  context.recompute = {wanted("norm"), wanted("swiglu"), wanted("gather"), wanted("stage1")};
  return context;
}

// What makes up the peak, largest first.
static std::string peak_table(size_t peak) {
  std::string out = fmt::format("{:<24} {:>7} {:>12}\n", "memory at the peak", "count", "MB");
  const auto row = [&](const std::string& name, const std::string& count, size_t bytes) {
    out += fmt::format("  {:<22} {:>7} {:>12.2f}\n", name, count, double(bytes) / 1e6);
  };
  size_t other = 0;
  for (const memory::Line& line : memory::planned_peak()) {
    if (line.bytes * 200 < peak)
      other += line.bytes;
    else
      row(line.name, std::to_string(line.count), line.bytes);
  }
  row("everything smaller", "", other);
  row("peak", "", peak);
  return out;
}

Plan make_plan(const RunConfig& run) {
  memory::reset_peak(Device::meta);
  Context context = make_context(run, Device::meta);
  const auto model = make_model(read_model_config(run.model), model_options(run, Device::meta));
  Optimizer optimizer(model->params, run, context);
  const int64_t library = context.planned == Device::cuda ? cuda::kGemmWorkspace : 0;
  const Tensor workspace({library}, DType::u8, Device::meta, "cublas_workspace");
  const size_t static_bytes = memory::live(Device::meta);
  Pipeline pipeline(*model, context, run.train);
  std::vector<Tensor> copies;  // of a save in the background, alive through the next steps
  if (run.checkpoint.background && run.checkpoint.every > 0) {
    for (const auto& p : model->params)
      for (const Tensor& t : {p->value, p->rest})
        if (t) copies.push_back(t.clone("checkpoint_copy"));
    for (const auto& s : optimizer.states()) copies.push_back(s.tensor.clone("checkpoint_copy"));
  }
  const int64_t rows = run.train.global_batch_size, tokens = rows * run.data.sequence_length;
  const auto ids = [&] { return Tensor({tokens}, DType::i32, Device::meta, "batch"); };
  const Tensor starts = run.data.document_mask ? ids() : Tensor();
  const Batch batch{ids(), ids(), ids(), starts, rows, run.data.sequence_length, tokens};
  pipeline.train_step(batch, !run.trace.routing.empty());
  const double step_flops = context.total.flops;
  optimizer.update(run.optimizer.lr, 1, double(tokens));
  const size_t peak = memory::peak(Device::meta);
  return {peak, peak_table(peak) +
                    fmt::format("parameters {:.3f} M, static {:.2f} MB, {:.3f} TFLOP per step\n",
                                double(model->params.trained_elements()) / 1e6,
                                double(static_bytes) / 1e6, step_flops / 1e12)};
}

}  // namespace pith
