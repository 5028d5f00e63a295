#include "models/balance.h"

namespace pith {

// Adds coefficient * scalar (wide [1]) to what is differentiated and scalar to the statistics.
static void add_loss(Tape& t, MicroBatch& mb, const char* name, const Tensor& scalar,
                     double coefficient) {
  if (mb.statistics) {
    Tensor& sum = (*mb.statistics)[name];
    if (sum)
      sum.add(scalar);
    else
      sum = scalar.clone("statistics");
  }
  if (t.recording() && coefficient != 0) t.set_grad(scalar, wide_scalar(t.context, coefficient));
}

RouterState declare_router_state(ParamSet& params, const Balance& balance,
                                 const std::string& prefix, int64_t experts) {
  const auto declare = [&](const char* name, Shape shape, Init init) {
    Param p{.name = prefix + name, .shape = shape, .role = Role::state, .init = init};
    p.exported = false;
    return &params.add(std::move(p));
  };
  RouterState state;
  if (balance.bias_update_rate > 0)
    state.bias = declare(".e_score_correction_bias", {experts}, Init::zeros);
  if (balance.loss == "global_batch")
    state.fractions = declare(".expert_fractions", {1, experts}, Init::uniform);
  return state;
}

Routing route(Tape& t, MicroBatch& mb, const Balance& balance, const RouterRule& rule,
              const RouterState& state, int64_t moe_layer, int64_t moe_layers,
              const Tensor& logits_TE, Loc at) {
  const int64_t E = logits_TE.dim(1), T = logits_TE.dim(0);
  Tensor ids_TK;
  if (balance.force) ids_TK = balanced_ids(t, T, rule.top_k, E, at);
  if (!mb.replay.empty()) ids_TK = mb.replay.at(size_t(moe_layer));
  Routing r =
      route_top_k(t, logits_TE, rule, state.bias ? state.bias->value : Tensor(), ids_TK, at);
  if (mb.trace) mb.trace->push_back({r.ids, r.weights, {}});
  if (mb.statistics) {
    Tensor& counts_LE = (*mb.statistics)["expert_count"];
    if (!counts_LE)
      counts_LE = Tensor::zeros({moe_layers, E}, logits_TE.dtype(), t.context.device, "statistics");
    Tensor counts_E = counts_LE.row_range(moe_layer, moe_layer + 1).reshape({E});
    count_experts(t, r.ids, counts_E, at);
  }
  if (!t.recording() && !mb.statistics) return r;
  if (balance.loss != "none") {
    const int64_t groups = balance.loss == "sequence" ? mb.batch : 1;
    const Tensor fractions_GE =
        state.fractions ? state.fractions->value : expert_fractions(t, r.ids, E, groups, at);
    add_loss(t, mb, "balance_loss", balance_loss(t, r.scores, fractions_GE, groups, at),
             balance.coefficient * mb.step_labels / mb.step_micro_batches);
  }
  if (balance.z_loss != 0)
    add_loss(t, mb, "z_loss", z_loss(t, logits_TE, at),
             balance.z_loss * mb.step_labels / mb.step_tokens);
  return r;
}

void update_router_state(const RouterState& state, const Balance& balance, const Tensor& counts) {
  std::vector<double> count = counts.to_vector<double>();
  const double total = std::accumulate(count.begin(), count.end(), 0.0);
  if (total == 0) return;
  if (state.bias) {
    std::vector<double> bias = state.bias->value.to_vector<double>();
    const double mean = total / double(count.size());
    double center = 0;
    for (size_t e = 0; e < bias.size(); ++e) {
      bias[e] += balance.bias_update_rate * double((mean > count[e]) - (mean < count[e]));
      center += bias[e] / double(bias.size());
    }
    for (double& b : bias) b -= center;
    state.bias->value.copy_from(Tensor::of<double>(state.bias->shape, bias));
  }
  if (state.fractions) {
    for (double& c : count) c /= total;
    state.fractions->value.copy_from(Tensor::of<double>(state.fractions->shape, count));
  }
}

}  // namespace pith
