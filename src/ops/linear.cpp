#include "ops/linear.h"

#include "ops/gemm.h"
#include "ops/simd.h"

namespace pith {
namespace {

// Rows of a task of a grouped product: long enough for the GEMM's full speed on one thread, short
// enough that one expert with most of the rows is shared by all.
constexpr int64_t kBlockRows = 256;

struct Rows {
  int64_t group, begin, end;
  int64_t count() const { return end - begin; }
};

// The rows of each group; what lies behind the last is the unused tail. All rows are one group
// without offsets.
std::vector<Rows> groups_of(const Tensor& x, const Tensor& offsets) {
  if (!offsets) return {{0, 0, x.dim(0)}};
  const int32_t* at = offsets.data<int32_t>();
  std::vector<Rows> groups;
  for (int64_t e = 0; e + 1 < offsets.dim(0); ++e) groups.push_back({e, at[e], at[e + 1]});
  return groups;
}

double flops_of(const Tensor& x, const Tensor& y) {
  return 2.0 * double(x.numel()) * double(y.dim(1));
}

std::byte* address(Tensor t, int64_t element) {
  return static_cast<std::byte*>(t.raw()) + element * int64_t(size_of(t.dtype()));
}

// y = x w^T, or x w: every group's rows times its matrix of w [N, K] or [E, N, K]. The tail is
// zeroed.
void multiply(const Tensor& x, const Tensor& w, bool trans_w, const Tensor& offsets, Tensor y) {
  const int64_t k = x.dim(1), n = y.dim(1);
  const std::vector<Rows> groups = groups_of(x, offsets);
  std::vector<Rows> blocks;
  for (const Rows& g : groups) {
    const int64_t step = groups.size() == 1 ? std::max<int64_t>(g.end, 1) : kBlockRows;
    for (int64_t b = g.begin; b < g.end; b += step)
      blocks.push_back({g.group, b, std::min(g.end, b + step)});
  }
  cpu::parallel_tasks(blocks.size(), [&](int64_t i) {
    const Rows& r = blocks[i];
    cpu::gemm(false, trans_w, r.count(), n, k, address(x, r.begin * k), address(w, r.group * n * k),
              x.dtype(), address(y, r.begin * n), y.dtype(), false);
  });
  if (const int64_t used = groups.back().end; used < y.dim(0))
    y.row_range(used, y.dim(0)).fill_zero();
}

// The same; y += with add, but not for grouped rows.
void multiply_on_gpu(const Tensor& x, const Tensor& w, bool trans_w, const Tensor& offsets,
                     Tensor y, bool add, auto stream) {
  if (offsets)
    cuda::grouped_multiply(x, w, trans_w, offsets, y, stream);
  else
    cuda::gemm(false, trans_w, x.dim(0), y.dim(1), x.dim(1), x.raw(), w.raw(), x.dtype(), y.raw(),
               y.dtype(), add, stream);
}

// dw (+)= dy^T x for every group. A group with more than a thread's share of the rows has all
// threads for itself; the others run one thread each, largest first.
void weight_gradient(const Tensor& x, const Tensor& dy, const Tensor& offsets, Op::Into dw) {
  const int64_t k = x.dim(1), n = dy.dim(1);
  std::vector<Rows> groups = groups_of(x, offsets);
  const int64_t share = groups.back().end / omp_get_max_threads();
  std::stable_sort(groups.begin(), groups.end(),
                   [](const Rows& a, const Rows& b) { return a.count() > b.count(); });
  const auto product = [&](const Rows& r) {
    cpu::gemm(true, false, n, k, r.count(), address(dy, r.begin * n), address(x, r.begin * k),
              x.dtype(), address(dw.tensor, r.group * n * k), dw.tensor.dtype(), dw.add);
  };
  size_t alone = 0;
  while (alone < groups.size() && groups[alone].count() > share) product(groups[alone++]);
  cpu::parallel_tasks(groups.size() - alone, [&](int64_t i) { product(groups[alone + i]); });
}

// The records of one parameter, in order: on the GPU grouped ones are one product.
void run_records(Context& context, std::span<WgradRecord* const> records) {
  const WgradRecord& first = *records[0];
  Tape tape(context, false);
  Op op(tape, "linear wgrad", first.at, {{"x", first.x}, {"dy", first.dy}});
  const auto dw = op.accumulate(*first.param);
  Cost cost{.bytes = (dw.add ? 2.0 : 1.0) * dw.tensor.nbytes()};
  for (const WgradRecord* r : records) {
    r->x.restore();
    r->dy.restore();
    const int64_t groups = r->offsets ? r->offsets.dim(0) - 1 : 1;
    op.require(
        r->x.dim(0) == r->dy.dim(0) && dw.tensor.numel() == groups * r->dy.dim(1) * r->x.dim(1),
        "the record does not fit the gradient {} of {}", dw.tensor.str(), r->param->name);
    cost.flops += flops_of(r->x, r->dy);
    cost.bytes += double(r->x.nbytes() + r->dy.nbytes());
  }
  const auto add = [&](size_t i) { return dw.add || i > 0; };
  op.run(
      cost,
      [&] {
        for (size_t i = 0; i < records.size(); ++i)
          weight_gradient(records[i]->x, records[i]->dy, records[i]->offsets, {dw.tensor, add(i)});
      },
      [&](auto stream) {
        if (first.offsets) return cuda::grouped_weight_gradient(records, dw, stream);
        for (size_t i = 0; i < records.size(); ++i) {
          const Tensor &x = records[i]->x, &dy = records[i]->dy;
          cuda::gemm(true, false, dy.dim(1), x.dim(1), x.dim(0), dy.raw(), x.raw(), x.dtype(),
                     Tensor(dw.tensor).raw(), dw.tensor.dtype(), add(i), stream);
        }
      });
}

void add_bias(Tensor y, const Tensor& bias) {
  by_float(y.dtype(), [&](auto z) {
    using T = decltype(z);
    const Tensor wide = bias.to(y.dtype(), "bias");
    cpu::parallel_rows(y.dim(0), y.dim(1), [&](int64_t r) {
      cpu::store(y.data<T>() + r * y.dim(1), true, y.dim(1),
                 [b = wide.data<T>()](int64_t j) { return cpu::Acc<T>(b[j]); });
    });
  });
}

void bias_gradient(Op& op, const Tensor& dy, Op::Into db) {
  op.run(
      {.bytes = double(dy.nbytes())}, [&] { cpu::add_rows(dy, nullptr, db); },
      [&](auto stream) {
        const Shape parts{cuda::bias_parts(dy.dim(0)), dy.dim(1)};
        cuda::bias_gradient(dy, db, op.workspace("bias_parts", parts, DType::f32), stream);
      });
}

// linear, and grouped_linear with offsets.
Tensor product(Op& op, const Tensor& x, Param& w, const Tensor& offsets, LinearOptions options) {
  const Tensor& m = w.value;
  op.require(x.rank() == 2 && m.rank() == (offsets ? 3 : 2), "x must be [T, K] and w {}",
             offsets ? "[E, N, K]" : "[N, K]");
  const int64_t n = m.dim(m.rank() - 2), k = m.dim(m.rank() - 1);
  op.require(x.dim(1) == k, "x has {} columns, w has {}", x.dim(1), k);
  op.require(x.dtype() == m.dtype(), "x and w must have one dtype");
  Param* bias = options.bias;
  op.require(!bias || bias->value.shape() == Shape{n}, "the bias must be [{}]", n);
  Tensor y = op.output("y", {x.dim(0), n}, options.out == DType::u8 ? x.dtype() : options.out);
  const Cost cost{flops_of(x, y), double(x.nbytes() + m.nbytes() + y.nbytes())};
  op.run(
      cost, [&] { multiply(x, m, true, offsets, y); },
      [&](auto stream) { multiply_on_gpu(x, m, true, offsets, y, false, stream); });
  if (bias)
    op.run(
        {.bytes = 2.0 * y.nbytes()}, [&] { add_bias(y, bias->value); },
        [&](auto stream) { cuda::add_bias(y, bias->value, stream); });
  op.backward([=, y = y.identity(), &w](Op& op) {
    Tensor dy = op.grad(y);
    if (bias)
      if (auto db = op.accumulate(*bias)) bias_gradient(op, dy, db);
    if (dy.dtype() != x.dtype()) dy = dy.to(x.dtype(), "dy");
    if (op.wants(x)) {
      // On the CPU no bf16 product adds, and none of grouped rows does.
      const bool apart = offsets || !op.on_gpu();
      const Op::Into dx =
          apart ? Op::Into{op.workspace("dx", x.shape(), x.dtype())} : op.accumulate(x);
      op.run(
          cost, [&] { multiply(dy, w.value, false, offsets, dx.tensor); },
          [&](auto stream) {
            multiply_on_gpu(dy, w.value, false, offsets, dx.tensor, dx.add, stream);
          });
      if (apart) op.give(x, dx.tensor);
    }
    op.defer(w, x, dy, offsets);
  });
  return y;
}

}  // namespace

Tensor linear(Tape& tape, const Tensor& x, Param& w, LinearOptions options, Loc at) {
  Op op(tape, "linear", at, {{"x", x}, {"w", w.value}});
  return product(op, x, w, {}, options);
}

Tensor grouped_linear(Tape& tape, const Tensor& x, Param& w, const Tensor& offsets, Loc at) {
  Op op(tape, "grouped_linear", at, {{"x", x}, {"w", w.value}, {"offsets", offsets}});
  op.require(offsets.dtype() == DType::i32 && offsets.shape() == Shape{w.value.dim(0) + 1},
             "offsets must be int32[{}]", w.value.dim(0) + 1);
  if (offsets.device() == Device::cpu) {
    const auto o = offsets.span<int32_t>();
    op.require(o.front() == 0 && o.back() <= x.dim(0) && std::is_sorted(o.begin(), o.end()),
               "offsets must rise from 0 to at most {} rows", x.dim(0));
  }
  return product(op, x, w, offsets, {});
}

void flush_wgrads(Context& context, std::span<WgradQueue*> queues) {
  std::map<Param*, std::vector<WgradRecord*>> by_param;
  for (WgradQueue* queue : queues)
    for (WgradRecord& r : *queue) by_param[r.param].push_back(&r);
  for (const auto& [param, records] : by_param) {
    run_records(context, records);
    for (WgradRecord* r : records)
      r->x = r->dy = r->offsets = {};  // the last use: free now, not when the queue is cleared
  }
  for (WgradQueue* queue : queues) queue->clear();
}

}  // namespace pith
