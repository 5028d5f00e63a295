#include "core/tape.h"

#include "core/file.h"
#include "core/op.h"

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
  } else if (there.device() != Device::meta) {
    by_float(y.dtype(), [&](auto z) {
      using T = decltype(z);
      T* to = there.data<T>();
      const T* from = grad.data<T>();
#pragma omp parallel for simd if (parallel : grad.numel() > 65536)
      for (int64_t i = 0; i < grad.numel(); ++i) to[i] = T(to[i] + from[i]);
    });
  }
}

Tensor Tape::take_grad(const Tensor& x) {
  Tensor g = std::exchange(slot(x), {});
  return g ? g : Tensor::zeros(x.shape(), x.dtype(), x.device(), "grad");
}

void Tape::backward() {
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

}  // namespace pith
