#include "core/tape.h"

#include "core/file.h"
#include "core/op.h"
#include "core/value.h"

namespace pith {

void Tape::leaf(const Tensor& x) {
  if (record_) grads_[x.id()];
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

void write_chrome_trace(const std::string& path, const std::vector<OpEvent>& events) {
  std::string out = "{\"traceEvents\":[\n";
  for (const OpEvent& e : events)
    out += fmt::format(
        "{}{{\"name\":\"{}{}\",\"ph\":\"X\",\"pid\":0,\"tid\":0,\"ts\":{:.3f},\"dur\":{:.3f},"
        "\"args\":{{\"at\":\"{}\",\"gflop\":{:.6f},\"mb\":{:.6f}}}}}",
        &e == events.data() ? "" : ",\n", e.name, e.backward ? " backward" : "",
        (e.begin - events.front().begin) * 1e6, (e.end - e.begin) * 1e6, e.at.str(),
        e.cost.flops / 1e9, e.cost.bytes / 1e6);
  write_file_atomic(path, out + "\n]}\n");
}

void write_kernel_trace(const std::string& path, const std::vector<OpEvent>& events,
                        const cuda::Timeline& timeline) {
  std::string out = "{\"traceEvents\":[\n";
  std::map<std::string, std::pair<double, int64_t>> totals;  // ms and instances
  const uint64_t start = timeline.runs.empty() ? 0 : timeline.runs.front().begin_ns;
  for (const auto& run : timeline.runs) {
    const bool known = run.tag < events.size();
    const std::string op = known ? fmt::format("{}{}", events[run.tag].name,
                                               events[run.tag].backward ? " backward" : "")
                                 : "";
    const double ms = double(run.end_ns - run.begin_ns) / 1e6;
    out += fmt::format(
        "{}{{\"name\":{},\"ph\":\"X\",\"pid\":0,\"tid\":0,\"ts\":{:.3f},\"dur\":{:.3f},"
        "\"args\":{{\"op\":\"{}\",\"at\":\"{}\"}}}}",
        &run == timeline.runs.data() ? "" : ",\n", Value(run.name).json(),
        (double(run.begin_ns) - double(start)) / 1e3, ms * 1e3, op,
        known ? events[run.tag].at.str() : "");
    auto& [total, count] = totals[run.name + (known ? " [" + op + "]" : "")];
    total += ms;
    ++count;
  }
  write_file_atomic(path, out + "\n]}\n");
  std::vector<std::pair<std::pair<double, int64_t>, std::string>> heaviest;
  for (const auto& [name, total] : totals) heaviest.push_back({total, name});
  std::sort(heaviest.rbegin(), heaviest.rend());
  std::string csv = "kernel_name,total_time_ms,instances,mean_time_ms\n";
  for (const auto& [total, name] : heaviest)
    csv += fmt::format("{},{:.4f},{},{:.5f}\n", Value(name).json(), total.first, total.second,
                       total.first / double(total.second));
  write_file_atomic(path + ".csv", csv);
}

}  // namespace pith
