#include "engine/metrics.h"

#include <unistd.h>

#include "core/value.h"
#include "ops/gemm.h"

namespace pith {
namespace {

LayerLoad busiest(const StepMetrics& m) {
  const auto most = std::ranges::max_element(m.load, {}, &LayerLoad::max);
  return most == m.load.end() ? LayerLoad{} : *most;
}

// The scalars of a step: f(name, value, format in the step line, "" for not there).
template <class F> void for_each_scalar(const StepMetrics& m, F&& f) {
  f("loss", m.loss, "{:.4f}");
  f("balance_loss", m.balance_loss, "{:.3f}");
  if (m.z_loss) f("z_loss", *m.z_loss, "");
  f("lr", m.lr, "{:.2e}");
  f("grad_norm", m.grad_norm, "{:.3f}");
  f("tokens_per_second", m.tokens_per_second, "{:.0f}");
  f("sol", m.sol, "{:.2f}");
  f("peak_gb", m.peak_gb, "{:.1f}");
  f("load_max", busiest(m).max, "{:.1f}");
  if (m.validation_loss) f("validation_loss", *m.validation_loss, "");
  f("seconds", m.seconds, "");
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

// Rewrites the file without lines after `done_steps` and without a half-written end; gives its
// path.
std::string truncated(const std::string& path, int64_t done_steps) {
  if (::access(path.c_str(), F_OK) != 0) return path;
  const std::string text = read_file(path);
  std::string kept;
  for (size_t begin = 0, end; (end = text.find('\n', begin)) != text.npos; begin = end + 1) {
    const std::string line = text.substr(begin, end + 1 - begin);
    long step = 0;  // "{"step":12," is how every line begins
    if (std::sscanf(line.c_str(), "{\"step\":%ld,", &step) == 1 && step <= done_steps) kept += line;
  }
  if (kept != text) write_file_atomic(path, kept);
  return path;
}

}  // namespace

double measure_peak_flops(DType dtype) {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kSize = 512;
  constexpr double kFlops = 2.0 * kSize * kSize * kSize;
  constexpr std::chrono::milliseconds kBudget(80);
  const size_t bytes = size_t(kSize * kSize) * size_of(dtype);
  double total = 0;
  // OpenBLAS, which does fp64, lets one caller in at a time: it gets all threads for one product.
#pragma omp parallel reduction(+ : total) if (dtype != DType::f64)
  {
    std::vector<unsigned char> a(bytes, 0x3c), b(bytes, 0x3c), c(bytes);  // small positive numbers
    const auto product = [&] {
      const auto begin = Clock::now();
      cpu::gemm(false, false, kSize, kSize, kSize, a.data(), b.data(), dtype, c.data(), dtype,
                false);
      return std::chrono::duration<double>(Clock::now() - begin).count();
    };
    product();  // touches memory and makes the primitive
    const auto end = Clock::now() + kBudget;
    double fastest = product();
    while (Clock::now() < end) fastest = std::min(fastest, product());
    total += kFlops / fastest;
  }
  return total;
}

std::string step_line(const StepMetrics& m, int64_t total_steps, double eta_seconds) {
  std::string line = fmt::format("step {}/{}", m.step, total_steps);
  for_each_scalar(m, [&](const std::string& name, double value, const std::string& format) {
    if (!format.empty()) line += fmt::format(fmt::runtime("  {} " + format), name, value);
  });
  line += fmt::format("@L{:02}  eta {}", busiest(m).layer, duration(eta_seconds));  // of load_max
  if (m.validation_loss) line += fmt::format("  validation_loss {:.4f}", *m.validation_loss);
  return line;
}

std::string step_json(const StepMetrics& m) {
  Value line;
  line["step"] = m.step;
  for_each_scalar(m, [&](auto name, double value, auto) { line.add(name, value); });
  line["load_max_layer"] = busiest(m).layer;
  Value& load = line["load_max_by_layer"] = Value::array();
  for (const LayerLoad& layer : m.load) load.push_back(layer.max);
  return line.json();
}

Metrics::Metrics(const RunConfig& run, int64_t done_steps)
    : train_(run.train),
      json_(truncated(run.out + "/metrics.jsonl", done_steps), true),
      events_(run.out + "/tensorboard") {}

void Metrics::log(const StepMetrics& m) {
  // By the clock, so that evaluation and checkpoints count too.
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start_;
  const double left = double(std::max<int64_t>(train_.last_step() - m.step, 0));
  const double eta = elapsed.count() / double(++logged_) * left;
  say(stdout, step_line(m, train_.steps, eta) + "\n");
  const std::string json = step_json(m) + '\n';
  json_.write(json.data(), json.size());

  std::vector<std::pair<std::string, float>> scalars;
  for_each_scalar(m, [&](auto name, double v, auto) { scalars.emplace_back(name, float(v)); });
  for (const auto& [layer, most] : m.load)
    scalars.emplace_back(fmt::format("load_max/L{:02}", layer), float(most));
  events_.scalars(m.step, scalars);
}

}  // namespace pith
