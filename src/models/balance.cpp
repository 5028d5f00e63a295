#include "models/balance.h"

namespace pith {
namespace {

Tensor wide_scalar(const Context& c, double value) {
  Tensor t(Shape{1}, master_dtype(c.dtype), c.device, "loss");
  if (c.device == Device::cpu)
    t.copy_from(Tensor::of<double>({1}, std::vector<double>{value}));
  return t;
}

Tensor& statistic(MicroBatch& mb, const Context& c, const char* name, Shape shape) {
  Tensor& sum = (*mb.statistics)[name];
  if (!sum) sum = Tensor::zeros(shape, master_dtype(c.dtype), c.device, "statistics");
  return sum;
}

}  // namespace

RouterState declare_router_state(ParamSet& params, const Balance& balance, const std::string& prefix, int64_t experts,
                                 const std::string& bias_name) {
  RouterState state;
  if (balance.bias_update_rate > 0) {
    const std::string name = bias_name.empty() ? prefix + ".e_score_correction_bias" : bias_name;
    state.bias = &params.add({.name = name, .shape = {experts}, .role = Role::state, .init = Init::zeros,
                              .exported = !bias_name.empty()});
  }
  if (balance.loss == Balance::Loss::global_batch)
    state.fractions = &params.add({.name = prefix + ".expert_fractions", .shape = {1, experts}, .role = Role::state,
                                   .init = Init::uniform, .exported = false});
  return state;
}

void add_loss(Tape& t, MicroBatch& mb, const char* name, const Tensor& scalar, double coefficient) {
  if (mb.statistics) {
    Tensor& sum = statistic(mb, t.context, name, {1});
    if (t.context.device == Device::cpu)
      sum.copy_from(Tensor::of<double>({1}, std::vector<double>{sum.to_vector<double>()[0] +
                                                                scalar.to_vector<double>()[0]}));
  }
  if (t.recording() && coefficient != 0) t.set_grad(scalar, wide_scalar(t.context, coefficient));
}

Routing route(Tape& t, MicroBatch& mb, const Balance& balance, const RouterRule& rule, const RouterState& state,
              int64_t moe_layer, int64_t moe_layers, const Tensor& logits_TE, Loc at) {
  const int64_t E = logits_TE.dim(1), T = logits_TE.dim(0);
  Tensor ids_TK;
  if (balance.force) ids_TK = balanced_ids(t, T, rule.top_k, E, at);
  if (!mb.replay.empty()) ids_TK = mb.replay.at(size_t(moe_layer));
  Routing r = route_top_k(t, logits_TE, rule, state.bias ? state.bias->value : Tensor(), ids_TK, at);
  if (mb.trace) mb.trace->push_back({r.ids, r.weights, {}});
  if (mb.statistics) {
    Tensor counts_LE = statistic(mb, t.context, "expert_count", {moe_layers, E});
    Tensor counts_E = counts_LE.row_range(moe_layer, moe_layer + 1).reshape({E});
    count_experts(t, r.ids, counts_E, at);
  }
  if (!t.recording()) return r;
  if (balance.loss != Balance::Loss::none) {
    const int64_t groups = balance.loss == Balance::Loss::sequence ? mb.batch : 1;
    const Tensor fractions_GE = state.fractions ? state.fractions->value : expert_fractions(t, r.ids, E, groups, at);
    Tensor loss = balance_loss(t, r.scores, fractions_GE, groups, at);
    add_loss(t, mb, "balance_loss", loss, balance.coefficient * mb.step_labels / mb.step_micro_batches);
  }
  if (balance.z_loss != 0) {
    Tensor loss = z_loss(t, logits_TE, at);
    add_loss(t, mb, "z_loss", loss, balance.z_loss * mb.step_labels / mb.step_tokens);
  }
  return r;
}

void update_router_state(const RouterState& state, const Balance& balance, const Tensor& counts) {
  const std::vector<double> count = counts.to_vector<double>();
  double total = 0;
  for (double c : count) total += c;
  if (total == 0) return;
  const double mean = total / double(count.size());
  std::vector<double> bias = state.bias ? state.bias->value.to_vector<double>() : std::vector<double>();
  double center = 0;
  for (size_t e = 0; e < bias.size(); ++e) {
    bias[e] += balance.bias_update_rate * double((mean > count[e]) - (mean < count[e]));
    center += bias[e] / double(bias.size());
  }
  for (double& b : bias) b -= center;
  if (state.bias) state.bias->value.copy_from(Tensor::of<double>(state.bias->shape, bias));
  std::vector<double> fractions = count;
  for (double& f : fractions) f /= total;
  if (state.fractions) state.fractions->value.copy_from(Tensor::of<double>(state.fractions->shape, fractions));
}

}  // namespace pith
