#include "core/param.h"

#include "core/cuda.h"
#include "core/rng.h"

namespace pith {

Tensor join_master(const Tensor& value, const Tensor& rest) {
  if (!rest) return value;
  Tensor wide(value.shape(), DType::f32, value.device(), "joined_master");
  if (value.device() == Device::cuda) return cuda::join_master(wide, value, rest), wide;
  if (value.device() == Device::meta) return wide;
  float* to = wide.data<float>();
  const bf16* high = value.data<bf16>();
  const uint16_t* low = rest.data<uint16_t>();
#pragma omp parallel for simd if (parallel : wide.numel() > 65536)
  for (int64_t i = 0; i < wide.numel(); ++i) to[i] = join_master(high[i].bits, low[i]);
  return wide;
}

void split_master(const Tensor& wide, Tensor value, Tensor rest) {
  value.copy_from(wide);
  if (!rest || value.device() == Device::meta) return;
  if (value.device() == Device::cuda) return cuda::split_master(wide, value, rest);
  const float* from = wide.data<float>();
  const bf16* high = std::as_const(value).data<bf16>();
  uint16_t* to = rest.data<uint16_t>();
#pragma omp parallel for simd if (parallel : wide.numel() > 65536)
  for (int64_t i = 0; i < wide.numel(); ++i) to[i] = rest_of_master(from[i], high[i].bits);
}

Tensor Param::master() const { return join_master(value, rest); }
void Param::set_master(const Tensor& wide) { split_master(wide, value, rest); }

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

void ParamSet::allocate(DType compute, Device device, bool training, bool bf16_grads) {
  const DType wide = master_dtype(compute);
  for (auto& p : params_) {
    p->value = Tensor(p->shape, p->trained() ? compute : wide, device, "weight");
    if (training && p->value.dtype() != wide)
      p->rest = Tensor(p->shape, DType::u16, device, "master_rest");
    const bool product = p->role != Role::vector && p->role != Role::embedding;
    if (training && p->trained())
      p->grad = Tensor(p->shape, product && bf16_grads ? DType::bf16 : wide, device, "main_grad");
  }
}

void ParamSet::initialize(uint64_t seed, double std) {
  for (auto& p : params_) {
    if (p->value.device() == Device::meta) continue;
    Tensor flat({p->numel()}, master_dtype(p->value.dtype()), p->value.device(), "initial");
    if (p->init == Init::normal) {
      for (const Piece& piece : p->pieces)
        fill_normal(flat.elements(piece.begin, piece.begin + piece.shape.numel()),
                    stream_key(seed, piece.name), 0, std);
    } else {
      const double share = 1.0 / double(p->numel());
      const double fill = p->init == Init::uniform ? share : double(p->init == Init::ones);
      flat.copy_from(Tensor::of<double>(flat.shape(), std::vector(size_t(p->numel()), fill)));
    }
    p->set_master(flat);
  }
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
