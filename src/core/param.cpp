#include "core/param.h"

#include <algorithm>
#include <type_traits>

#include "core/rng.h"

namespace pith {

Param& ParamSet::add(Param p) {
  if (p.pieces.empty()) p.pieces = {{p.name, p.shape}};
  const auto place = [&](std::vector<Piece>& pieces) {
    int64_t at = 0;
    for (Piece& piece : pieces) {
      piece.begin = at;
      at += piece.shape.numel();
    }
    if (at != p.numel())
      fail("{}: pieces hold {} elements, the parameter {} has {}", p.name, at, p.shape.str(), p.numel());
  };
  place(p.pieces);
  for (auto& form : p.also_read) place(form);
  for (const auto& other : params_)
    if (other->name == p.name) fail("parameter {} is declared twice", p.name);
  return *params_.emplace_back(std::make_unique<Param>(std::move(p)));
}

Param& ParamSet::find(const std::string& name) const {
  for (const auto& p : params_)
    if (p->name == name) return *p;
  fail("there is no parameter {}", name);
}

void ParamSet::allocate(DType compute, Device device, bool training) {
  const DType wide = master_dtype(compute);
  for (auto& p : params_) {
    const DType own = p->trained() ? compute : wide;
    p->value = Tensor(p->shape, own, device, "weight");
    if (!training || own == wide)
      p->master = p->value;
    else
      p->master = Tensor(p->shape, wide, device, "master");
    if (training && p->trained()) p->grad = Tensor(p->shape, wide, device, "main_grad");
  }
}

void ParamSet::initialize(uint64_t seed, double std) {
  for (auto& p : params_) {
    if (p->value.device() == Device::meta) continue;
    Tensor flat = p->master.reshape({p->numel()});
    for (const Piece& piece : p->pieces) {
      Tensor part = flat.row_range(piece.begin, piece.begin + piece.shape.numel());
      Tensor wide = part.dtype() == DType::bf16 ? part.to(DType::f32, "init") : part;
      if (p->init == Init::normal) {
        fill_normal(wide, stream_key(seed, piece.name), 0, std);
      } else {
        const double fill = p->init == Init::ones ? 1 : p->init == Init::uniform ? 1.0 / double(p->numel()) : 0;
        by_float(wide.dtype(), [&](auto z) {
          using T = decltype(z);
          if constexpr (!std::is_same_v<T, bf16>) std::fill_n(wide.data<T>(), wide.numel(), T(fill));
        });
      }
      if (part.dtype() == DType::bf16) part.copy_from(wide);
    }
  }
  sync_values();
}

void ParamSet::sync_values() {
  for (auto& p : params_)
    if (p->value.dtype() != p->master.dtype()) p->value.copy_from(p->master);
}

void ParamSet::begin_step() {
  for (auto& p : params_) p->grad_written = false;
}

int64_t ParamSet::trained_elements() const {
  int64_t n = 0;
  for (auto& p : params_) n += p->trained() ? p->numel() : 0;
  return n;
}

}  // namespace pith
