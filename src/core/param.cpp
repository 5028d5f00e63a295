#include "core/param.h"

#include "core/rng.h"

namespace pith {

Param& ParamSet::add(Param p) {
  if (p.pieces.empty()) p.pieces = {{p.name, p.shape}};
  const auto place = [&](std::vector<Piece>& pieces) {
    int64_t at = 0;
    for (Piece& piece : pieces) at = (piece.begin = at) + piece.shape.numel();
    if (at != p.numel())
      fail("{}: pieces hold {} elements, the parameter {} has {}", p.name, at, p.shape.str(),
           p.numel());
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
    p->value = Tensor(p->shape, p->trained() ? compute : wide, device, "weight");
    const bool apart = training && p->value.dtype() != wide;
    p->master = apart ? Tensor(p->shape, wide, device, "master") : p->value;
    if (training && p->trained()) p->grad = Tensor(p->shape, wide, device, "main_grad");
  }
}

void ParamSet::initialize(uint64_t seed, double std) {
  for (auto& p : params_) {
    if (p->value.device() == Device::meta) continue;
    Tensor flat = p->master.on(Device::cpu).reshape({p->numel()});
    if (p->init == Init::normal) {
      for (const Piece& piece : p->pieces)
        fill_normal(flat.row_range(piece.begin, piece.begin + piece.shape.numel()),
                    stream_key(seed, piece.name), 0, std);
    } else {
      const double share = 1.0 / double(p->numel());
      const double fill = p->init == Init::uniform ? share : double(p->init == Init::ones);
      flat.copy_from(Tensor::of<double>(flat.shape(), std::vector(size_t(p->numel()), fill)));
    }
    if (p->master.device() != Device::cpu) p->master.copy_from(flat);
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
