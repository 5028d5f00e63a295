// pith check: a model against itself, after any edit of a model file. Small fp64 runs on random
// tokens.

#include "app/commands.h"
#include "core/rng.h"

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

// A fresh model with a batch of its own.
struct Trial : Session {
  Batch batch;

  Trial(const Value& config, const std::string& dtype, int64_t micro_batch_size)
      : Session({.dtype = dtype}, kSequence, micro_batch_size, true, config) {
    // Wider than usual, so that no gradient hides in the rounding.
    model->params.initialize(1, 0.1);
    const double vocabulary = double(model->size.vocabulary);
    std::vector<int32_t> tokens, labels;
    for (uint64_t i = 0; i < kRows * kSequence; ++i) {
      tokens.push_back(int32_t(uniform(1, i) * vocabulary));
      labels.push_back(i % 7 == 3 ? -100 : int32_t(uniform(2, i) * vocabulary));
    }
    batch = batch_of(tokens, labels, kRows);
  }
};

// d loss / d parameter along a random direction against a central difference, for every parameter.
void check_derivatives(const Value& config, std::vector<Row>& rows) {
  Trial t(config, "fp64", kRows);
  t.pipeline.train_step(t.batch);
  for (const auto& p : t.model->params) {
    if (!p->trained()) continue;
    rows.push_back(exact("a gradient reaches " + p->name, p->grad_written));
    const auto grad = p->grad.to_vector<double>(), kept = p->value.to_vector<double>();
    std::vector<double> direction;
    for (size_t i = 0; i < grad.size(); ++i) direction.push_back(normal(stream_key(3, p->name), i));
    const auto dot = [&](const std::vector<double>& x) {
      return std::inner_product(grad.begin(), grad.end(), x.begin(), 0.0);
    };
    const auto loss_at = [&](double h) {
      std::vector<double> moved = kept;
      for (size_t i = 0; i < moved.size(); ++i) moved[i] += h * direction[i];
      p->value.copy_from(Tensor::of<double>(p->shape, moved));
      return t.pipeline.evaluate(t.batch).loss();
    };
    const double h = 1e-6,
                 numeric = (8 * (loss_at(h) - loss_at(-h)) - (loss_at(2 * h) - loss_at(-2 * h))) /
                           (12 * h);
    p->value.copy_from(Tensor::of<double>(p->shape, kept));
    rows.push_back({"directional derivative of " + p->name,
                    std::abs(dot(direction) - numeric) / std::max(std::sqrt(dot(grad)), 1e-2),
                    1e-4});
  }
}

void check_micro_batches(const Value& config, std::vector<Row>& rows) {
  const auto gradients = [&](int64_t micro_batch_size) {
    Trial t(config, "fp64", micro_batch_size);
    t.pipeline.train_step(t.batch);
    std::vector<double> all;
    for (const auto& p : t.model->params)
      if (p->trained()) std::ranges::copy(p->grad.to_vector<double>(), std::back_inserter(all));
    return all;
  };
  rows.push_back({"gradients of 4 micro-batches against 1",
                  relative_l2(gradients(1), gradients(kRows)), 1e-10});
}

void check_training_and_round_trip(const Value& config, std::vector<Row>& rows) {
  Trial t(config, "fp32", kRows);
  t.model->params.initialize(1, t.model->size.init_std);
  RunConfig run;
  run.dtype = "fp32";
  run.optimizer.lr = 3e-3;
  const TemporaryDirectory out;
  run.out = out.path;
  Optimizer optimizer(t.model->params, run, t.context);
  std::vector<double> losses;
  for (int64_t step = 1; step <= 20; ++step) {
    const StepSums sums = t.pipeline.train_step(t.batch);
    losses.push_back(sums.loss());
    optimizer.update(run.optimizer.lr, step, sums.labels);
    t.model->after_step(sums.statistics);
  }
  rows.push_back({"loss after 20 steps on one batch / before", losses.back() / losses[0], 0.8});
  Checkpoints(run, *t.model, optimizer).save(20);
  Trial other(config, "fp32", kRows);
  Optimizer other_optimizer(other.model->params, run, other.context);
  Checkpoints(run, *other.model, other_optimizer).load(Checkpoints::latest(run.out));
  for (const auto& p : t.model->params) {
    const Tensor& back = other.model->params.find(p->name).value;
    rows.push_back(exact("checkpoint round trip of " + p->name,
                         std::memcmp(p->value.raw(), back.raw(), back.nbytes()) == 0));
  }
}

}  // namespace

int run_check(const std::string& path) {
  Value config = read_model_config(path);
  const ModelOptions meta = {.device = Device::meta, .max_positions = kSequence};
  const int64_t parameters = make_model(config, meta)->params.trained_elements();
  if (parameters > kLargest) {
    config = shrunk(config);
    fmt::print("{:.1f} M parameters: checked at a smaller size of the same architecture\n",
               double(parameters) / 1e6);
  }
  std::vector<Row> rows;
  check_derivatives(config, rows);
  check_micro_batches(config, rows);
  check_training_and_round_trip(config, rows);
  return report(std::move(rows));
}

}  // namespace pith
