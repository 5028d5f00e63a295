#include "engine/train.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cmath>
#include <filesystem>

#include "core/memory.h"
#include "core/profile.h"
#include "data/tokenizer.h"
#include "engine/checkpoint.h"
#include "engine/lock.h"
#include "engine/lr.h"
#include "engine/metrics.h"
#include "engine/pipeline.h"
#include "engine/plan.h"
#include "engine/roofline.h"
#include "engine/trace.h"

namespace pith {
namespace {

std::atomic<int> stop_signal{0};

void request_stop(int signal) {
  if (stop_signal.exchange(signal) && signal == SIGINT) _Exit(130);  // a second Ctrl-C does not wait
}

void catch_stop_signals() {
  struct sigaction action {};
  action.sa_handler = request_stop;
  for (int s : {SIGTERM, SIGUSR1, SIGINT}) sigaction(s, &action, nullptr);
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Per MoE layer: tokens of the busiest expert over the mean.
std::vector<LayerLoad> expert_load(const Statistics& sums, const Model& model) {
  std::vector<LayerLoad> load;
  const auto counts = sums.find("expert_count");
  if (counts == sums.end()) return load;
  const std::vector<double> c = counts->second.to_vector<double>();
  const int64_t experts = model.size.experts;
  for (int64_t l = 0; l < model.size.moe_layers; ++l) {
    double total = 0, most = 0;
    for (int64_t e = 0; e < experts; ++e) {
      total += c[size_t(l * experts + e)];
      most = std::max(most, c[size_t(l * experts + e)]);
    }
    load.push_back({int(model.moe_layers[size_t(l)]), total > 0 ? most * double(experts) / total : 0});
  }
  return load;
}

double mean_statistic(const Statistics& sums, const char* name, double count) {
  const auto found = sums.find(name);
  return found == sums.end() || count == 0 ? 0 : found->second.to_vector<double>()[0] / count;
}

std::vector<std::pair<std::string, double>> weighted(const std::vector<WeightedCorpus>& corpora) {
  std::vector<std::pair<std::string, double>> out;
  for (const WeightedCorpus& c : corpora) out.emplace_back(c.prefix, c.weight);
  return out;
}

Loader training_loader(const RunConfig& run, const Model& model) {
  return Loader(weighted(run.data.train), run.data.sequence_length, model.size.vocabulary, run.data.document_mask,
                uint64_t(run.train.seed));
}

std::optional<Loader> validation_loader(const RunConfig& run, const Model& model) {
  if (run.data.validation.empty() || run.eval.every == 0) return std::nullopt;
  return Loader::sequential(run.data.validation, run.data.sequence_length, model.size.vocabulary,
                            run.data.document_mask);
}

// One run: everything that lives from the first step to the last.
struct Trainer {
  const RunConfig& run;
  Context context;
  std::unique_ptr<Model> model;
  Optimizer optimizer;
  Pipeline pipeline;
  Loader loader;
  std::optional<Loader> validation;
  Checkpoints checkpoints;
  double peak_flops;

  explicit Trainer(const RunConfig& r)
      : run(r), context{.device = Device::cpu, .dtype = run_dtype(r), .check_finite = r.debug.check_finite},
        model(make_model(read_model_config(r.model), model_options(r, Device::cpu))),
        optimizer(model->params, r, context), pipeline(*model, context, r.train),
        loader(training_loader(r, *model)), validation(validation_loader(r, *model)),
        checkpoints(r, *model, optimizer), peak_flops(measure_peak_flops(context.dtype)) {}

  int64_t start() {
    const std::string last = Checkpoints::latest(run.out);
    if (!last.empty()) {
      const int64_t step = checkpoints.load(last);
      fmt::print(stderr, "continuing from {}\n", last);
      return step;
    }
    model->params.initialize(uint64_t(run.train.seed), model->size.init_std);
    if (has_weights(run.model)) load_weights(model->params, run.model, model->ignored_when_reading());
    return 0;
  }

  double validation_loss() {
    const int64_t rows = std::min(validation->size(), run.eval.batches * run.train.micro_batch_size);
    const StepSums sums = pipeline.evaluate(validation->batch(0, rows));
    return sums.loss / sums.labels;
  }

  // One update with a timeline of its ops in OUT/profile/.
  StepMetrics profiled_step(int64_t number) {
    std::vector<OpEvent> events;
    context.timeline = &events;
    StepMetrics m = step(number);
    context.timeline = nullptr;
    std::filesystem::create_directories(run.out + "/profile");
    write_chrome_trace(fmt::format("{}/profile/step-{:08d}.json", run.out, number), events);
    return m;
  }

  // One update; `step` is its 1-based number.
  StepMetrics step(int64_t step) {
    const auto begin = std::chrono::steady_clock::now();
    context.total = {};
    const Batch batch = loader.batch((step - 1) * run.train.global_batch_size, run.train.global_batch_size);
    std::vector<Tensor> replay;
    if (!run.trace.replay.empty()) replay = read_routing_trace(run.trace.replay, step, model->size, batch);
    const StepSums sums = pipeline.train_step(batch, !run.trace.routing.empty(), replay);
    const Optimizer::Norm norm = optimizer.grad_norm(sums.labels);
    if (!norm.finite || !std::isfinite(sums.loss))
      fail("step {}: the {} is not finite (loss {}); nothing was updated. debug.check_finite=true names the op", step,
           norm.finite ? "loss" : "gradient of " + norm.first_bad, sums.loss / sums.labels);
    StepMetrics m;
    m.lr = learning_rate(run.optimizer, run.train.steps, step);
    optimizer.update(m.lr, step, norm, sums.labels);
    model->after_step(sums.statistics);
    if (!run.trace.routing.empty()) write_routing_trace(run.trace.routing, step, sums, batch);

    const double tokens = double(batch.batch * batch.sequence);
    m.step = step;
    m.loss = sums.loss / sums.labels;
    m.balance_loss = mean_statistic(sums.statistics, "balance_loss",
                                    double(run.train.micro_batches() * model->size.moe_layers));
    if (run.balance.z_loss != 0)
      m.z_loss = mean_statistic(sums.statistics, "z_loss", tokens * double(model->size.moe_layers));
    m.grad_norm = norm.value;
    m.seconds = seconds_since(begin);
    m.tokens_per_second = tokens / m.seconds;
    m.sol = context.total.flops / peak_flops / m.seconds;
    m.peak_gb = double(memory::peak(Device::cpu)) / 1e9;
    m.load = expert_load(sums.statistics, *model);
    return m;
  }
};

// A run directory that is not to be continued must be empty, but for what this process just put there.
void prepare_directory(const RunConfig& run) {
  std::error_code error;
  std::filesystem::create_directories(run.out, error);
  if (error) fail_input("out = \"{}\" cannot be created: {}", run.out, error.message());
  if (run.resume) return;
  for (const auto& entry : std::filesystem::directory_iterator(run.out))
    fail_input("{} is not empty ({}) and resume = false: choose another out, or remove it", run.out,
               entry.path().filename().string());
}

void check_tokenizer(const RunConfig& run, const Model& model) {
  if (run.tokenizer.empty()) return;
  const int64_t tokens = Tokenizer(run.tokenizer).vocab_size();
  if (tokens > model.size.vocabulary)
    fail_input("{} has {} tokens, the model's vocab_size is {}", run.tokenizer, tokens, model.size.vocabulary);
}

}  // namespace

void train(const RunConfig& run) {
  const Plan plan = make_plan(run);
  fmt::print(stderr, "{}", plan.table());
  prepare_directory(run);
  const RunLock lock(run.out);
  Trainer trainer(run);
  check_tokenizer(run, *trainer.model);
  catch_stop_signals();
  const auto begin = std::chrono::steady_clock::now();
  int64_t step = trainer.start();
  int64_t saved = step;
  const int64_t last = run.train.stop_after > 0 ? std::min(run.train.stop_after, run.train.steps) : run.train.steps;
  if (trainer.validation && step == 0)
    fmt::print("step 0/{}  validation_loss {:.4f}\n", run.train.steps, trainer.validation_loss());
  Metrics metrics(run.out, step, run.train.steps);
  const auto due = [&](int64_t every) { return every > 0 && step % every == 0; };
  const auto time_is_up = [&] {
    return run.train.max_minutes > 0 && seconds_since(begin) > 60 * run.train.max_minutes;
  };

  while (step < last && !stop_signal && !time_is_up()) {
    ++step;
    const bool profile = std::count(run.profile.steps.begin(), run.profile.steps.end(), step) > 0;
    StepMetrics m = profile ? trainer.profiled_step(step) : trainer.step(step);
    if (trainer.validation && (due(run.eval.every) || step == last)) m.validation_loss = trainer.validation_loss();
    metrics.log(m);
    if (due(run.checkpoint.every) || step == last) trainer.checkpoints.save(saved = step);
  }
  if (saved != step) trainer.checkpoints.save(step);
  trainer.checkpoints.finish();
  const char* why = stop_signal ? "stopped by a signal" : step < last ? "train.max_minutes is up" : "done";
  fmt::print(stderr, "{} after step {}; peak memory {:.3f} GB, planned {:.3f} GB; model in {}/latest\n", why, step,
             double(memory::peak(Device::cpu)) / 1e9, double(plan.peak_bytes) / 1e9, run.out);
}

}  // namespace pith
