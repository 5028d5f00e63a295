#include "ops/linear.h"

#include <omp.h>

#include <algorithm>
#include <unordered_map>

#include "ops/gemm.h"
#include "ops/simd.h"

namespace pith {
namespace {

// Rows of a task of a grouped product: long enough for the GEMM's full speed on one thread, short
// enough that one expert with most of the rows is shared by all.
constexpr int64_t kBlockRows = 256;

// Rows that belong to a group; what lies behind is the unused tail. On meta all rows are taken to
// be used.
int64_t used_rows(const Tensor& x, const Tensor& offsets) {
  if (!offsets || offsets.device() == Device::meta) return x.dim(0);
  return offsets.data<int32_t>()[offsets.dim(0) - 1];
}

struct Rows {
  int64_t group, begin, end;
};

std::vector<Rows> groups_of(const Tensor& x, const Tensor& offsets) {
  if (!offsets) return {{0, 0, x.dim(0)}};
  const int32_t* at = offsets.data<int32_t>();
  std::vector<Rows> groups;
  for (int64_t e = 0; e + 1 < offsets.dim(0); ++e) groups.push_back({e, at[e], at[e + 1]});
  return groups;
}

std::byte* rows_at(Tensor& t, int64_t row) {
  return static_cast<std::byte*>(t.raw()) + cpu::offset_bytes(t.dtype(), row * t.dim(1));
}
const std::byte* rows_at(const Tensor& t, int64_t row) {
  return rows_at(const_cast<Tensor&>(t), row);
}

// c (+)= x w^T, or x w: every group's rows times its matrix of w [N, K] or [E, N, K]; the tail is
// zeroed unless add.
void multiply(const Tensor& x, const Tensor& w, bool trans_w, const Tensor& offsets, Tensor c,
              bool add) {
  const std::vector<Rows> groups = groups_of(x, offsets);
  const auto product = [&](const Rows& r) {
    const Tensor matrix = groups.size() == 1 ? w : w.row_range(r.group, r.group + 1);
    cpu::gemm(false, trans_w, r.end - r.begin, c.dim(1), x.dim(1), rows_at(x, r.begin),
              matrix.raw(), x.dtype(), rows_at(c, r.begin), c.dtype(), add);
  };
  if (groups.size() == 1) {
    product(groups[0]);
  } else {
    std::vector<Rows> blocks;
    for (const Rows& g : groups)
      for (int64_t b = g.begin; b < g.end; b += kBlockRows)
        blocks.push_back({g.group, b, std::min(g.end, b + kBlockRows)});
    cpu::parallel_tasks(blocks.size(), [&](int64_t i) { product(blocks[i]); });
  }
  if (const int64_t used = groups.back().end; !add && used < c.dim(0))
    c.row_range(used, c.dim(0)).fill_zero();
}

void add_to(Tensor to, const Tensor& from) {
  by_float(to.dtype(), [&](auto z) {
    using T = decltype(z);
    using A = cpu::Acc<T>;
    T* a = to.data<T>();
    const T* b = from.data<T>();
    const int64_t n = to.numel();
#pragma omp parallel for simd if (n > 65536)
    for (int64_t i = 0; i < n; ++i) a[i] = T(A(a[i]) + A(b[i]));
  });
}

// The gradient of x, and the record for the gradient of w. dy has x's dtype.
void linear_backward(Op& op, const Tensor& x, Param& w, const Tensor& dy, const Tensor& offsets) {
  const double flops = 2.0 * used_rows(x, offsets) * dy.dim(1) * x.dim(1);
  if (auto dx = op.accumulate(x)) {
    // The bf16 GEMM cannot add to a bf16 result.
    const bool apart = dx.add && x.dtype() == DType::bf16;
    Tensor part = apart ? op.workspace("dx_part", x.shape(), x.dtype()) : dx.tensor;
    op.run({flops, double(dy.nbytes() + w.value.nbytes() + part.nbytes())}, [&] {
      multiply(dy, w.value, false, offsets, part, dx.add && !apart);
      if (apart) add_to(dx.tensor, part);
    });
  }
  op.defer(w, x, dy, offsets);
}

void add_bias(Tensor y, const Tensor& bias) {
  by_float(y.dtype(), [&](auto z) {
    by_float(bias.dtype(), [&](auto zb) {
      using T = decltype(z);
      const auto* b = bias.data<decltype(zb)>();
      const int64_t rows = y.dim(0), n = y.dim(1);
#pragma omp parallel for if (rows * n > 32768)
      for (int64_t t = 0; t < rows; ++t) {
        T* row = y.data<T>() + t * n;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) row[j] = T(cpu::Acc<T>(row[j]) + cpu::Acc<T>(b[j]));
      }
    });
  });
}

// db (+)= column sums of dy, each in order of rows whatever the threads.
void bias_backward(const Tensor& dy, Op::Into db) {
  by_float(dy.dtype(), [&](auto z) {
    using T = decltype(z);
    using A = cpu::Acc<T>;
    const T* from = dy.data<T>();
    A* to = db.tensor.data<A>();
    const int64_t rows = dy.dim(0), n = dy.dim(1), width = 64;
#pragma omp parallel for if (rows * n > 32768)
    for (int64_t begin = 0; begin < n; begin += width) {
      const int64_t end = std::min(n, begin + width);
      A sums[width] = {};
      for (int64_t t = 0; t < rows; ++t)
#pragma omp simd
        for (int64_t j = begin; j < end; ++j) sums[j - begin] += A(from[t * n + j]);
      for (int64_t j = begin; j < end; ++j) to[j] = (db.add ? to[j] : A(0)) + sums[j - begin];
    }
  });
}

// dw (+)= dy^T x for every group. A group with more than a thread's share of the rows has all
// threads for itself; the others run one thread each, largest first.
void weight_gradient(const Tensor& x, const Tensor& dy, const Tensor& offsets, Tensor dw,
                     bool add) {
  std::vector<Rows> groups = groups_of(x, offsets);
  const auto product = [&](const Rows& r) {
    Tensor matrix = groups.size() == 1 ? dw : dw.row_range(r.group, r.group + 1);
    cpu::gemm(true, false, dy.dim(1), x.dim(1), r.end - r.begin, rows_at(dy, r.begin),
              rows_at(x, r.begin), x.dtype(), matrix.raw(), dw.dtype(), add);
  };
  std::stable_sort(groups.begin(), groups.end(),
                   [](const Rows& a, const Rows& b) { return a.end - a.begin > b.end - b.begin; });
  const int64_t total = used_rows(x, offsets), threads = omp_get_max_threads();
  size_t large = 0;
  while (large < groups.size() && (groups[large].end - groups[large].begin) * threads > total)
    ++large;
  for (size_t i = 0; i < large; ++i) product(groups[i]);
  cpu::parallel_tasks(groups.size() - large, [&](int64_t i) { product(groups[large + i]); });
}

void run_record(Context& context, WgradRecord& r) {
  Tape tape(context, false);
  Op op(tape, "linear wgrad", r.at, {{"x", r.x}, {"dy", r.dy}});
  const int64_t matrix = r.dy.dim(1) * r.x.dim(1);
  op.require(r.x.dim(0) == r.dy.dim(0) &&
                 r.param->grad.numel() == matrix * (r.offsets ? r.offsets.dim(0) - 1 : 1),
             "the record does not fit the gradient {} of {}", r.param->grad.str(), r.param->name);
  const auto dw = op.accumulate(*r.param);
  op.run({2.0 * used_rows(r.x, r.offsets) * matrix,
          double(r.x.nbytes() + r.dy.nbytes() + (dw.add ? 2 : 1) * dw.tensor.nbytes())},
         [&] { weight_gradient(r.x, r.dy, r.offsets, dw.tensor, dw.add); });
}

}  // namespace

Tensor linear(Tape& tape, const Tensor& x, Param& w, LinearOptions options, Loc at) {
  Op op(tape, "linear", at, {{"x", x}, {"w", w.value}});
  const DType out = options.out == DType::u8 ? x.dtype() : options.out;
  op.require(x.rank() == 2 && w.value.rank() == 2, "x must be [T, K] and w [N, K]");
  op.require(x.dim(1) == w.value.dim(1), "x has {} columns, w has {}", x.dim(1), w.value.dim(1));
  op.require(x.dtype() == w.value.dtype(), "x and w must have one dtype");
  op.require(out == x.dtype() || (x.dtype() == DType::bf16 && out == DType::f32),
             "{} cannot come out of {}", name_of(out), name_of(x.dtype()));
  Param* bias = options.bias;
  const int64_t rows = x.dim(0), n = w.value.dim(0);
  if (bias)
    op.require(bias->value.shape() == Shape{n}, "the bias {} must be [{}]", bias->value.str(), n);
  Tensor y = op.output("y", {rows, n}, out);
  op.run({2.0 * rows * n * x.dim(1), double(x.nbytes() + w.value.nbytes() + y.nbytes())}, [&] {
    multiply(x, w.value, true, {}, y, false);
    if (bias) add_bias(y, bias->value);
  });
  op.backward([y = y.identity(), x, &w, bias](Op& op) {
    Tensor dy = op.grad(y);
    if (bias)
      if (auto db = op.accumulate(*bias))
        op.run({.bytes = double(dy.nbytes())}, [&] { bias_backward(dy, db); });
    if (dy.dtype() != x.dtype()) {
      Tensor narrow = op.workspace("dy", dy.shape(), x.dtype());
      op.run({.bytes = double(dy.nbytes() + narrow.nbytes())}, [&] { narrow.copy_from(dy); });
      dy = narrow;
    }
    linear_backward(op, x, w, dy, {});
  });
  return y;
}

Tensor grouped_linear(Tape& tape, const Tensor& x, Param& w, const Tensor& offsets, Loc at) {
  Op op(tape, "grouped_linear", at, {{"x", x}, {"w", w.value}, {"offsets", offsets}});
  op.require(x.rank() == 2 && w.value.rank() == 3, "x must be [R, K] and w [E, N, K]");
  op.require(x.dim(1) == w.value.dim(2), "x has {} columns, w has {}", x.dim(1), w.value.dim(2));
  op.require(x.dtype() == w.value.dtype(), "x and w must have one dtype");
  op.require(offsets.dtype() == DType::i32 && offsets.shape() == Shape{w.value.dim(0) + 1},
             "offsets must be int32[{}]", w.value.dim(0) + 1);
  if (offsets.device() == Device::cpu) {
    const auto o = offsets.span<int32_t>();
    op.require(o[0] == 0 && o[o.size() - 1] <= x.dim(0) && std::is_sorted(o.begin(), o.end()),
               "offsets must rise from 0 to at most {} rows", x.dim(0));
  }
  const double flops = 2.0 * used_rows(x, offsets) * w.value.dim(1) * w.value.dim(2);
  Tensor y = op.output("y", {x.dim(0), w.value.dim(1)}, x.dtype());
  op.run({flops, double(x.nbytes() + w.value.nbytes() + y.nbytes())},
         [&] { multiply(x, w.value, true, offsets, y, false); });
  op.backward([y = y.identity(), x, &w, offsets](Op& op) {
    linear_backward(op, x, w, op.grad(y), offsets);
  });
  return y;
}

void flush_wgrads(Context& context, std::span<WgradQueue*> queues) {
  std::vector<WgradRecord*> records;
  std::unordered_map<Param*, size_t> rank;  // in order of first appearance
  for (WgradQueue* queue : queues)
    for (WgradRecord& r : *queue) {
      rank.try_emplace(r.param, rank.size());
      records.push_back(&r);
    }
  std::stable_sort(records.begin(), records.end(), [&](const WgradRecord* a, const WgradRecord* b) {
    return rank[a->param] < rank[b->param];
  });
  for (WgradRecord* r : records) {
    run_record(context, *r);
    r->x = r->dy = r->offsets = {};  // the last use: free now, not when the queue is cleared
  }
  for (WgradQueue* queue : queues) queue->clear();
}

}  // namespace pith
