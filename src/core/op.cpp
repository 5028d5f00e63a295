#include "core/op.h"

#include <omp.h>

#include <atomic>

namespace pith {

static std::atomic<const Op*> current{nullptr};

Op::Op(Tape& tape, const char* name, Loc at, std::vector<Tape::Arg> args, bool backward)
    : tape_(tape),
      name_(name),
      at_(at),
      backward_(backward),
      args_(std::move(args)),
      previous_(current.load()) {
  for (Tape::Arg& a : args_) {
    require(a.tensor || backward, "{} is an empty tensor", a.name);
    require(a.tensor.device() == tape.context.device, "{} is on {}, the tape runs on {}", a.name,
            name_of(a.tensor.device()), name_of(tape.context.device));
    a.tensor = a.tensor.identity();
  }
  current = this;
}

Op::~Op() { current = previous_; }

std::string Op::text(const std::string& message) const {
  std::string s =
      fmt::format("{}: {}{}: {}", at_.str(), name_, backward_ ? " backward" : "", message);
  for (const Tape::Arg& a : args_)
    s += fmt::format("{} {} {}", &a == args_.data() ? ";" : ",", a.name, a.tensor.str());
  return s;
}

void Op::reject(const std::string& message) const { throw OpError(text(message)); }

const char* current_op_text() noexcept {
  static std::string text;  // the handler runs once
  if (const Op* op = current.load()) text = op->text("was running");
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

void Op::run(Cost cost, const std::function<void()>& cpu, const OnGpu& gpu) {
  Context& c = tape_.context;
  c.total.flops += cost.flops;
  c.total.bytes += cost.bytes;
  if (c.device == Device::meta) return;
  const double begin = omp_get_wtime();
  const bool tagged = c.timeline && c.device == Device::cuda;
  if (tagged) cuda::begin_tag(c.timeline->size(), name_);
  try {
    if (c.device == Device::cpu) {
      cpu();
    } else if (!gpu || !on_gpu() || !gpu(cuda::stream())) {
      warn_once(fmt::format("{} has no CUDA kernel for this: it runs on the host", name_));
      on_host(cpu);
    }
    if (c.sync && c.device == Device::cuda) cuda::synchronize();
  } catch (const OpError&) {
    throw;
  } catch (const std::exception& e) {
    const bool late =
        c.device == Device::cuda && !c.sync && std::string_view(e.what()).starts_with("CUDA");
    reject(std::string(e.what()) + (late ? " (here or before: debug.sync=true finds the op)" : ""));
  }
  if (tagged) cuda::end_tag();
  if (c.timeline)
    c.timeline->push_back({name_, at_, backward_, begin, omp_get_wtime(), cost, c.stage, c.layer});
  if (!backward_) check_written();
}

void Op::check_written() const {
  if (!tape_.context.check_finite || tape_.context.device == Device::meta) return;
  for (const Tensor& t : written_) {
    if (t.dtype() > DType::bf16) continue;
    const std::vector<double> values = t.to_vector<double>();
    const auto bad = std::ranges::find_if(values, [](double v) { return !std::isfinite(v); });
    require(bad == values.end(), "wrote a non-finite value at element {} of {}",
            bad - values.begin(), t.str());
  }
}

void Op::recompute(bool wanted, bool until_flush, const Tensor& y,
                   std::function<void(Op&, const Tensor&)> f) {
  if (!wanted || !(tape_.record_ || backward_)) return;
  Tensor(y).set_remake(
      [f = std::move(f), &context = tape_.context, name = name_, at = at_](const Tensor& y) {
        Tape tape(context, false);
        Op op(tape, name, at, {});
        f(op, y);
      });
  tape_.evictable_.emplace_back(y, until_flush);
}

void Op::backward(std::function<void(Op&)> f) {
  if (tape_.record_)
    tape_.entries_.push_back({name_, at_, std::move(args_), std::move(outputs_), std::move(f)});
}

Op::Into Op::accumulate(const Tensor& x) {
  if (!tape_.wants(x)) return {};
  Tensor& slot = tape_.grads_[x.id()];
  const bool add = bool(slot);
  if (!add) slot = Tensor(x.shape(), x.dtype(), x.device(), "grad");
  written_.push_back(slot);
  return {slot.reshape(x.shape()), add};
}

Op::Into Op::accumulate(Param& p) {
  if (!p.grad) return {};
  const bool add = std::exchange(p.grad_written, true);
  written_.push_back(p.grad);
  return {p.grad, add};
}

void Op::give(const Tensor& x, Tensor grad) {
  if (!tape_.wants(x)) return;
  written_.push_back(grad);
  tape_.set_grad(x, std::move(grad));
}

void Op::defer(Param& p, const Tensor& x, const Tensor& dy, const Tensor& offsets) {
  if (!p.grad) return;
  require(tape_.queue, "the tape has no queue for the weight gradient of {}", p.name);
  tape_.queue->push_back({&p, x, dy, offsets, at_});
}

}  // namespace pith
