#include "core/tape.h"

#include "core/file.h"
#include "core/op.h"
#include "core/value.h"

namespace pith {

void Tape::leaf(const Tensor& x) {
  if (record_ && x.id()) grads_[x.id()];
}

Tensor& Tape::slot(const Tensor& x) {
  const auto found = grads_.find(x.id());
  if (found == grads_.end()) fail("{} is neither a leaf nor an output of this tape", x.str());
  return found->second;
}

void Tape::set_grad(const Tensor& y, Tensor grad) {
  if (grad.shape() != y.shape() || grad.dtype() != y.dtype())
    fail("gradient {} does not fit its tensor {}", grad.str(), y.str());
  Tensor& there = slot(y);
  if (!there) {
    there = std::move(grad);
  } else {
    there.add(grad);
  }
}

Tensor Tape::take_grad(const Tensor& x) {
  if (!x.id()) return {};
  Tensor g = std::exchange(slot(x), {});
  return g ? g : Tensor::zeros(x.shape(), x.dtype(), x.device(), "grad");
}

void Tape::evict() const {
  for (const auto& [tensor, until_flush] : evictable_) tensor.evict();
}

void Tape::backward() {
  for (auto& [tensor, until_flush] : evictable_) {
    if (until_flush) continue;
    tensor.restore();
    tensor.set_remake(nullptr);  // and with it what it is made of
  }
  while (!entries_.empty()) {
    Entry entry = std::move(entries_.back());
    entries_.pop_back();
    const auto reached = [&](uint64_t id) { return bool(grads_[id]); };
    if (std::ranges::any_of(entry.outputs, reached)) {
      Op op(*this, entry.name, entry.at, std::move(entry.args), true);
      entry.run(op);
      op.check_written();
    }
    // Nothing earlier can add to these any more: their memory is free from here on.
    for (uint64_t id : entry.outputs) grads_.erase(id);
  }
  evict();
}

void Context::enter(const char* new_stage, int64_t new_layer) {
  stage = new_stage;
  layer = new_layer;
  if (timeline && device == Device::cuda)
    cuda::enter_range(layer < 0 ? stage : fmt::format("{} L{:02}", stage, layer));
}

static std::string label(const char* name, bool backward) {
  return std::string(name) + (backward ? " backward" : "");
}

struct Total {
  double ms = 0;
  int64_t instances = 0;
};
using Totals = std::map<std::string, Total>;

static auto heaviest_first(const Totals& totals) {
  std::vector<std::pair<std::string, Total>> sorted(totals.begin(), totals.end());
  std::ranges::stable_sort(sorted, std::greater(), [](const auto& t) { return t.second.ms; });
  return sorted;
}

std::string write_timeline(const std::string& path, const std::vector<OpEvent>& events,
                           cuda::Timeline timeline) {
  auto& runs = timeline.runs;
  if (runs.empty())
    for (const OpEvent& e : events) {
      const auto ns = [&](double time) { return uint64_t((time - events[0].begin) * 1e9); };
      runs.push_back(
          {label(e.name, e.backward), ns(e.begin), ns(e.end), uint64_t(&e - events.data())});
    }
  std::string trace;
  Totals kernels, stages;
  double busy_ms = 0;
  const OpEvent* of = nullptr;  // what lies between two ops counts to the stage of the first
  for (const auto& run : runs) {
    const bool tagged = run.tag < events.size();
    if (tagged) of = &events[run.tag];
    const std::string op = tagged ? label(of->name, of->backward) : "";
    const double ms = double(run.end_ns - run.begin_ns) / 1e6;
    trace +=
        fmt::format("{}{{\"name\":{},\"ph\":\"X\",\"pid\":0,\"tid\":0,\"ts\":{:.3f},\"dur\":{:.3f}",
                    trace.empty() ? "" : ",\n", Value(run.name).json(),
                    double(run.begin_ns - runs[0].begin_ns) / 1e3, ms * 1e3);
    if (of)
      trace += fmt::format(
          ",\"args\":{{\"op\":\"{}\",\"at\":\"{}\",\"stage\":\"{}\",\"layer\":{},\"gflop\":{:.6f},"
          "\"mb\":{:.6f}}}",
          op, tagged ? of->at.str() : "", of->stage, of->layer, of->cost.flops / 1e9,
          of->cost.bytes / 1e6);
    trace += "}";
    for (Total* total : {&kernels[run.name + (tagged && op != run.name ? " [" + op + "]" : "")],
                         &stages[of ? label(of->stage, of->backward) : "before the first op"]}) {
      total->ms += ms;
      ++total->instances;
    }
    busy_ms += ms;
  }
  const double span_ms = runs.empty() ? 0 : double(runs.back().end_ns - runs[0].begin_ns) / 1e6;
  stages["idle"].ms = span_ms - busy_ms;

  std::string csv = "kernel_name,total_time_ms,instances,mean_time_ms\n";
  for (const auto& [name, total] : heaviest_first(kernels))
    csv += fmt::format("{},{:.4f},{},{:.5f}\n", Value(name).json(), total.ms, total.instances,
                       total.ms / double(total.instances));
  std::string stages_csv = "stage,total_time_ms,instances,share\n", table;
  for (const auto& [name, total] : heaviest_first(stages)) {
    const double share = span_ms > 0 ? total.ms / span_ms : 0;
    stages_csv += fmt::format("{},{:.4f},{},{:.5f}\n", name, total.ms, total.instances, share);
    table += fmt::format("  {:<34} {:>10.3f} ms {:>6.1f}%\n", name, total.ms, 100 * share);
  }
  write_file_atomic(path, "{\"traceEvents\":[\n" + trace + "\n]}\n");
  write_file_atomic(path + ".csv", csv);
  write_file_atomic(path + ".stages.csv", stages_csv);
  return table;
}

}  // namespace pith
