// pith check: a model against itself, after any edit of a model file. Small fp64 runs on random
// tokens.

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <numeric>

#include "app/commands.h"
#include "core/rng.h"
#include "engine/checkpoint.h"

namespace pith {
namespace {

constexpr int64_t kRows = 4, kSequence = 16, kLargest = 30'000'000;

// The same architecture, small: sizes that a laptop checks in seconds. Ratios (heads per kv head,
// chosen of experts) keep their kind.
Value shrunk(Value config) {
  const std::pair<const char*, int64_t> caps[] = {
      {"num_hidden_layers", 2},      {"hidden_size", 64},       {"num_attention_heads", 4},
      {"num_key_value_heads", 2},    {"head_dim", 16},          {"intermediate_size", 96},
      {"vocab_size", 256},           {"num_experts", 8},        {"num_local_experts", 8},
      {"moe_intermediate_size", 32}, {"num_experts_per_tok", 2}};
  for (const auto& [key, cap] : caps)
    if (const Value* v = config.find(key); v && !v->is_null())
      config[key] = std::min(v->as_int(), cap);
  config["mlp_only_layers"] = Value::array();  // so that experts remain
  config["decoder_sparse_step"] = 1;
  return config;
}

Batch random_batch(int64_t vocabulary) {
  std::vector<int32_t> tokens, labels;
  for (uint64_t i = 0; i < kRows * kSequence; ++i) {
    tokens.push_back(int32_t(uniform(1, i) * double(vocabulary)));
    labels.push_back(i % 7 == 3 ? -100 : int32_t(uniform(2, i) * double(vocabulary)));
  }
  return batch_of(tokens, labels, kRows);
}

struct Check {
  Value config;
  bool ok = true;

  struct Run {
    Context context;
    std::unique_ptr<Model> model;
    std::unique_ptr<Pipeline> pipeline;
    Batch batch;
  };

  Run make(DType dtype) const {
    Run r;
    r.context.dtype = dtype;
    ModelOptions options;
    options.dtype = dtype;
    options.max_positions = kSequence;
    r.model = make_model(config, options);
    r.model->params.initialize(
        1, 0.1);  // larger than usual, so that no gradient hides in the rounding
    r.batch = random_batch(r.model->size.vocabulary);
    return r;
  }

  // The pipeline keeps references, so it is made once the run has its place.
  static void start(Run& r, int64_t micro_batch_size) {
    TrainConfig train;
    train.micro_batch_size = micro_batch_size;
    r.pipeline = std::make_unique<Pipeline>(*r.model, r.context, train);
  }

  void verdict(const char* what, bool passed, const std::string& detail) {
    fmt::print("{:<44} {}  {}\n", what, passed ? "ok  " : "FAIL", detail);
    ok = ok && passed;
  }

  // d loss / d parameter along a random direction against a central difference, for every
  // parameter.
  void derivatives() {
    Run r = make(DType::f64);
    start(r, kRows);
    r.pipeline->train_step(r.batch);
    double worst = 0;
    std::string where = "none", missing;
    for (const auto& p : r.model->params) {
      if (!p->trained()) continue;
      if (!p->grad_written) missing = p->name;
      const std::vector<double> grad = p->grad.to_vector<double>(),
                                kept = p->value.to_vector<double>();
      double analytic = 0, norm = 0;
      std::vector<double> direction(grad.size());
      for (size_t i = 0; i < grad.size(); ++i) {
        direction[i] = normal(stream_key(3, p->name), i);
        analytic += grad[i] * direction[i];
        norm += grad[i] * grad[i];
      }
      const auto loss_at = [&](double h) {
        std::vector<double> moved = kept;
        for (size_t i = 0; i < moved.size(); ++i) moved[i] += h * direction[i];
        p->value.copy_from(Tensor::of<double>(p->shape, moved));
        return r.pipeline->evaluate(r.batch).loss;
      };
      const double h = 1e-6,
                   numeric = (8 * (loss_at(h) - loss_at(-h)) - (loss_at(2 * h) - loss_at(-2 * h))) /
                             (12 * h);
      p->value.copy_from(Tensor::of<double>(p->shape, kept));
      const double error = std::abs(analytic - numeric) / std::max(std::sqrt(norm), 1e-2);
      if (!(error <= worst)) worst = error, where = p->name;
    }
    verdict("every parameter gets a gradient", missing.empty(), missing);
    verdict("directional derivative of every parameter", worst <= 1e-4,
            fmt::format("worst {:.1e} {}", worst, where));
  }

  void micro_batches() {
    std::vector<std::vector<double>> grads;
    for (int64_t size : {kRows, int64_t(1)}) {
      Run r = make(DType::f64);
      start(r, size);
      r.pipeline->train_step(r.batch);
      std::vector<double> all;
      for (const auto& p : r.model->params)
        if (p->trained() && p->grad_written)
          for (double g : p->grad.to_vector<double>()) all.push_back(g);
      grads.push_back(std::move(all));
    }
    double difference = 0, norm = 0;
    for (size_t i = 0; i < grads[0].size() && grads[0].size() == grads[1].size(); ++i) {
      difference += (grads[0][i] - grads[1][i]) * (grads[0][i] - grads[1][i]);
      norm += grads[0][i] * grads[0][i];
    }
    const double error = grads[0].size() == grads[1].size() ? std::sqrt(difference / norm) : 1;
    verdict("1 against 4 micro-batches", error <= 1e-10,
            fmt::format("gradients differ by {:.1e}", error));
  }

  void training_and_round_trip() {
    Run r = make(DType::f32);
    start(r, kRows);
    r.model->params.initialize(1, r.model->size.init_std);
    RunConfig run;
    run.dtype = "fp32";
    run.optimizer.lr = 3e-3;
    std::string pattern = (std::filesystem::temp_directory_path() / "pith-check-XXXXXX").string();
    if (!mkdtemp(pattern.data())) fail("no temporary directory {}", pattern);
    run.out = pattern;
    Optimizer optimizer(r.model->params, run, r.context);
    double first = 0, last = 0;
    for (int64_t step = 1; step <= 20; ++step) {
      const StepSums sums = r.pipeline->train_step(r.batch);
      last = sums.loss / sums.labels;
      if (step == 1) first = last;
      optimizer.update(run.optimizer.lr, step, optimizer.grad_norm(sums.labels), sums.labels);
      r.model->after_step(sums.statistics);
    }
    verdict("20 steps on one batch lower the loss", last < 0.8 * first,
            fmt::format("{:.3f} -> {:.3f}", first, last));

    std::string difference = "";
    {
      Checkpoints checkpoints(run, *r.model, optimizer);
      checkpoints.save(20);
      checkpoints.finish();
      Run other = make(DType::f32);
      Optimizer other_optimizer(other.model->params, run, other.context);
      Checkpoints reader(run, *other.model, other_optimizer);
      reader.load(Checkpoints::latest(run.out));
      for (const auto& p : r.model->params)
        if (p->master.to_vector<double>() !=
            other.model->params.find(p->name).master.to_vector<double>())
          difference = p->name;
    }
    std::filesystem::remove_all(run.out);
    verdict("checkpoint round trip is bit-equal", difference.empty(), difference);
  }
};

}  // namespace

int run_check(const std::string& path) {
  Check check{read_model_config(path)};
  ModelOptions meta;
  meta.device = Device::meta;
  meta.max_positions = kSequence;
  const int64_t parameters = make_model(check.config, meta)->params.trained_elements();
  if (parameters > kLargest) {
    check.config = shrunk(check.config);
    fmt::print("{:.1f} M parameters: checked at a smaller size of the same architecture\n",
               double(parameters) / 1e6);
  }
  check.derivatives();
  check.micro_batches();
  check.training_and_round_trip();
  fmt::print("{}\n", check.ok ? "PASS" : "FAIL");
  return check.ok ? 0 : 1;
}

}  // namespace pith
