#include "engine/optimizer.h"

#include <numbers>

#include "ops/optimizer.h"

namespace pith {

// Muon needs matrices; a piece of rank 3 is a batch of them.
static bool muon_fits(const Param& p) {
  const auto matrices = [](const Piece& s) { return s.shape.rank() == 2 || s.shape.rank() == 3; };
  return p.role == Role::matrix && std::ranges::all_of(p.pieces, matrices);
}

// Consecutive pieces of one shape, such as gate and up of every expert, are one batch of matrices.
static void update_by_muon(Tape& tape, const Muon& rule, const Param& p, const Tensor& momentum) {
  for (size_t i = 0, next; i < p.pieces.size(); i = next) {
    const Shape& s = p.pieces[i].shape;
    for (next = i; next < p.pieces.size() && p.pieces[next].shape == s;) ++next;
    const int64_t rows = s[s.rank() - 2], columns = s[s.rank() - 1];
    const int64_t begin = p.pieces[i].begin, end = begin + int64_t(next - i) * s.numel();
    const auto batch = [&](const Tensor& t) {
      return t ? t.elements(begin, end).reshape({(end - begin) / (rows * columns), rows, columns})
               : t;
    };
    const Tensor value = batch(p.value), rest = batch(p.rest), master = join_master(value, rest);
    Tensor grad = batch(p.grad);
    if (grad.dtype() != master.dtype()) grad = grad.to(master.dtype(), "wide_grad");
    muon_update(tape, rule, grad, batch(momentum), master, value);
    split_master(master, value, rest);
  }
}

double learning_rate(const OptimizerConfig& optimizer, int64_t total_steps, int64_t step) {
  const double lr = optimizer.lr, final_lr = optimizer.final_lr;
  const std::string& schedule = optimizer.schedule;
  const int64_t warmup = std::llround(optimizer.warmup_ratio * double(total_steps));
  const int64_t decay = std::llround(optimizer.decay_ratio * double(total_steps));
  step = std::min(step, total_steps);
  if (step <= warmup) return lr * double(step) / double(warmup);
  if (schedule == "constant") return lr;

  // The falling part is updates begin + 1 to total_steps.
  const int64_t begin = schedule == "wsd" ? total_steps - decay : warmup;
  if (step <= begin) return lr;
  const double t = double(step - begin) / double(total_steps - begin);
  if (schedule == "linear") return final_lr + (lr - final_lr) * (1 - t);
  if (schedule == "wsd" || schedule == "cosine")
    return final_lr + (lr - final_lr) * (1 + std::cos(std::numbers::pi * t)) / 2;
  fail_input("optimizer.schedule = \"{}\": expected wsd | cosine | linear | constant", schedule);
}

Optimizer::Optimizer(ParamSet& params, const RunConfig& run, Context& context)
    : params_(params), rule_(run.optimizer), context_(context) {
  for (const auto& p : params_) {
    if (!p->trained()) continue;
    const auto add = [&](const char* kind, const char* name) {
      states_.push_back(
          {kind, p.get(),
           Tensor::zeros(p->shape, master_dtype(p->value.dtype()), p->value.device(), name)});
    };
    const bool muon = rule_.name == "muon" && muon_fits(*p);
    add(muon ? "momentum" : "m", muon ? "muon_momentum" : "adam_m");
    if (!muon) add("v", "adam_v");
  }
}

void Optimizer::update(double lr, int64_t step, double labels) {
  context_.enter("optimizer");
  Tape tape(context_, false);
  std::vector<Tensor> grads;
  for (const auto& p : params_) {
    if (!p->trained()) continue;
    if (!p->grad_written) p->grad.fill_zero();  // nothing reached it in this step
    p->grad_written = true;
    grads.push_back(p->grad);
  }
  norm_ = clip_by_norm(tape, sum_of_squares(tape, grads), labels, rule_.clip_norm);
  const bool muon = std::ranges::count(states_, "momentum", &State::kind) > 0;
  const auto scale = muon ? norm_.to_vector<double>() : std::vector<double>{0, 0};
  for (size_t i = 0; i < states_.size(); ++i) {
    const auto& [kind, p, tensor] = states_[i];
    const double decay = p->decay ? rule_.weight_decay : 0;
    if (kind == "momentum" && std::isfinite(scale[0]))
      update_by_muon(tape, {lr, rule_.momentum, decay, scale[1]}, *p, tensor);
    else if (kind == "m")
      adamw_update(tape, {lr, rule_.betas[0], rule_.betas[1], rule_.eps, decay, step}, norm_,
                   p->grad, tensor, states_[i + 1].tensor, p->value, p->rest);
  }
}

Optimizer::Norm Optimizer::norm() {
  if (context_.device == Device::meta) return {};
  Norm norm{norm_.to_vector<double>()[0], ""};
  if (std::isfinite(norm.value)) return norm;
  Tape tape(context_, false);
  const auto is_bad = [&](const Tensor& g) {
    return !std::isfinite(sum_of_squares(tape, {&g, 1}).to_vector<double>()[0]);
  };
  for (const auto& p : params_) {
    if (!p->trained() || !is_bad(p->grad)) continue;
    norm.first_bad = p->name;
    const auto bad = std::ranges::find_if(p->pieces, [&](const Piece& piece) {
      return is_bad(p->grad.elements(piece.begin, piece.begin + piece.shape.numel()));
    });
    if (bad != p->pieces.end() && bad->name != p->name) norm.first_bad += " (" + bad->name + ")";
    break;
  }
  return norm;
}

}  // namespace pith
