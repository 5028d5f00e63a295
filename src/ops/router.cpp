#include "ops/router.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "ops/experts.h"
#include "ops/simd.h"

namespace pith {
namespace {

using Score = RouterRule::Score;

constexpr int64_t kParallel = 1 << 14;  // logits below which threads cost more than they save

// Calls f with a value of the type of a wide tensor: double or float.
template <class F> void by_wide(const Tensor& t, F&& f) {
  if (t.dtype() == DType::f64) {
    f(double{});
  } else {
    f(float{});
  }
}

bool is_wide(const Tensor& t) { return t.dtype() == DType::f64 || t.dtype() == DType::f32; }

// out = softmax(x); returns logsumexp(x). A NaN anywhere makes everything NaN.
template <class A> A softmax_row(const A* x, A* out, int64_t n) {
  A high = x[0], sum = 0;
#pragma omp simd reduction(max : high)
  for (int64_t i = 0; i < n; ++i) high = x[i] > high ? x[i] : high;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    out[i] = cpu::fast_exp(x[i] - high);
    sum += out[i];
  }
  const A inverse = A(1) / sum;
  for (int64_t i = 0; i < n; ++i) out[i] *= inverse;
  return high + std::log(sum);
}

template <class A> void add_to(A& to, A value, bool add) { to = add ? to + value : value; }

template <class A> A dot(const A* a, const A* b, int64_t n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// The k largest keys offered, best first. Of equal keys the one offered first wins.
template <class A> struct Best {
  const A* key;
  int32_t* ids;
  int64_t k, count = 0;

  void offer(int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      if (count == k && !(key[e] > key[ids[k - 1]])) continue;
      int64_t j = count < k ? count++ : k - 1;
      for (; j > 0 && key[e] > key[ids[j - 1]]; --j) ids[j] = ids[j - 1];
      ids[j] = int32_t(e);
    }
  }
};

// The rule applied to one token at a time; one of these per thread, for its scratch memory.
template <class A> struct Router {
  const RouterRule& rule;
  bool normalized;
  int64_t experts;
  const A* bias;
  std::vector<A> key, group_key;
  std::vector<int32_t> group_ids;

  Router(const RouterRule& rule, int64_t experts, const A* bias)
      : rule(rule),
        normalized(rule.renormalize || rule.score == Score::softmax_after_top_k),
        experts(experts),
        bias(bias),
        key(size_t(experts)),
        group_key(size_t(rule.groups)),
        group_ids(size_t(std::max(rule.groups_kept, rule.group_score_top))) {}

  void score(const A* logits, A* scores) const {
    if (rule.score != Score::sigmoid) {
      softmax_row(logits, scores, experts);
    } else {
      for (int64_t e = 0; e < experts; ++e) scores[e] = cpu::sigmoid_of(logits[e]);
    }
  }

  void choose(const A* logits, const A* scores, int32_t* ids) {
    // Logits tell apart what softmax rounds to one score; groups and biases are about scores.
    const bool by_logit = rule.score == Score::softmax_after_top_k && !bias && rule.groups == 1;
    const A* from = by_logit ? logits : scores;
    for (int64_t e = 0; e < experts; ++e) {
      const A v = bias ? from[e] + bias[e] : from[e];
      // NaN is not ordered; as the best choice it reaches the weights, where it will be noticed.
      key[size_t(e)] = v == v ? v : std::numeric_limits<A>::infinity();
    }
    Best<A> best{key.data(), ids, rule.top_k};
    if (rule.groups == 1) return best.offer(0, experts);
    const int64_t size = experts / rule.groups;
    for (int64_t g = 0; g < rule.groups; ++g) {
      Best<A> top{key.data(), group_ids.data(), rule.group_score_top};
      top.offer(g * size, (g + 1) * size);
      group_key[size_t(g)] = 0;
      for (int64_t j = 0; j < top.k; ++j) group_key[size_t(g)] += key[size_t(group_ids[size_t(j)])];
    }
    Best<A> kept{group_key.data(), group_ids.data(), rule.groups_kept};
    kept.offer(0, rule.groups);
    std::sort(group_ids.begin(), group_ids.begin() + kept.k);
    for (int64_t j = 0; j < kept.k; ++j) {
      const int64_t g = group_ids[size_t(j)];
      best.offer(g * size, (g + 1) * size);
    }
  }

  // Weight of a chosen expert per unit of its score. A softmax over the chosen logits is the
  // softmax over all, renormalized. 1 / 0 is avoided where nobody is chosen or every chosen score
  // underflowed to 0.
  A factor(const A* scores, const int32_t* ids) const {
    if (!normalized) return A(rule.scaling);
    A sum = 0;
    for (int64_t j = 0; j < rule.top_k; ++j) sum += ids[j] < 0 ? A(0) : scores[ids[j]];
    return A(rule.scaling) / (sum == 0 ? A(1) : sum);
  }

  void weigh(const A* scores, const int32_t* ids, A* weights) const {
    const A f = factor(scores, ids);
    for (int64_t j = 0; j < rule.top_k; ++j) weights[j] = ids[j] < 0 ? A(0) : scores[ids[j]] * f;
  }

  // d[E] = gradient of the logits, from the gradients of weights[K] and scores[E].
  void backward(const int32_t* ids, const A* weights, const A* scores, const A* dweights,
                const A* dscores, A* d) const {
    // Normalized, w = scaling s / sum(s) and ds_j = scaling / sum(s) (dw_j - mean), where the mean
    // is sum_i dw_i w_i / scaling.
    const A f = factor(scores, ids);
    const A mean = normalized ? dot(dweights, weights, rule.top_k) / A(rule.scaling) : A(0);
    std::copy(dscores, dscores + experts, d);
    for (int64_t j = 0; j < rule.top_k; ++j)
      if (ids[j] >= 0) d[ids[j]] += f * (dweights[j] - mean);
    if (rule.score == Score::sigmoid) {
      for (int64_t e = 0; e < experts; ++e) d[e] *= scores[e] * (A(1) - scores[e]);
    } else {
      const A through = dot(d, scores, experts);
      for (int64_t e = 0; e < experts; ++e) d[e] = scores[e] * (d[e] - through);
    }
  }
};

void check_rule(const Op& op, const RouterRule& r, int64_t experts) {
  op.require(r.groups >= 1 && experts % r.groups == 0, "{} groups do not divide {} experts",
             r.groups, experts);
  op.require(r.groups_kept >= 1 && r.groups_kept <= r.groups, "{} of {} groups kept", r.groups_kept,
             r.groups);
  op.require(r.group_score_top >= 1 && r.group_score_top <= experts / r.groups,
             "a group of {} experts cannot be scored by its best {}", experts / r.groups,
             r.group_score_top);
  op.require(r.top_k >= 1 && r.top_k <= experts / r.groups * r.groups_kept,
             "top_k is {}, {} experts are eligible", r.top_k, experts / r.groups * r.groups_kept);
  op.require(r.scaling > 0 && std::isfinite(r.scaling), "scaling is {}, it must be positive",
             r.scaling);
}

template <class A>
void route_forward(const Tensor& logits, const RouterRule& rule, const Tensor& bias, Routing out,
                   bool replayed) {
  const int64_t tokens = logits.dim(0), experts = logits.dim(1), k = rule.top_k;
  const A* x = logits.data<A>();
  int32_t* ids = out.ids.data<int32_t>();
  A *weights = out.weights.data<A>(), *scores = out.scores.data<A>();
#pragma omp parallel if (logits.numel() > kParallel)
  {
    Router<A> router(rule, experts, bias ? bias.data<A>() : nullptr);
#pragma omp for
    for (int64_t t = 0; t < tokens; ++t) {
      const A* row = x + t * experts;
      router.score(row, scores + t * experts);
      if (!replayed) router.choose(row, scores + t * experts, ids + t * k);
      router.weigh(scores + t * experts, ids + t * k, weights + t * k);
    }
  }
}

template <class A>
void route_backward(const RouterRule& rule, const Routing& out, const Tensor& dweights,
                    const Tensor& dscores, Op::Into& d) {
  const int64_t tokens = d.tensor.dim(0), experts = d.tensor.dim(1), k = rule.top_k;
  const int32_t* ids = out.ids.data<int32_t>();
  const A *weights = out.weights.data<A>(), *scores = out.scores.data<A>(),
          *dw = dweights.data<A>(), *ds = dscores.data<A>();
  A* to = d.tensor.data<A>();
#pragma omp parallel if (d.tensor.numel() > kParallel)
  {
    const Router<A> router(rule, experts, nullptr);
    std::vector<A> row(static_cast<size_t>(experts));
#pragma omp for
    for (int64_t t = 0; t < tokens; ++t) {
      router.backward(ids + t * k, weights + t * k, scores + t * experts, dw + t * k,
                      ds + t * experts, row.data());
      for (int64_t e = 0; e < experts; ++e) add_to(to[t * experts + e], row[size_t(e)], d.add);
    }
  }
}

template <class A> void count_ids(const int32_t* ids, int64_t n, A* counts) {
  for (int64_t i = 0; i < n; ++i)
    if (ids[i] >= 0) counts[ids[i]] += 1;
}

// A loss that is a sum over the rows of x [T, E]: row(t, x_t, d_t) returns a row's term and writes
// its gradient. The terms are added in fp64 in the order of tokens, so the sum does not depend on
// the number of threads.
template <class F> Tensor sum_over_tokens(Op& op, const char* name, const Tensor& x, F row) {
  Tensor loss = op.output(name, {1}, x.dtype());
  Tensor terms = op.workspace("loss_terms", {x.dim(0)}, x.dtype());
  Tensor slope = op.workspace("loss_slope", x.shape(), x.dtype());
  op.run({.bytes = 2.0 * x.nbytes()}, [&] {
    by_wide(x, [&](auto z) {
      using A = decltype(z);
      const int64_t tokens = x.dim(0), experts = x.dim(1);
      const A* in = x.data<A>();
      A *term = terms.data<A>(), *d = slope.data<A>();
#pragma omp parallel for if (x.numel() > kParallel)
      for (int64_t t = 0; t < tokens; ++t) term[t] = row(t, in + t * experts, d + t * experts);
      loss.data<A>()[0] = A(std::accumulate(term, term + tokens, 0.0));
    });
  });
  op.backward([=](Op& op) {
    const Tensor dloss = op.grad(loss);
    if (auto d = op.accumulate(x))
      op.run({.bytes = 2.0 * x.nbytes()}, [&] {
        by_wide(x, [&](auto z) {
          using A = decltype(z);
          const A seed = dloss.data<A>()[0], *from = slope.data<A>();
          A* to = d.tensor.data<A>();
          for (int64_t i = 0; i < x.numel(); ++i) add_to(to[i], seed * from[i], d.add);
        });
      });
  });
  return loss;
}

}  // namespace

Routing route_top_k(Tape& tape, const Tensor& logits, const RouterRule& rule, const Tensor& bias,
                    const Tensor& replay, Loc at) {
  Op op(tape, "route_top_k", at, {{"logits", logits}});
  op.require(logits.rank() == 2 && logits.dim(1) >= 1 && is_wide(logits),
             "logits must be fp32 or fp64 [T, E]");
  check_rule(op, rule, logits.dim(1));
  const Shape chosen{logits.dim(0), rule.top_k};
  op.require(!bias || (bias.numel() == logits.dim(1) && bias.dtype() == logits.dtype()),
             "bias is {}, one {} per expert is needed", bias.str(), name_of(logits.dtype()));
  op.require(!replay || (replay.shape() == chosen && replay.dtype() == DType::i32),
             "replay is {}, int32{} is needed", replay.str(), chosen.str());
  Routing out{op.workspace("expert_ids", chosen, DType::i32),
              op.output("router_weights", chosen, logits.dtype()),
              op.output("router_scores", logits.shape(), logits.dtype())};
  op.run({.bytes = 2.0 * logits.nbytes()}, [&] {
    if (replay) {
      check_expert_ids(replay, logits.dim(1));
      out.ids.copy_from(replay);
    }
    by_wide(logits,
            [&](auto z) { route_forward<decltype(z)>(logits, rule, bias, out, bool(replay)); });
  });
  op.backward([=](Op& op) {
    const Tensor dweights = op.grad(out.weights), dscores = op.grad(out.scores);
    if (auto d = op.accumulate(logits))
      op.run({.bytes = 3.0 * logits.nbytes()}, [&] {
        by_wide(logits,
                [&](auto z) { route_backward<decltype(z)>(rule, out, dweights, dscores, d); });
      });
  });
  return out;
}

Tensor balanced_ids(Tape& tape, int64_t tokens, int64_t top_k, int64_t experts, Loc at) {
  Op op(tape, "balanced_ids", at, {});
  op.require(top_k >= 1 && top_k <= experts, "top_k is {} of {} experts", top_k, experts);
  Tensor ids = op.workspace("expert_ids", {tokens, top_k}, DType::i32);
  op.run({.bytes = double(ids.nbytes())}, [&] {
    int32_t* p = ids.data<int32_t>();
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t j = 0; j < top_k; ++j) *p++ = int32_t((t + j * (experts / top_k)) % experts);
  });
  return ids;
}

void count_experts(Tape& tape, const Tensor& ids, Tensor& counts, Loc at) {
  Op op(tape, "count_experts", at, {{"ids", ids}, {"counts", counts}});
  op.require(is_wide(counts), "counts must be fp32 or fp64");
  op.run({.bytes = double(ids.nbytes())}, [&] {
    check_expert_ids(ids, counts.numel());
    by_wide(counts, [&](auto z) {
      count_ids(ids.data<int32_t>(), ids.numel(), counts.data<decltype(z)>());
    });
  });
}

Tensor expert_fractions(Tape& tape, const Tensor& ids, int64_t experts, int64_t groups, Loc at) {
  Op op(tape, "expert_fractions", at, {{"ids", ids}});
  op.require(ids.rank() == 2 && groups >= 1 && ids.dim(0) % groups == 0 && ids.numel() > 0,
             "ids must be [T, K] with T a positive multiple of {} groups", groups);
  Tensor fractions =
      op.workspace("expert_fractions", {groups, experts}, master_dtype(op.context().dtype));
  op.run({.bytes = double(ids.nbytes())}, [&] {
    check_expert_ids(ids, experts);
    fractions.fill_zero();
    by_wide(fractions, [&](auto z) {
      using A = decltype(z);
      const int64_t per_group = ids.numel() / groups;
      A* to = fractions.data<A>();
      for (int64_t g = 0; g < groups; ++g)
        count_ids(ids.data<int32_t>() + g * per_group, per_group, to + g * experts);
      for (int64_t i = 0; i < fractions.numel(); ++i) to[i] /= A(per_group);
    });
  });
  return fractions;
}

Tensor balance_loss(Tape& tape, const Tensor& scores, const Tensor& fractions, int64_t groups,
                    Loc at) {
  Op op(tape, "balance_loss", at, {{"scores", scores}, {"fractions", fractions}});
  op.require(scores.rank() == 2 && scores.numel() > 0 && is_wide(scores),
             "scores must be fp32 or fp64 [T, E]");
  op.require(groups >= 1 && scores.dim(0) % groups == 0,
             "{} tokens are not a multiple of {} groups", scores.dim(0), groups);
  op.require(fractions.rank() == 2 && (fractions.dim(0) == groups || fractions.dim(0) == 1) &&
                 fractions.dim(1) == scores.dim(1) && fractions.dtype() == scores.dtype(),
             "fractions must be {} [{} or 1, E]", name_of(scores.dtype()), groups);
  const int64_t tokens = scores.dim(0), experts = scores.dim(1),
                per_row = tokens / fractions.dim(0);
  const double scale = double(experts) / double(tokens);
  // With S = sum_i s_i: the term is q = sum_i f_i s_i / S, and dq/ds_i = (f_i - q) / S.
  return sum_over_tokens(op, "balance_loss", scores, [=](int64_t t, const auto* s, auto* d) {
    using A = std::remove_reference_t<decltype(*d)>;
    const A* f = fractions.data<A>() + t / per_row * experts;
    const A inverse = A(1) / std::accumulate(s, s + experts, A(0)),
            q = dot(f, s, experts) * inverse;
    for (int64_t e = 0; e < experts; ++e) d[e] = A(scale) * inverse * (f[e] - q);
    return A(scale) * q;
  });
}

Tensor z_loss(Tape& tape, const Tensor& logits, Loc at) {
  Op op(tape, "z_loss", at, {{"logits", logits}});
  op.require(logits.rank() == 2 && logits.dim(1) >= 1 && is_wide(logits),
             "logits must be fp32 or fp64 [T, E]");
  const int64_t experts = logits.dim(1);
  return sum_over_tokens(op, "z_loss", logits, [=](int64_t, const auto* x, auto* d) {
    const auto lse = softmax_row(x, d, experts);
    for (int64_t e = 0; e < experts; ++e) d[e] *= 2 * lse;
    return lse * lse;
  });
}

}  // namespace pith
