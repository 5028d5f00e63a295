#include "engine/metrics.h"

#include <immintrin.h>
#include <omp.h>
#include <sys/stat.h>

#include "core/value.h"
#include "ops/cuda.h"
#include "ops/gemm.h"

namespace pith {

// The layer with the largest load, and the load.
static std::pair<int, double> busiest(const StepMetrics& m) {
  const auto load = [](const auto& layer) { return layer.second; };
  const auto most = std::ranges::max_element(m.load, {}, load);
  return most == m.load.end() ? std::pair(0, 0.0) : std::pair<int, double>(*most);
}

// The scalars of a step: f(name, value, format in the step line, "" for not there).
template <class F> static void for_each_scalar(const StepMetrics& m, F&& f) {
  f("loss", m.loss, "{:.4f}");
  f("balance_loss", m.balance_loss, "{:.3f}");
  if (m.z_loss) f("z_loss", *m.z_loss, "");
  f("lr", m.lr, "{:.2e}");
  f("grad_norm", m.grad_norm, "{:.3f}");
  f("tokens_per_second", m.tokens_per_second, "{:.0f}");
  f("sol", m.sol, "{:.2f}");
  f("peak_gb", m.peak_gb, "{:.1f}");
  f("load_max", busiest(m).second, "{:.1f}");
  if (m.validation_loss) f("validation_loss", *m.validation_loss, "");
  f("seconds", m.seconds, "");
}

// "41s", "52m", "3h05m", "2d04h".
static std::string duration(double seconds) {
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
static std::string truncated(const std::string& path, int64_t done_steps) {
  if (!exists(path)) return path;
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

// CRC-32C (Castagnoli, RFC 3720). TFRecord stores it rotated and offset, so that a checksum of a
// checksum is not degenerate.
static uint32_t masked_crc(std::string_view bytes) {
  uint32_t c = ~0u;
  for (const char b : bytes) c = _mm_crc32_u8(c, uint8_t(b));
  return ((~c >> 15) | (~c << 17)) + 0xa282ead8u;
}

// Protobuf's wire types.
constexpr int kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5;
static char tag(int field, int wire_type) { return char(field << 3 | wire_type); }

static void put_varint(std::string& out, uint64_t v) {
  for (; v >= 128; v >>= 7) out += char(v | 128);
  out += char(v);
}

static void put_bytes(std::string& out, int field, std::string_view v) {
  out += tag(field, kBytes);
  put_varint(out, v.size());
  out += v;
}

// An Event, wall_time = 1 (double), step = 2 (int64) and a field of bytes, as a record.
static std::string event_record(int64_t step, int field, std::string_view content) {
  const std::chrono::duration<double> now = std::chrono::system_clock::now().time_since_epoch();
  std::string event, record;
  append_raw(event, tag(1, kFixed64), now.count(), tag(2, kVarint));
  put_varint(event, uint64_t(step));
  put_bytes(event, field, content);
  append_raw(record, uint64_t(event.size()));
  append_raw(record, masked_crc(record));
  record += event;
  append_raw(record, masked_crc(event));
  return record;
}

// In `directory`, which may exist; if it cannot be made, opening the file says why.
static std::string new_event_file(const std::string& directory) {
  ::mkdir(directory.c_str(), 0777);
  return fmt::format("{}/events.out.tfevents.{:010}.{}", directory, std::time(nullptr), ::getpid());
}

double measure_peak_flops(DType dtype, Device device) {
  const bool gpu = device == Device::cuda;
  const int64_t n = gpu ? 8192 : 512, at_once = gpu ? 10 : 1;
  const int64_t bytes = n * n * int64_t(size_of(dtype));
  Tensor on_gpu = gpu ? Tensor::zeros({2 * n, n}, dtype, device, "peak") : Tensor();
  double total = 0;
  // OpenBLAS, which does fp64, lets one caller in at a time: it gets all threads for one product.
#pragma omp parallel reduction(+ : total) if (!gpu && dtype != DType::f64)
  {
    std::vector<std::byte> on_cpu(gpu ? 0 : 2 * bytes);
    std::byte* a = gpu ? static_cast<std::byte*>(on_gpu.raw()) : on_cpu.data();
    const auto seconds = [&] {
      const double begin = omp_get_wtime();
      for (int64_t i = 0; i < at_once; ++i) {
        if (!gpu) cpu::gemm(false, true, n, n, n, a, a, dtype, a + bytes, dtype, false);
        if constexpr (cuda::kBuilt)
          if (gpu)
            cuda::gemm(false, true, n, n, n, a, a, dtype, a + bytes, dtype, false, cuda::stream());
      }
      if (gpu) cuda::synchronize();
      return (omp_get_wtime() - begin) / double(at_once);
    };
    seconds();  // touches memory and makes the primitive
    double fastest = seconds();
    for (const double end = omp_get_wtime() + 0.08; omp_get_wtime() < end;)
      fastest = std::min(fastest, seconds());
    total += 2.0 * double(n * n * n) / fastest;
  }
  return total;
}

std::string step_line(const StepMetrics& m, int64_t total_steps, double eta_seconds) {
  std::string line = fmt::format("step {}/{}", m.step, total_steps);
  for_each_scalar(m, [&](const std::string& name, double value, const std::string& format) {
    if (!format.empty()) line += fmt::format(fmt::runtime("  {} " + format), name, value);
  });
  line += fmt::format("@L{:02}  eta {}", busiest(m).first, duration(eta_seconds));  // of load_max
  if (m.validation_loss) line += fmt::format("  validation_loss {:.4f}", *m.validation_loss);
  return line;
}

std::string step_json(const StepMetrics& m) {
  Value line;
  line["step"] = m.step;
  for_each_scalar(m, [&](auto name, double value, auto) { line.add(name, value); });
  line["load_max_layer"] = busiest(m).first;
  Value& load = line["load_max_by_layer"] = Value::array();
  for (const auto& [layer, most] : m.load) load.push_back(most);
  return line.json();
}

// Event files are appended to, should two be opened within one second.
Metrics::Metrics(const RunConfig& run, int64_t done_steps)
    : train_(run.train),
      json_(truncated(run.out + "/metrics.jsonl", done_steps), true),
      events_(new_event_file(run.out + "/tensorboard"), true),
      start_(omp_get_wtime()) {
  events_.write(event_record(0, 3, "brain.Event:2"));  // Event.file_version
}

void Metrics::log(const StepMetrics& m) {
  // By the clock, so that evaluation and checkpoints count too.
  const double left = double(std::max<int64_t>(train_.last_step() - m.step, 0));
  const double eta = (omp_get_wtime() - start_) / double(++logged_) * left;
  say(stdout, step_line(m, train_.steps, eta) + "\n");
  json_.write(step_json(m) + '\n');

  std::string summary;
  const auto add = [&](std::string_view name, double value) {
    std::string scalar;  // Summary.Value: tag = 1, simple_value = 2 (float)
    put_bytes(scalar, 1, name);
    append_raw(scalar, tag(2, kFixed32), float(value));
    put_bytes(summary, 1, scalar);
  };
  for_each_scalar(m, [&](auto name, double value, auto) { add(name, value); });
  for (const auto& [layer, most] : m.load) add(fmt::format("load_max/L{:02}", layer), most);
  events_.write(event_record(m.step, 5, summary));  // Event.summary
}

}  // namespace pith
