#include "engine/optimizer.h"

#include "ops/optimizer.h"

namespace pith {
namespace {

Tensor elements(const Tensor& t, int64_t begin, int64_t end) {
  return t.reshape({t.numel()}).row_range(begin, end);
}

// Muon needs matrices; a piece of rank 3 is a batch of them.
bool muon_fits(const Param& p) {
  const auto matrices = [](const Piece& s) { return s.shape.rank() == 2 || s.shape.rank() == 3; };
  return p.role == Role::matrix && std::ranges::all_of(p.pieces, matrices);
}

// Consecutive pieces of one shape, such as gate and up of every expert, are one batch of matrices.
void update_by_muon(Tape& tape, const Muon& rule, const Param& p, const Tensor& momentum) {
  for (size_t i = 0, next; i < p.pieces.size(); i = next) {
    const Shape& s = p.pieces[i].shape;
    for (next = i; next < p.pieces.size() && p.pieces[next].shape == s;) ++next;
    const int64_t rows = s[s.rank() - 2], columns = s[s.rank() - 1];
    const int64_t begin = p.pieces[i].begin, end = begin + int64_t(next - i) * s.numel();
    const auto batch = [&](const Tensor& t) {
      return elements(t, begin, end).reshape({(end - begin) / (rows * columns), rows, columns});
    };
    muon_update(tape, rule, batch(p.grad), batch(momentum), batch(p.master), batch(p.value));
  }
}

}  // namespace

Optimizer::Optimizer(ParamSet& params, const RunConfig& run, Context& context)
    : params_(params), rule_(run.optimizer), context_(context) {
  for (const auto& p : params_) {
    if (!p->trained()) continue;
    const auto moment = [&](const char* name) {
      return Tensor::zeros(p->shape, p->master.dtype(), p->master.device(), name);
    };
    if (rule_.name == "muon" && muon_fits(*p))
      slots_.push_back({p.get(), moment("muon_momentum"), {}});
    else
      slots_.push_back({p.get(), moment("adam_m"), moment("adam_v")});
  }
}

std::vector<Optimizer::State> Optimizer::states() const {
  std::vector<State> all;
  for (const Slot& s : slots_) {
    all.push_back({s.second ? "m" : "momentum", s.param, s.first});
    if (s.second) all.push_back({"v", s.param, s.second});
  }
  return all;
}

Optimizer::Norm Optimizer::grad_norm(double labels) {
  Tape tape(context_, false);
  Norm norm;
  double sum = 0;
  for (Slot& slot : slots_) {
    Param& p = *slot.param;
    if (!p.grad_written) p.grad.fill_zero();  // nothing reached it in this step
    p.grad_written = true;
    const double squares = sum_of_squares(tape, p.grad);
    sum += squares;
    if (std::isfinite(squares) || !norm.finite()) continue;
    norm.first_bad = p.name;
    const auto is_bad = [&](const Piece& piece) {
      const int64_t end = piece.begin + piece.shape.numel();
      return !std::isfinite(sum_of_squares(tape, elements(p.grad, piece.begin, end)));
    };
    const auto bad = std::ranges::find_if(p.pieces, is_bad);
    if (bad != p.pieces.end() && bad->name != p.name) norm.first_bad += " (" + bad->name + ")";
  }
  norm.value = std::sqrt(sum) / labels;
  return norm;
}

void Optimizer::update(double lr, int64_t step, const Norm& norm, double labels) {
  if (!norm.finite()) return;
  const double most = rule_.clip_norm > 0 ? rule_.clip_norm / (norm.value + 1e-6) : 1.0;
  const double scale = std::min(1.0, most) / labels;
  Tape tape(context_, false);
  for (Slot& slot : slots_) {
    Param& p = *slot.param;
    const double decay = p.decay ? rule_.weight_decay : 0;
    if (slot.second)
      adamw_update(tape, {lr, rule_.betas[0], rule_.betas[1], rule_.eps, decay, scale, step},
                   p.grad, slot.first, slot.second, p.master, p.value);
    else
      update_by_muon(tape, {lr, rule_.momentum, decay, scale}, p, slot.first);
  }
}

}  // namespace pith
