#include "engine/train.h"

#include <omp.h>

#include <atomic>
#include <csignal>
#include <filesystem>

#include "engine/trace.h"

namespace pith {
namespace {

std::atomic<int> stop_signal{0};

void request_stop(int signal) {
  // A second Ctrl-C does not wait.
  if (stop_signal.exchange(signal) && signal == SIGINT) _Exit(130);
}

double mean_statistic(const StepSums& sums, const char* name, double count) {
  const auto sum = sums.statistics.find(name);
  return sum == sums.statistics.end() || count == 0 ? 0 : value_of(sum->second) / count;
}

// Per MoE layer: tokens of the busiest expert over the mean.
std::map<int, double> expert_load(const StepSums& sums, const Model& model) {
  std::map<int, double> load;
  if (model.moe_layers.empty()) return load;
  const Tensor all = sums.statistics.at("expert_count").on(Device::cpu);  // waits for a GPU once
  for (const int64_t layer : model.moe_layers) {
    const auto row = int64_t(load.size());
    const auto counts = all.row_range(row, row + 1).to_vector<double>();
    const double total = std::accumulate(counts.begin(), counts.end(), 0.0);
    load[int(layer)] = total > 0 ? std::ranges::max(counts) * double(counts.size()) / total : 0;
  }
  return load;
}

void make_directory(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error) fail_input("the directory {} cannot be created: {}", path, error.message());
}

// A run directory that is not to be continued must be empty, but for what a run that failed at once
// leaves.
void require_empty(const std::string& out) {
  for (const auto& entry : std::filesystem::directory_iterator(out))
    if (const std::string name = entry.path().filename(); name != ".lock" && name != "logs")
      fail_input("{} is not empty ({}) and resume = false: choose another out, or remove it", out,
                 name);
}

}  // namespace

int64_t Trainer::start() {
  std::vector<WeightedCorpus> corpora;
  for (const std::string& prefix : run.data.validation) corpora.emplace_back(prefix, 1.0);
  if (run.eval.every > 0)
    validation.emplace(corpora, run.data.sequence_length, model->size.vocabulary,
                       run.data.document_mask, std::nullopt);
  int64_t step = 0;
  if (const std::string last = Checkpoints::latest(run.out); !last.empty()) {
    step = checkpoints.load(last);
    say(stderr, fmt::format("continuing from {}\n", last));
  } else {
    model->params.initialize(uint64_t(run.train.seed), model->size.init_std);
    if (has_weights(run.model)) load_weights(model->params, run.model, model->ignored_when_reading);
  }
  memory::reset_peak(device);  // the plan is of steps
  return step;
}

double Trainer::validation_loss() {
  const int64_t rows = std::min(validation->size(), run.eval.batches * run.train.micro_batch_size);
  const StepSums sums = pipeline.evaluate(validation->batch(0, rows));
  return sums.loss() / sums.labels;
}

StepMetrics Trainer::step(int64_t step, const std::string& timeline_file) {
  const double begin = omp_get_wtime();
  const int64_t rows = run.train.global_batch_size;
  const bool gpu = device == Device::cuda;
  std::vector<OpEvent> events;
  if (!timeline_file.empty()) {
    context.timeline = &events;
    if (gpu) cuda::start_timeline();
  }
  context.total = {};
  const Batch batch = loader.batch((step - 1) * rows, rows);
  std::vector<Tensor> replay;
  if (!run.trace.replay.empty())
    replay = read_routing_trace(run.trace.replay, step, model->size, batch);
  const StepSums sums = pipeline.train_step(batch, !run.trace.routing.empty(), replay);
  StepMetrics m;
  m.lr = learning_rate(run.optimizer, run.train.steps, step);
  optimizer.update(m.lr, step, sums.labels);
  // Up to here nothing has waited for the device.
  const Optimizer::Norm norm = optimizer.norm();
  m.loss = sums.loss() / sums.labels;
  if (!norm.finite() || !std::isfinite(m.loss))
    fail(
        "step {}: the {} is not finite (loss {}); the last checkpoint stays. "
        "debug.check_finite=true names the op",
        step, norm.finite() ? "loss" : "gradient of " + norm.first_bad, m.loss);
  model->after_step(sums.statistics);
  if (!run.trace.routing.empty()) write_routing_trace(run.trace.routing, step, sums, batch);
  if (context.timeline) {
    const auto timeline = gpu ? cuda::stop_timeline() : cuda::Timeline{.host_syncs = 0};
    host_syncs = timeline.host_syncs;
    say(stderr, fmt::format("step {}, time by stage, in {}.stages.csv\n{}", step, timeline_file,
                            write_timeline(timeline_file, events, timeline)));
    context.timeline = nullptr;  // `events` ends here, validation may follow
  }

  const double tokens = double(batch.batch * batch.sequence),
               micro_batches = double(rows) / double(run.train.micro_batch_size),
               layers = double(model->size.moe_layers);
  m.step = step;
  m.balance_loss = mean_statistic(sums, "balance_loss", micro_batches * layers);
  if (run.balance.z_loss != 0) m.z_loss = mean_statistic(sums, "z_loss", tokens * layers);
  m.grad_norm = norm.value;
  if (gpu) cuda::synchronize();
  m.seconds = omp_get_wtime() - begin;
  m.tokens_per_second = tokens / m.seconds;
  m.sol = context.total.flops / peak_flops / m.seconds;
  m.peak_gb = double(memory::peak(device)) / 1e9;
  m.load = expert_load(sums, *model);
  return m;
}

void train(const RunConfig& run) {
  const Plan plan = make_plan(run);
  make_directory(run.out + "/logs");
  if (!run.resume) require_empty(run.out);
  if (!run.trace.routing.empty()) make_directory(run.trace.routing);
  const RunLock lock(run.out);
  open_log(run.out + "/logs/rank-0.log");
  say(stderr, plan.table);
  Trainer trainer{run};
  // As the C library's signal() does it, system calls of a save under way go on.
  for (int s : {SIGTERM, SIGUSR1, SIGINT}) std::signal(s, request_stop);
  const double begin = omp_get_wtime();
  int64_t step = trainer.start(), saved = step;
  const int64_t steps = run.train.steps, last = run.train.last_step();
  const auto say_validation_loss = [&] {  // where no update has a step line of its own to say it
    say(stdout, fmt::format("step {}/{}  validation_loss {:.4f}\n", step, steps,
                            trainer.validation_loss()));
  };
  if (trainer.validation && step == 0) say_validation_loss();
  Metrics metrics(run, step);
  const auto due = [&](int64_t every) { return every > 0 && step % every == 0; };
  const double limit = run.train.max_minutes > 0 ? 60 * run.train.max_minutes : HUGE_VAL;

  while (step < last && !stop_signal && omp_get_wtime() - begin <= limit) {
    ++step;
    const bool profiled = std::ranges::count(run.profile.steps, step) > 0;
    if (profiled) make_directory(run.out + "/profile");
    const std::string file = fmt::format("{}/profile/step-{:08d}.json", run.out, step);
    StepMetrics m = trainer.step(step, profiled ? file : "");
    // Not at stop_after: a run in two parts says the same as one in one part.
    if (trainer.validation && (due(run.eval.every) || step == steps))
      m.validation_loss = trainer.validation_loss();
    metrics.log(m);
    if (due(run.checkpoint.every)) trainer.checkpoints.save(saved = step);
  }
  if (saved != step) trainer.checkpoints.save(step);
  trainer.checkpoints.finish();
  if (trainer.validation && step < steps && step > 0) say_validation_loss();
  const char* why = stop_signal   ? "stopped by a signal"
                    : step < last ? "train.max_minutes is up"
                                  : "done";
  say(stderr,
      fmt::format(
          "{} after step {}; peak memory {:.3f} GB, planned {:.3f} GB; model in {}\n", why, step,
          double(memory::peak(trainer.device)) / 1e9, double(plan.peak_bytes) / 1e9,
          Checkpoints::latest(run.out).empty() ? "no checkpoint yet" : run.out + "/latest"));
}

}  // namespace pith
