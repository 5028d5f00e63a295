#include "core/op.h"

#include <atomic>
#include <chrono>
#include <cmath>

namespace pith {
namespace {

std::atomic<const Op*> current{nullptr};

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

int64_t first_non_finite(const Tensor& t) {
  if (t.dtype() > DType::bf16) return -1;
  return by_float(t.dtype(), [&](auto z) {
    const auto* p = t.data<decltype(z)>();
    for (int64_t i = 0; i < t.numel(); ++i)
      if (!std::isfinite(double(p[i]))) return i;
    return int64_t(-1);
  });
}

}  // namespace

Op::Op(Tape& tape, const char* name, Loc at, std::initializer_list<Arg> args)
    : tape_(tape), name_(name), at_(at), previous_(current.load()) {
  for (const Arg& a : args) {
    args_.push_back({a.name, a.tensor.shape(), a.tensor.dtype(), a.tensor.device()});
    if (!a.tensor) reject(fmt::format("{} is an empty tensor", a.name));
    if (a.tensor.device() != tape.context.device)
      reject(fmt::format("{} is on {}, the tape runs on {}", a.name, name_of(a.tensor.device()),
                         name_of(tape.context.device)));
  }
  current = this;
}

Op::Op(Tape& tape, const Tape::Entry& entry)
    : tape_(tape),
      name_(entry.name),
      at_(entry.at),
      backward_(true),
      args_(entry.args),
      previous_(current.load()) {
  current = this;
}

Op::~Op() { current = previous_; }

std::string Op::arguments() const {
  std::string s;
  for (const Tape::Arg& a : args_)
    s += fmt::format("{} {} {}{} {}", s.empty() ? "" : ",", a.name, name_of(a.dtype), a.shape.str(),
                     name_of(a.device));
  return s;
}

void Op::reject(const std::string& message) const {
  throw OpError(fmt::format("{}: {}{}: {};{}", at_.str(), name_, backward_ ? " backward" : "",
                            message, arguments()));
}

std::string Op::text() const {
  return fmt::format("{}{} at {}:{}", name_, backward_ ? " backward" : "", at_.str(), arguments());
}

const char* current_op_text() noexcept {
  static std::string text;  // the handler runs once
  if (const Op* op = current.load()) text = op->text();
  return text.c_str();
}

Tensor Op::output(const char* name, Shape shape, DType dtype) {
  Tensor t(shape, dtype, tape_.context.device, name);
  if (tape_.record_) {
    tape_.grads_[t.id()];
    outputs_.push_back(t.id());
  }
  written_.push_back(t);
  return t;
}

Tensor Op::workspace(const char* name, Shape shape, DType dtype) {
  return Tensor(shape, dtype, tape_.context.device, name);
}

bool Op::start(Cost cost) {
  Context& c = tape_.context;
  c.total.flops += cost.flops;
  c.total.bytes += cost.bytes;
  ++c.ops;
  cost_ = cost;
  if (c.timeline) begin_ns_ = now_ns();
  return c.device != Device::meta;
}

void Op::run_on_host(const std::function<void()>& cpu) const {
  warn_once(fmt::format("{} has no CUDA kernel: it runs on the host", name_));
  HostView view;
  cpu();
  view.write_back();
}

void Op::finish() {
  Context& c = tape_.context;
  if (c.timeline) c.timeline->push_back({name_, at_, backward_, begin_ns_, now_ns(), cost_});
  if (!backward_) check_written();
}

void Op::check_written() const {
  if (!tape_.context.check_finite || tape_.context.device != Device::cpu) return;
  for (const Tensor& t : written_)
    if (const int64_t i = first_non_finite(t); i >= 0)
      reject(fmt::format("wrote a non-finite value at element {} of {}", i, t.str()));
}

void Op::backward(std::function<void(Op&)> f) {
  if (tape_.record_)
    tape_.entries_.push_back({name_, at_, std::move(args_), std::move(outputs_), std::move(f)});
}

Tensor Op::grad(const Tensor& y) {
  Tensor g = tape_.grad(y);
  return g ? g.reshape(y.shape()) : Tensor::zeros(y.shape(), y.dtype(), y.device(), "grad");
}

Op::Into Op::accumulate(const Tensor& x) {
  if (!tape_.wants(x)) return {};
  Tensor& slot = tape_.grads_[x.id()];
  const bool add = bool(slot);
  if (!add) slot = Tensor(x.shape(), x.dtype(), x.device(), "grad");
  if (tape_.context.check_finite) written_.push_back(slot);
  return {slot.reshape(x.shape()), add};
}

Op::Into Op::accumulate(Param& p) {
  if (!p.grad) return {};
  const bool add = p.grad_written;
  p.grad_written = true;
  if (tape_.context.check_finite) written_.push_back(p.grad);
  return {p.grad, add};
}

void Op::give(const Tensor& x, Tensor grad) {
  if (!tape_.wants(x)) return;
  if (tape_.context.check_finite) written_.push_back(grad);
  tape_.set_grad(x, std::move(grad));
}

void Op::defer(Param& p, const Tensor& x, const Tensor& dy, const Tensor& offsets) {
  if (!p.grad) return;
  if (!tape_.queue) reject("the tape has no queue for the weight gradient of " + p.name);
  tape_.queue->push_back({&p, x, dy, offsets, at_});
}

}  // namespace pith
