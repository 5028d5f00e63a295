#include "ops/experts.h"

#include "ops/simd.h"

namespace pith {
using cpu::Acc;

// How many rows of a matrix of pairs carry data; the rest are zero. Without an order it is all of
// them.
static int64_t pairs_in_use(const ExpertOrder& order, const Tensor& rows) {
  return order.offsets ? order.offsets.data<int32_t>()[order.offsets.numel() - 1] : rows.dim(0);
}

// The order as order_by_expert makes it, and x a matrix of so many rows.
static void check_order(const Op& op, const ExpertOrder& order, const Tensor& x, int64_t rows) {
  op.require(order.pairs.rank() == 2 && order.slots.rank() == 1 &&
                 order.slots.dim(0) == order.pairs.numel(),
             "pairs must be [T, K] and slots [T K]");
  op.require(x.rank() == 2 && x.dim(0) == rows, "a matrix of {} rows is needed for these pairs",
             rows);
}

// y[pair] = x[row of the pair]; a row is read once and lands in its K places. Unused pairs become
// zero.
template <class T>
static void spread(const Tensor& x, const ExpertOrder& order, Tensor y, bool add) {
  const int64_t slots = order.pairs.dim(1), width = x.dim(1);
  const int32_t* pairs = order.pairs.data<int32_t>();
  const T* from = x.data<T>();
  T* to = y.data<T>();
  cpu::parallel_rows(order.pairs.numel(), width, [=](int64_t i) {
    if (pairs[i] >= 0)
      cpu::store(to + pairs[i] * width, add, width,
                 [in = from + i / slots * width](int64_t h) { return Acc<T>(in[h]); });
  });
  if (!add) y.row_range(pairs_in_use(order, y), y.dim(0)).fill_zero();
}

// x[row] = sum of y over the row's pairs, in slot order; one block of columns at a time stays in
// registers.
template <class T>
static void collect(const Tensor& y, const ExpertOrder& order, Tensor x, bool add) {
  constexpr int64_t kBlock = 64;
  const int64_t slots = order.pairs.dim(1), width = x.dim(1);
  const int32_t* pairs = order.pairs.data<int32_t>();
  const T* from = y.data<T>();
  T* to = x.data<T>();
  cpu::parallel_rows(x.dim(0), slots * width, [=](int64_t t) {
    for (int64_t begin = 0; begin < width; begin += kBlock) {
      const int64_t count = std::min(kBlock, width - begin);
      Acc<T> sum[kBlock] = {};
      for (int64_t j = 0; j < slots; ++j) {
        if (pairs[t * slots + j] < 0) continue;
        const T* in = from + pairs[t * slots + j] * width + begin;
        for (int64_t i = 0; i < count; ++i) sum[i] += Acc<T>(in[i]);
      }
      cpu::store(to + t * width + begin, add, count, [&](int64_t i) { return sum[i]; });
    }
  });
}

// gather: spread; else collect. Each is the other's backward.
static void move(Op& op, const Tensor& from, const ExpertOrder& order, Op::Into to, bool gather) {
  cpu::run(
      op, {.bytes = double(from.nbytes() + to.tensor.nbytes())}, from.dtype(),
      [&](auto z) {
        (gather ? spread<decltype(z)> : collect<decltype(z)>)(from, order, to.tensor, to.add);
      },
      [&](auto stream) {
        if (gather)
          cuda::spread_rows(from, order, to, stream);
        else
          cuda::collect_rows(from, order.pairs, to, stream);
      });
}

static Tensor move_rows(Tape& tape, const char* name, const Tensor& from, const ExpertOrder& order,
                        bool gather, Loc at) {
  Op op(tape, name, at, {{"from", from}, {"pairs", order.pairs}, {"slots", order.slots}});
  const int64_t rows = order.pairs.dim(0), pairs = order.slots.dim(0);
  check_order(op, order, from, gather ? rows : pairs);
  Tensor to = op.output(name, {gather ? pairs : rows, from.dim(1)}, from.dtype());
  move(op, from, order, {to}, gather);
  // The larger matrix, of pairs, can be gathered again, here or in the backward.
  const auto gather_again = [order](Op& op, const Tensor& from, const Tensor& to) {
    op.recompute(op.context().recompute.gather, true, to, [=](Op& op, const Tensor& to) {
      from.restore();
      move(op, from, order, {to}, true);
    });
  };
  if (gather) gather_again(op, from, to);
  op.backward([=, from = from.identity(), to = to.identity()](Op& op) {
    const Tensor d_to = op.grad(to);
    const Op::Into d = op.accumulate(from);
    if (!d) return;
    move(op, d_to, order, d, !gather);
    if (!gather && !d.add) gather_again(op, d_to, d.tensor);
  });
  return to;
}

// f(gate and up, weight, its slot) for every pair in use; without weights 1 and any slot.
template <class T, class F>
static void for_pairs(const Tensor& gate_up, const Tensor& weights, const ExpertOrder& order, F f) {
  using A = Acc<T>;
  const A* weight_of = weights ? weights.data<A>() : nullptr;
  const int32_t* slots = weights ? order.slots.data<int32_t>() : nullptr;
  cpu::parallel_rows(pairs_in_use(order, gate_up), gate_up.dim(1) / 2, [=](int64_t n) {
    f(n, weights ? weight_of[slots[n]] : A(1), weights ? slots[n] : 0);
  });
}

template <class T>
static void swiglu_forward(const Tensor& gate_up, const Tensor& weights, const ExpertOrder& order,
                           Tensor y) {
  using A = Acc<T>;
  const int64_t width = y.dim(1), used = pairs_in_use(order, y);
  const T* from = gate_up.data<T>();
  T* to = y.data<T>();
  for_pairs<T>(gate_up, weights, order, [=](int64_t n, A weight, int64_t) {
    const T *gate = from + n * 2 * width, *up = gate + width;
    cpu::store(to + n * width, false, width, [=](int64_t i) {
      return A(gate[i]) * cpu::sigmoid_of(A(gate[i])) * A(up[i]) * weight;
    });
  });
  y.row_range(used, y.dim(0)).fill_zero();
}

// With s = sigmoid(g): silu'(g) = s + g s (1 - s). dweights may be empty. kAdd is a template
// argument because the loop would not vectorize with a choice in it.
template <class T, bool kAdd>
static void swiglu_backward(const Tensor& gate_up, const Tensor& weights, const ExpertOrder& order,
                            const Tensor& dy, Tensor d, Tensor dweights) {
  using A = Acc<T>;
  const int64_t width = dy.dim(1), used = pairs_in_use(order, dy);
  A* dweight_of = dweights ? dweights.data<A>() : nullptr;
  const T *from = gate_up.data<T>(), *above = dy.data<T>();
  T* to = d.data<T>();
  for_pairs<T>(gate_up, weights, order, [=](int64_t n, A weight, int64_t slot) {
    const T *gate = from + n * 2 * width, *up = gate + width, *dout = above + n * width;
    T *dgate = to + n * 2 * width, *dup = dgate + width;
    const auto put = [](T& to, A value) { to = T(kAdd ? A(to) + value : value); };
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) {
      const A g = A(gate[i]), u = A(up[i]), s = cpu::sigmoid_of(g), silu = g * s, dz = A(dout[i]);
      sum += dz * silu * u;
      put(dgate[i], dz * weight * u * (s + silu * (A(1) - s)));
      put(dup[i], dz * weight * silu);
    }
    if (dweight_of) dweight_of[slot] += sum;
  });
  if (!kAdd) d.row_range(used, d.dim(0)).fill_zero();
}

void check_expert_ids(const Tensor& ids, int64_t experts) {
  const int32_t* p = ids.data<int32_t>();
  for (int64_t i = 0; i < ids.numel(); ++i)
    if (p[i] < -1 || p[i] >= experts)
      fail("expert id {} at [{}, {}] is outside [-1, {})", p[i], i / ids.cols(), i % ids.cols(),
           experts);
}

ExpertOrder order_by_expert(Tape& tape, const Tensor& ids, int64_t experts, Loc at) {
  Op op(tape, "order_by_expert", at, {{"ids", ids}});
  op.require(ids.rank() == 2 && ids.dtype() == DType::i32, "ids must be i32 [T, K]");
  op.require(experts >= 1, "{} experts", experts);
  op.require(ids.numel() < INT32_MAX, "{} pairs do not fit into int32", ids.numel());
  // Not op.output: integers have no gradient slot.
  ExpertOrder order{op.workspace("expert_offsets", {experts + 1}, DType::i32),
                    op.workspace("expert_slots", {ids.numel()}, DType::i32),
                    op.workspace("expert_pairs", ids.shape(), DType::i32)};
  const int64_t room = op.on_gpu() ? cuda::sort_workspace(ids.numel()) : 0;
  Tensor work = op.workspace("expert_sort", {room}, DType::i32);
  op.run(
      {.bytes = 4.0 * ids.nbytes()},
      [&] {
        check_expert_ids(ids, experts);
        const int32_t* id = ids.data<int32_t>();
        int32_t *offsets = order.offsets.data<int32_t>(), *slots = order.slots.data<int32_t>(),
                *pairs = order.pairs.data<int32_t>();
        std::vector<int32_t> next(size_t(experts) + 1, 0);
        for (int64_t i = 0; i < ids.numel(); ++i) ++next[size_t(int64_t(id[i]) + 1)];
        next[0] = 0;  // counted the ids of -1
        for (int64_t e = 0; e < experts; ++e) next[size_t(e + 1)] += next[size_t(e)];
        std::copy(next.begin(), next.end(), offsets);
        for (int64_t i = 0; i < ids.numel(); ++i) {
          pairs[i] = id[i] < 0 ? -1 : next[size_t(id[i])]++;
          if (id[i] >= 0) slots[pairs[i]] = int32_t(i);
        }
        std::fill(slots + offsets[experts], slots + ids.numel(), -1);
      },
      [&](auto stream) { cuda::order_by_expert(ids, unsigned(experts), order, work, stream); });
  return order;
}

Tensor gather_rows(Tape& tape, const Tensor& x, const ExpertOrder& order, Loc at) {
  return move_rows(tape, "gather_rows", x, order, true, at);
}

Tensor sum_rows(Tape& tape, const Tensor& y, const ExpertOrder& order, Loc at) {
  return move_rows(tape, "sum_rows", y, order, false, at);
}

Tensor swiglu(Tape& tape, const Tensor& gate_up, const Tensor& weights, const ExpertOrder& order,
              Loc at) {
  Op op(tape, "swiglu", at, {{"gate_up", gate_up}});
  const DType wide = master_dtype(gate_up.dtype());
  op.require(gate_up.rank() == 2 && gate_up.dim(1) % 2 == 0, "gate_up must be [N, 2 I]");
  if (order.slots) check_order(op, order, gate_up, order.slots.dim(0));
  op.require(!weights || (weights.shape() == order.pairs.shape() && weights.dtype() == wide),
             "weights must be {} like pairs, not {}", name_of(wide), weights.str());
  Tensor y = op.output("swiglu", {gate_up.dim(0), gate_up.dim(1) / 2}, gate_up.dtype());
  const auto forward = [=](Op& op, const Tensor& y) {
    cpu::run(
        op, {.bytes = 1.5 * gate_up.nbytes()}, y.dtype(),
        [&](auto z) { swiglu_forward<decltype(z)>(gate_up, weights, order, y); },
        [&](auto stream) { cuda::swiglu(gate_up, weights, order, y, stream); });
  };
  forward(op, y);
  op.recompute(op.context().recompute.swiglu, false, y, forward);
  op.backward([=, y = y.identity()](Op& op) {
    const Tensor dy = op.grad(y);
    const Op::Into into = op.accumulate(gate_up), dw = op.accumulate(weights);
    if (!into && !dw) return;
    // Where nobody wants the larger gradient the kernel still needs a place to write it.
    Tensor d = into ? into.tensor : op.workspace("swiglu_grad", gate_up.shape(), gate_up.dtype());
    op.run(
        {.bytes = 2.5 * gate_up.nbytes()},
        [&] {
          // Slots of nobody have no pair that would write them.
          if (dw && !dw.add) Tensor(dw.tensor).fill_zero();
          by_float(y.dtype(), [&](auto z) {
            using T = decltype(z);
            const auto kernel = into.add ? swiglu_backward<T, true> : swiglu_backward<T, false>;
            kernel(gate_up, weights, order, dy, d, dw.tensor);
          });
        },
        [&](auto stream) {
          cuda::swiglu_backward(gate_up, weights, order, dy, {d, into.add}, dw, stream);
        });
  });
  return y;
}

}  // namespace pith
