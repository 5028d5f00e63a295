#include "engine/metrics.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <utility>

#include "core/error.h"
#include "core/value.h"
#include "engine/tfevents.h"

namespace pith {
namespace {

LayerLoad busiest(const StepMetrics& m) {
  const auto less = [](const LayerLoad& a, const LayerLoad& b) { return a.max < b.max; };
  return m.load.empty() ? LayerLoad{} : *std::max_element(m.load.begin(), m.load.end(), less);
}

// The scalars of a step under their names, for the JSON line and TensorBoard alike.
template <class F> void for_each_scalar(const StepMetrics& m, F&& f) {
  f("loss", m.loss);
  f("balance_loss", m.balance_loss);
  if (m.z_loss) f("z_loss", *m.z_loss);
  f("lr", m.lr);
  f("grad_norm", m.grad_norm);
  f("tokens_per_second", m.tokens_per_second);
  f("sol", m.sol);
  f("peak_gb", m.peak_gb);
  f("load_max", busiest(m).max);
  if (m.validation_loss) f("validation_loss", *m.validation_loss);
  f("seconds", m.seconds);
}

// "41s", "52m", "3h05m", "2d04h".
std::string duration(double seconds) {
  if (!(seconds >= 0 && seconds < 1e10)) return "?";
  const auto whole = int64_t(std::llround(seconds)), minutes = (whole + 30) / 60,
             hours = minutes / 60;
  if (whole < 60) return fmt::format("{}s", whole);
  if (hours < 1) return fmt::format("{}m", minutes);
  if (hours < 24) return fmt::format("{}h{:02}m", hours, minutes % 60);
  return fmt::format("{}d{:02}h", hours / 24, hours % 24);
}

// True for a complete line of an update that the run has already done.
bool is_kept(const std::string& line, int64_t done_steps) {
  try {
    const Value v = parse_json(line, "metrics.jsonl");
    return v.at("step").as_int() <= done_steps;
  } catch (const InputError&) {
    return false;
  }
}

// Rewrites the file without lines after `done_steps` and without a half-written end; gives its
// path.
std::string truncated(const std::string& path, int64_t done_steps) {
  if (::access(path.c_str(), F_OK) != 0) return path;
  const std::string text = read_file(path);
  std::string kept;
  for (size_t begin = 0, end; (end = text.find('\n', begin)) != text.npos; begin = end + 1) {
    const std::string line = text.substr(begin, end - begin);
    if (done_steps > 0 && is_kept(line, done_steps)) kept += line + '\n';
  }
  if (kept != text) write_file_atomic(path, kept);
  return path;
}

}  // namespace

std::string step_line(const StepMetrics& m, int64_t total_steps, double eta_seconds) {
  std::string line = fmt::format(
      "step {}/{}  loss {:.4f}  balance_loss {:.3f}  lr {:.2e}  grad_norm {:.3f}  "
      "tokens_per_second {:.0f}  sol {:.2f}  peak_gb {:.1f}",
      m.step, total_steps, m.loss, m.balance_loss, m.lr, m.grad_norm, m.tokens_per_second, m.sol,
      m.peak_gb);
  const LayerLoad load = busiest(m);
  line +=
      fmt::format("  load_max {:.1f}@L{:02}  eta {}", load.max, load.layer, duration(eta_seconds));
  if (m.validation_loss) line += fmt::format("  validation_loss {:.4f}", *m.validation_loss);
  return line;
}

std::string step_json(const StepMetrics& m) {
  Value line;
  line["step"] = m.step;
  for_each_scalar(m, [&](const char* name, double value) { line[name] = value; });
  line["load_max_layer"] = busiest(m).layer;
  Value& load = line["load_max_by_layer"] = Value::array();
  for (const LayerLoad& layer : m.load) load.push_back(layer.max);
  return line.json();
}

Metrics::Metrics(const std::string& out, int64_t done_steps, int64_t total_steps)
    : total_steps_(total_steps),
      json_(truncated(out + "/metrics.jsonl", done_steps), true),
      events_(std::make_unique<EventFile>(out + "/tensorboard")),
      last_(std::chrono::steady_clock::now()) {}

Metrics::~Metrics() = default;

void Metrics::log(const StepMetrics& m) {
  // Wall time between updates counts evaluation and checkpoints too; before the first update lies
  // the start of the run, which says nothing about the rest.
  const auto now = std::chrono::steady_clock::now();
  const double wall = std::chrono::duration<double>(now - std::exchange(last_, now)).count();
  const double seconds = logged_ == 0 ? m.seconds : wall;
  ++logged_;
  seconds_per_step_ += (seconds - seconds_per_step_) * std::max(0.05, 1.0 / double(logged_));
  const double eta = seconds_per_step_ * double(std::max<int64_t>(total_steps_ - m.step, 0));

  std::puts(step_line(m, total_steps_, eta).c_str());
  std::fflush(stdout);
  const std::string json = step_json(m) + '\n';
  json_.write(json.data(), json.size());

  std::vector<std::pair<std::string, float>> scalars;
  for_each_scalar(m, [&](const char* name, double v) { scalars.emplace_back(name, float(v)); });
  for (const LayerLoad& layer : m.load) {
    scalars.emplace_back(fmt::format("load_max/L{:02}", layer.layer), float(layer.max));
  }
  events_->scalars(m.step, scalars);
}

}  // namespace pith
