#include "core/tape.h"

#include "core/op.h"

namespace pith {

void Tape::leaf(const Tensor& x) {
  if (record_) slots_[x.id()].is_leaf = true;
}

bool Tape::wants(const Tensor& x) const { return record_ && x.id() && slots_.count(x.id()); }

Tensor Tape::grad(const Tensor& x) const {
  const auto slot = slots_.find(x.id());
  return slot == slots_.end() ? Tensor() : slot->second.grad;
}

void Tape::set_grad(const Tensor& y, Tensor grad) {
  if (grad.shape() != y.shape() || grad.dtype() != y.dtype())
    fail("gradient {} does not fit its tensor {}", grad.str(), y.str());
  const auto slot = slots_.find(y.id());
  if (slot == slots_.end()) fail("a gradient was set for a tensor {} this tape did not make", y.str());
  Tensor& there = slot->second.grad;
  if (!there) {
    there = std::move(grad);
    return;
  }
  if (there.device() == Device::meta) return;
  by_float(y.dtype(), [&](auto z) {
    using T = decltype(z);
    T* to = there.data<T>();
    const T* from = grad.data<T>();
    for (int64_t i = 0; i < grad.numel(); ++i) to[i] = T(to[i] + from[i]);
  });
}

Tensor Tape::take_grad(const Tensor& x) {
  const auto slot = slots_.find(x.id());
  if (slot == slots_.end()) fail("a gradient was asked for a tensor {} that is no leaf of this tape", x.str());
  Tensor g = std::move(slot->second.grad);
  slot->second.grad = Tensor();
  return g ? g : Tensor::zeros(x.shape(), x.dtype(), x.device(), "grad");
}

void Tape::backward() {
  while (!entries_.empty()) {
    Entry entry = std::move(entries_.back());
    entries_.pop_back();
    bool reached = false;
    for (uint64_t id : entry.outputs) reached = reached || bool(slots_[id].grad);
    if (reached) {
      Op op(*this, entry);
      entry.run(op);
      op.check_written();
    }
    // Nothing earlier can add to these any more: their memory is free from here on.
    for (uint64_t id : entry.outputs) slots_.erase(id);
  }
}

}  // namespace pith
