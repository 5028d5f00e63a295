#pragma once
// Parameters are declared once, in the model file. From the declaration come initialization,
// optimizer groups, sharding and the names, order and layout of Hugging Face tensors: there is no
// converter.

#include "core/tensor.h"

namespace pith {

// One Hugging Face tensor and where it lies inside a parameter: the pieces of a parameter are
// concatenated in memory in the order given (gate and up of every expert, or q, k and v), so a
// piece is a contiguous range.
struct Piece {
  std::string name;  // written in full in the model file's pattern, so that grep finds it
  Shape shape;
  int64_t begin = 0;  // first element in the parameter; filled in by ParamSet::add
};

enum class Init { normal, zeros, ones, uniform };  // uniform: 1 / elements

// What a parameter is to the optimizer: `matrix` is what Muon orthogonalizes, piece by piece;
// everything else is AdamW's. `state` is not trained: it is updated in Model::after_step, kept in
// the master dtype and never decayed.
enum class Role { matrix, vector, embedding, head, router, state };

struct Param {
  std::string name;
  Shape shape;
  Role role = Role::matrix;
  bool decay = true;  // weight decay; norms and biases say false
  Init init = Init::normal;
  std::vector<Piece> pieces;  // the form it is written in, and first choice for reading
  std::vector<std::vector<Piece>> also_read;  // other source forms, each of the whole parameter
  bool exported = true;  // false: Hugging Face has no tensor for it; kept in trainer/ only

  Tensor value;  // compute dtype (state: master dtype)
  Tensor rest;   // what a bf16 value lacks of its fp32 master; empty where `value` is the master
  Tensor grad;   // main gradient, master dtype or bf16; a sum over the labels of the step
  // false: the next contribution of this step overwrites (beta 0), no zeroing pass
  bool grad_written = false;

  bool trained() const { return role != Role::state; }
  int64_t numel() const { return shape.numel(); }
  Tensor master() const;  // fp32 (fp64 in fp64 runs): `value` itself, or a copy
  void set_master(const Tensor& wide);
};

// A master x lies in memory as value = bf16(x) and the 16 bits rest = bits(x) - (bits(value) << 16),
// as a signed number: as many bytes as x alone has. One x in 2^17 has no such rest, the one exactly
// between two bf16 that rounds down: it is kept one bit lower. Here for consecutive elements; both
// tensors on one device.
Tensor join_master(const Tensor& value, const Tensor& rest);  // `value` itself without a rest
void split_master(const Tensor& wide, Tensor value, Tensor rest);

constexpr float join_master(uint16_t value, uint16_t rest) {
  return std::bit_cast<float>((uint32_t(value) << 16) + uint32_t(int32_t(int16_t(rest))));
}
constexpr uint16_t rest_of_master(float x, uint16_t value) {
  const int32_t rest = int32_t(std::bit_cast<uint32_t>(x) - (uint32_t(value) << 16));
  return uint16_t(rest < 0x7fff ? rest : 0x7fff);
}

class ParamSet {
 public:
  // Checks that the pieces fill the shape exactly and that no name appears twice; the reference
  // stays valid.
  Param& add(Param p);
  auto begin() const { return params_.begin(); }
  auto end() const { return params_.end(); }
  Param& find(const std::string& name) const;

  // Memory for values, masters and gradients (the latter only if `training`), uninitialized.
  // bf16_grads: of matrices, the router and the head; other gradients have the master dtype.
  void allocate(DType compute, Device device, bool training, bool bf16_grads = false);
  // Counter RNG keyed by (seed, Hugging Face name, element index): the same model on every layout.
  void initialize(uint64_t seed, double std);
  void begin_step();  // the next gradient contribution overwrites
  int64_t trained_elements() const;

 private:
  std::vector<std::unique_ptr<Param>> params_;
};

inline DType master_dtype(DType compute) { return compute == DType::f64 ? DType::f64 : DType::f32; }

}  // namespace pith
