#include "ops/router.h"

#include "ops/experts.h"
#include "ops/simd.h"

namespace pith {
using cpu::Acc;
using Score = RouterRule::Score;

// out = softmax(x); returns logsumexp(x). A NaN anywhere makes everything NaN.
template <class A> static A softmax_row(const A* x, A* out, int64_t n) {
  A high = x[0];
  const A sum = cpu::exp_row(x, out, n, high);
  const A inverse = A(1) / sum;
  for (int64_t i = 0; i < n; ++i) out[i] *= inverse;
  return high + std::log(sum);
}

// The ids of the rule.top_k best experts, best first; of equals the lower id wins.
template <class A>
static void choose(const RouterRule& rule, const A* logits, const A* scores, const A* bias,
                   int64_t experts, int32_t* ids) {
  // Logits tell apart what softmax rounds to one score; biases are about scores.
  const A* key = rule.score == Score::softmax_after_top_k && !bias ? logits : scores;
  const auto better = [=](int64_t a, int64_t b) {
    const auto value = [=](int64_t e) { return bias ? key[e] + bias[e] : key[e]; };
    // NaN is not ordered; as the best choice it reaches the weights, where it will be noticed.
    const A x = value(a), y = value(b);
    return (std::isnan(x) ? A(HUGE_VAL) : x) > (std::isnan(y) ? A(HUGE_VAL) : y);
  };
  for (int64_t e = 0, count = 0; e < experts; ++e) {
    if (count == rule.top_k && !better(e, ids[count - 1])) continue;
    int64_t j = count < rule.top_k ? count++ : count - 1;
    for (; j > 0 && better(e, ids[j - 1]); --j) ids[j] = ids[j - 1];
    ids[j] = int32_t(e);
  }
}

// A softmax over the chosen logits is the softmax over all, renormalized.
static bool is_normalized(const RouterRule& rule) {
  return rule.renormalize || rule.score == Score::softmax_after_top_k;
}

// Weight of a chosen expert per unit of its score. 1 / 0 is avoided where nobody is chosen or every
// chosen score underflowed to 0.
template <class A> static A factor(const RouterRule& rule, const A* scores, const int32_t* ids) {
  if (!is_normalized(rule)) return A(rule.scaling);
  A sum = 0;
  for (int64_t j = 0; j < rule.top_k; ++j) sum += ids[j] < 0 ? A(0) : scores[ids[j]];
  return A(rule.scaling) / (sum == 0 ? A(1) : sum);
}

static void require_wide(const Op& op, const char* name, const Tensor& t) {
  op.require(t.rank() == 2 && t.dim(1) >= 1 && t.dtype() <= DType::f32,
             "{} must be fp32 or fp64 [T, E]", name);
}

template <class A>
static void route_forward(const Tensor& logits, const RouterRule& rule, const Tensor& bias,
                          bool replay, Routing out) {
  const int64_t experts = logits.dim(1), k = rule.top_k;
  cpu::parallel_rows(logits.dim(0), experts, [&](int64_t t) {
    const A* row = logits.data<A>() + t * experts;
    A *scores = out.scores.data<A>() + t * experts, *weights = out.weights.data<A>() + t * k;
    int32_t* ids = out.ids.data<int32_t>() + t * k;
    if (rule.score == Score::sigmoid)
      std::transform(row, row + experts, scores, cpu::sigmoid_of<A>);
    else
      softmax_row(row, scores, experts);
    if (!replay) choose(rule, row, scores, bias ? bias.data<A>() : nullptr, experts, ids);
    const A f = factor(rule, scores, ids);
    for (int64_t j = 0; j < k; ++j) weights[j] = ids[j] < 0 ? A(0) : scores[ids[j]] * f;
  });
}

// Normalized, w = scaling s / sum(s) and ds_j = scaling / sum(s) (dw_j - mean), where the mean is
// sum_i dw_i w_i / scaling.
template <class A>
static void route_backward(const RouterRule& rule, const Routing& out, const Tensor& dweights,
                           const Tensor& dscores, Op::Into& into) {
  const int64_t experts = into.tensor.dim(1), k = rule.top_k;
  cpu::parallel_rows(into.tensor.dim(0), experts, [&](int64_t t) {
    const int32_t* ids = out.ids.data<int32_t>() + t * k;
    const A *scores = out.scores.data<A>() + t * experts, *dw = dweights.data<A>() + t * k,
            *weights = out.weights.data<A>() + t * k, *ds = dscores.data<A>() + t * experts;
    const A f = factor(rule, scores, ids);
    const A mean = is_normalized(rule) ? cpu::dot(dw, weights, k) / A(rule.scaling) : A(0);
    std::vector<A> d(ds, ds + experts);
    for (int64_t j = 0; j < k; ++j)
      if (ids[j] >= 0) d[ids[j]] += f * (dw[j] - mean);
    if (rule.score == Score::sigmoid) {
      for (int64_t e = 0; e < experts; ++e) d[e] *= scores[e] * (A(1) - scores[e]);
    } else {
      const A through = cpu::dot(d.data(), scores, experts);
      for (int64_t e = 0; e < experts; ++e) d[e] = scores[e] * (d[e] - through);
    }
    cpu::store(into.tensor.data<A>() + t * experts, into.add, experts,
               [&](int64_t e) { return d[e]; });
  });
}

// counts[groups, E] = how often the ids of each group of rows chose each expert, / unit; with `add`,
// where the unit is 1, added to what is there.
static void count_ids(Op& op, const Tensor& ids, int64_t groups, int64_t unit, Tensor& counts,
                      bool add) {
  op.run(
      {.bytes = double(ids.nbytes())},
      [&] {
        const int64_t per_group = ids.numel() / groups, experts = counts.numel() / groups;
        check_expert_ids(ids, experts);
        if (!add) counts.fill_zero();
        const int32_t* id = ids.data<int32_t>();
        by_float(counts.dtype(), [&](auto z) {
          using A = Acc<decltype(z)>;
          A* to = counts.data<A>();
          for (int64_t i = 0; i < ids.numel(); ++i)
            if (id[i] >= 0) to[i / per_group * experts + id[i]] += 1;
          for (int64_t i = 0; i < groups * experts; ++i) to[i] /= A(unit);
        });
      },
      [&](auto stream) { cuda::count_ids(ids, groups, 1.0 / double(unit), counts, add, stream); });
}

// A loss that is a sum over the rows of x [T, E]: row(t, x_t, d_t) returns a row's term and writes
// its gradient. The terms are added in fp64 in the order of tokens, so the sum does not depend on
// the number of threads.
// on_gpu(terms, slopes, stream) does the same for all rows.
template <class F, class G>
static Tensor sum_over_tokens(Op& op, const char* name, const Tensor& x, F row, G on_gpu) {
  Tensor loss = op.output(name, {1}, x.dtype());
  Tensor terms = op.workspace("loss_terms", {x.dim(0)}, x.dtype());
  Tensor slope = op.workspace("loss_slope", x.shape(), x.dtype());
  cpu::run(
      op, {.bytes = 2.0 * x.nbytes()}, x.dtype(),
      [&](auto z) {
        using A = Acc<decltype(z)>;
        const int64_t experts = x.dim(1);
        A* term = terms.data<A>();
        cpu::parallel_rows(x.dim(0), experts, [&](int64_t t) {
          term[t] = row(t, x.data<A>() + t * experts, slope.data<A>() + t * experts);
        });
        loss.data<A>()[0] = A(std::accumulate(term, term + x.dim(0), 0.0));
      },
      [&](auto stream) {
        on_gpu(terms, slope, stream);
        cuda::sum_terms(terms, loss, stream);
      });
  op.backward([=, x = x.identity(), loss = loss.identity()](Op& op) {
    const Tensor dloss = op.grad(loss);
    if (auto d = op.accumulate(x))
      cpu::run(
          op, {.bytes = 2.0 * x.nbytes()}, x.dtype(),
          [&](auto z) {
            using A = Acc<decltype(z)>;
            const A seed = dloss.data<A>()[0], *from = slope.data<A>();
            cpu::store(d.tensor.data<A>(), d.add, x.numel(),
                       [=](int64_t i) { return seed * from[i]; });
          },
          [&](auto stream) { cuda::scale_by(slope, dloss, d, stream); });
  });
  return loss;
}

Routing route_top_k(Tape& tape, const Tensor& logits, const RouterRule& rule, const Tensor& bias,
                    const Tensor& replay, Loc at) {
  Op op(tape, "route_top_k", at, {{"logits", logits}});
  require_wide(op, "logits", logits);
  op.require(rule.top_k >= 1 && rule.top_k <= logits.dim(1), "top_k is {}, {} experts are eligible",
             rule.top_k, logits.dim(1));
  op.require(rule.scaling > 0 && std::isfinite(rule.scaling), "scaling is {}, it must be positive",
             rule.scaling);
  const Shape chosen{logits.dim(0), rule.top_k};
  op.require(!bias || (bias.numel() == logits.dim(1) && bias.dtype() == logits.dtype()),
             "bias is {}, one {} per expert is needed", bias.str(), name_of(logits.dtype()));
  op.require(!replay || (replay.shape() == chosen && replay.dtype() == DType::i32),
             "replay is {}, int32{} is needed", replay.str(), chosen.str());
  Routing out{op.workspace("expert_ids", chosen, DType::i32),
              op.output("router_weights", chosen, logits.dtype()),
              op.output("router_scores", logits.shape(), logits.dtype())};
  op.run(
      {.bytes = 2.0 * logits.nbytes()},
      [&] {
        if (replay) {
          check_expert_ids(replay, logits.dim(1));
          out.ids.copy_from(replay);
        }
        by_float(logits.dtype(), [&](auto z) {
          route_forward<Acc<decltype(z)>>(logits, rule, bias, bool(replay), out);
        });
      },
      [&](auto stream) {
        if (replay) Tensor(out.ids).copy_from(replay);
        cuda::route_top_k(logits, rule, bias, !replay, out, stream);
      });
  op.backward([=, logits = logits.identity()](Op& op) {
    const Tensor dw = op.grad(out.weights), ds = op.grad(out.scores);
    if (auto d = op.accumulate(logits))
      cpu::run(
          op, {.bytes = 3.0 * logits.nbytes()}, logits.dtype(),
          [&](auto z) { route_backward<Acc<decltype(z)>>(rule, out, dw, ds, d); },
          [&](auto stream) { cuda::route_top_k_backward(rule, out, dw, ds, d, stream); });
  });
  return out;
}

Tensor balanced_ids(Tape& tape, int64_t tokens, int64_t top_k, int64_t experts, Loc at) {
  Op op(tape, "balanced_ids", at, {});
  op.require(top_k >= 1 && top_k <= experts, "top_k is {} of {} experts", top_k, experts);
  Tensor ids = op.workspace("expert_ids", {tokens, top_k}, DType::i32);
  op.run(
      {.bytes = double(ids.nbytes())},
      [&] {
        int32_t* p = ids.data<int32_t>();
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t j = 0; j < top_k; ++j) *p++ = int32_t((t + j * (experts / top_k)) % experts);
      },
      [&](auto stream) { cuda::balanced_ids(ids, experts, stream); });
  return ids;
}

void count_experts(Tape& tape, const Tensor& ids, Tensor& counts, Loc at) {
  Op op(tape, "count_experts", at, {{"ids", ids}, {"counts", counts}});
  op.require(counts.dtype() <= DType::f32, "counts must be fp32 or fp64");
  count_ids(op, ids, 1, 1, counts, true);
}

Tensor expert_fractions(Tape& tape, const Tensor& ids, int64_t experts, int64_t groups, Loc at) {
  Op op(tape, "expert_fractions", at, {{"ids", ids}});
  op.require(ids.rank() == 2 && groups >= 1 && ids.dim(0) % groups == 0 && ids.numel() > 0,
             "ids must be [T, K] with T a positive multiple of {} groups", groups);
  Tensor fractions =
      op.workspace("expert_fractions", {groups, experts}, master_dtype(op.context().dtype));
  count_ids(op, ids, groups, ids.numel() / groups, fractions, false);
  return fractions;
}

Tensor balance_loss(Tape& tape, const Tensor& scores, const Tensor& fractions, int64_t groups,
                    Loc at) {
  Op op(tape, "balance_loss", at, {{"scores", scores}, {"fractions", fractions}});
  require_wide(op, "scores", scores);
  op.require(groups >= 1 && scores.dim(0) % groups == 0,
             "{} tokens are not a multiple of {} groups", scores.dim(0), groups);
  op.require(fractions.rank() == 2 && (fractions.dim(0) == groups || fractions.dim(0) == 1) &&
                 fractions.dim(1) == scores.dim(1) && fractions.dtype() == scores.dtype(),
             "fractions must be {} [{} or 1, E]", name_of(scores.dtype()), groups);
  const int64_t experts = scores.dim(1), per_row = scores.dim(0) / fractions.dim(0);
  const double scale = double(experts) / double(scores.dim(0));
  // With S = sum_i s_i: the term is q = sum_i f_i s_i / S, and dq/ds_i = (f_i - q) / S.
  return sum_over_tokens(
      op, "balance_loss", scores,
      [=](int64_t t, const auto* s, auto* d) {
        using A = std::remove_reference_t<decltype(*d)>;
        const A* f = fractions.data<A>() + t / per_row * experts;
        const A inverse = A(1) / std::accumulate(s, s + experts, A(0));
        const A q = cpu::dot(f, s, experts) * inverse;
        for (int64_t e = 0; e < experts; ++e) d[e] = A(scale) * inverse * (f[e] - q);
        return A(scale) * q;
      },
      [&](const Tensor& terms, const Tensor& slopes, auto stream) {
        cuda::balance_terms(scores, fractions, groups, terms, slopes, stream);
      });
}

Tensor z_loss(Tape& tape, const Tensor& logits, Loc at) {
  Op op(tape, "z_loss", at, {{"logits", logits}});
  require_wide(op, "logits", logits);
  const int64_t experts = logits.dim(1);
  return sum_over_tokens(
      op, "z_loss", logits,
      [=](int64_t, const auto* x, auto* d) {
        const auto lse = softmax_row(x, d, experts);
        for (int64_t e = 0; e < experts; ++e) d[e] *= 2 * lse;
        return lse * lse;
      },
      [&](const Tensor& terms, const Tensor& slopes, auto stream) {
        cuda::z_terms(logits, terms, slopes, stream);
      });
}

}  // namespace pith
