#include "ops/basic.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "ops/gemm.h"
#include "ops/simd.h"

// Four helpers hold all the loops: unary, binary (with broadcasting), reduce (its transpose) and
// pick (every op that moves elements). Arithmetic is in the accumulation type, sums are in fp64.

namespace pith {
namespace {

using cpu::Acc;

constexpr int64_t kParallel = 65536;  // elements worth waking threads for

int64_t row_size(const Tensor& x) {  // columns, known for no rows too
  int64_t n = 1;
  for (int i = 1; i < x.rank(); ++i) n *= x.dim(i);
  return n;
}

// Where the broadcast operand of element (r, c) lies: r * row + c * col.
struct Strides {
  int64_t row, col;
  int64_t operator()(int64_t r, int64_t c) const { return r * row + c * col; }
};

// op.run with f called on a value of dtype's C++ type.
template <class F> void run_as(Op& op, DType dtype, double bytes, F f) {
  op.run({.bytes = bytes}, [&] { by_float(dtype, f); });
}

// to[i] = (add ? to[i] : 0) + value(i)
template <class T, class F> void write(Op::Into& into, F value) {
  T* to = into.tensor.data<T>();
  const int64_t n = into.tensor.numel();
#pragma omp parallel for if (n > kParallel)
  for (int64_t i = 0; i < n; ++i)
    to[i] = T(Acc<T>(value(i)) + (into.add ? Acc<T>(to[i]) : Acc<T>(0)));
}

// y = f(x), dx = dy * df(x, f(x)).
template <class F, class D>
Tensor unary(Tape& tape, const char* name, const Tensor& x, Loc at, F f, D df) {
  Op op(tape, name, at, {{"x", x}});
  Tensor y = op.output(name, x.shape(), x.dtype());
  run_as(op, x.dtype(), 2.0 * x.nbytes(), [&](auto z) {
    using T = decltype(z);
    const T* in = x.data<T>();
    Op::Into into{y, false};
    write<T>(into, [=](int64_t i) { return f(Acc<T>(in[i])); });
  });
  op.backward([=, y = y.identity()](Op& op) {
    const Tensor dy = op.grad(y);
    if (auto dx = op.accumulate(x))
      run_as(op, x.dtype(), 3.0 * x.nbytes(), [&](auto z) {
        using T = decltype(z);
        const T *in = x.data<T>(), *g = dy.data<T>();
        write<T>(dx, [=](int64_t i) {
          const Acc<T> v = in[i];
          return Acc<T>(g[i]) * df(v, f(v));
        });
      });
  });
  return y;
}

Strides broadcast(const Op& op, const Tensor& a, const Tensor& b) {
  op.require(a.dtype() == b.dtype(), "a and b must have one dtype: cast one of them");
  const int64_t cols = row_size(a);
  if (b.shape() == a.shape()) return {cols, 1};
  if (b.numel() == 1) return {0, 0};
  if (b.shape() == Shape{cols} || b.shape() == Shape{1, cols}) return {0, 1};
  op.require(b.shape() == Shape{a.rows(), 1},
             "b must have the shape of a, one row [{}], one column [{}, 1] or [1]", cols, a.rows());
  return {1, 0};
}

// to += the sum over what was broadcast of value(r, c).
template <class T, class F>
void write_sums(Op::Into& into, int64_t rows, int64_t cols, Strides at, F value) {
  std::vector<double> sums(size_t(into.tensor.numel()));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) sums[size_t(at(r, c))] += double(value(r, c));
  write<T>(into, [&](int64_t i) { return sums[size_t(i)]; });
}

// y = f(a, b), da = dy * fa(a, b), db = dy * fb(a, b) summed over what was broadcast. Unless
// `reads`, fa and fb are constants, and neither a nor b is kept for backward.
template <class F, class Fa, class Fb>
Tensor binary(Tape& tape, const char* name, const Tensor& a, const Tensor& b, Loc at, bool reads,
              F f, Fa fa, Fb fb) {
  Op op(tape, name, at, {{"a", a}, {"b", b}});
  const Strides of_b = broadcast(op, a, b);
  const int64_t rows = a.rows(), cols = row_size(a);
  Tensor y = op.output(name, a.shape(), a.dtype());
  run_as(op, a.dtype(), 2.0 * a.nbytes() + double(b.nbytes()), [&](auto z) {
    using T = decltype(z);
    const T *pa = a.data<T>(), *pb = b.data<T>();
    Op::Into into{y, false};
    write<T>(into,
             [=](int64_t i) { return f(Acc<T>(pa[i]), Acc<T>(pb[of_b(i / cols, i % cols)])); });
  });
  const Tensor kept_a = reads ? a : a.identity(), kept_b = reads ? b : b.identity();
  op.backward([=, a = kept_a, b = kept_b, y = y.identity()](Op& op) {
    const Tensor dy = op.grad(y);
    auto da = op.accumulate(a), db = op.accumulate(b);
    if (!da && !db) return;
    // a and b may be one tensor: the second contribution then adds to the first.
    run_as(op, a.dtype(), 4.0 * a.nbytes() + 2.0 * b.nbytes(), [&](auto z) {
      using T = decltype(z);
      const T *pa = reads ? a.data<T>() : nullptr, *pb = reads ? b.data<T>() : nullptr,
              *g = dy.data<T>();
      const auto along = [=](const auto& df, int64_t r, int64_t c) {
        const int64_t i = r * cols + c;
        return Acc<T>(g[i]) *
               (reads ? df(Acc<T>(pa[i]), Acc<T>(pb[of_b(r, c)])) : df(Acc<T>(0), Acc<T>(0)));
      };
      if (da) write<T>(da, [=](int64_t i) { return along(fa, i / cols, i % cols); });
      if (db)
        write_sums<T>(db, rows, cols, of_b, [=](int64_t r, int64_t c) { return along(fb, r, c); });
    });
  });
  return y;
}

// y[at(r, c)] += factor * x[r, c]
Tensor reduce(Tape& tape, const char* name, const Tensor& x, Shape shape, Strides to, double factor,
              Loc at) {
  Op op(tape, name, at, {{"x", x}});
  const int64_t rows = x.rows(), cols = row_size(x);
  Tensor y = op.output(name, shape, x.dtype());
  run_as(op, x.dtype(), double(x.nbytes()), [&](auto z) {
    using T = decltype(z);
    const T* in = x.data<T>();
    Op::Into into{y, false};
    write_sums<T>(into, rows, cols, to,
                  [=](int64_t r, int64_t c) { return factor * double(in[r * cols + c]); });
  });
  op.backward([=, x = x.identity(), y = y.identity()](Op& op) {
    const Tensor dy = op.grad(y);
    if (auto dx = op.accumulate(x))
      run_as(op, x.dtype(), double(x.nbytes()), [&](auto z) {
        using T = decltype(z);
        const T* g = dy.data<T>();
        write<T>(dx, [=](int64_t i) { return Acc<T>(factor) * Acc<T>(g[to(i / cols, i % cols)]); });
      });
  });
  return y;
}

struct Source {
  size_t tensor;
  int64_t element;
};

// y[r, c] is one element of one of the tensors in `from`, the one that where(r, c) names; an
// element may be named often.
template <class F>
Tensor pick(Op& op, const char* name, const std::vector<Tensor>& from, Shape shape, F where) {
  const DType dtype = from[0].dtype();
  for (const Tensor& x : from)
    op.require(x.dtype() == dtype, "all inputs must have one dtype: cast some of them");
  Tensor y = op.output(name, shape, dtype);
  const int64_t rows = y.rows(), cols = y.cols();
  run_as(op, dtype, 2.0 * y.nbytes(), [&](auto z) {
    using T = decltype(z);
    std::vector<const T*> in;
    for (const Tensor& x : from) in.push_back(x.data<T>());
    T* out = y.data<T>();
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) {
        const Source s = where(r, c);
        out[r * cols + c] = in[s.tensor][s.element];
      }
  });
  std::vector<Tensor> inputs;
  for (const Tensor& x : from) inputs.push_back(x.identity());
  op.backward([=, y = y.identity()](Op& op) {
    const Tensor dy = op.grad(y);
    std::vector<Op::Into> into;
    for (const Tensor& x : inputs) into.push_back(op.accumulate(x));
    run_as(op, dtype, 3.0 * y.nbytes(), [&](auto z) {
      using T = decltype(z);
      std::vector<T*> to;
      for (Op::Into& d : into) {
        if (d && !d.add) d.tensor.fill_zero();
        to.push_back(d ? d.tensor.data<T>() : nullptr);
      }
      const T* g = dy.data<T>();
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < cols; ++c) {
          const Source s = where(r, c);
          if (!to[s.tensor]) continue;
          T& sum = to[s.tensor][s.element];
          sum = T(Acc<T>(sum) + Acc<T>(g[r * cols + c]));
        }
    });
  });
  return y;
}

// The shape of x with another number of rows.
Shape with_rows(const Tensor& x, int64_t rows) {
  std::vector<int64_t> dims(x.shape().dims().begin(), x.shape().dims().end());
  dims[0] = rows;
  return Shape(std::span<const int64_t>(dims));
}

constexpr auto kOne = [](auto x, auto) { return decltype(x)(1); };

}  // namespace

Tensor add(Tape& tape, const Tensor& a, const Tensor& b, Loc at) {
  return binary(
      tape, "add", a, b, at, false, [](auto x, auto y) { return x + y; }, kOne, kOne);
}

Tensor sub(Tape& tape, const Tensor& a, const Tensor& b, Loc at) {
  return binary(
      tape, "sub", a, b, at, false, [](auto x, auto y) { return x - y; }, kOne,
      [](auto x, auto) { return decltype(x)(-1); });
}

Tensor mul(Tape& tape, const Tensor& a, const Tensor& b, Loc at) {
  return binary(
      tape, "mul", a, b, at, true, [](auto x, auto y) { return x * y; },
      [](auto, auto y) { return y; }, [](auto x, auto) { return x; });
}

Tensor div(Tape& tape, const Tensor& a, const Tensor& b, Loc at) {
  return binary(
      tape, "div", a, b, at, true, [](auto x, auto y) { return x / y; },
      [](auto, auto y) { return 1 / y; }, [](auto x, auto y) { return -x / (y * y); });
}

Tensor scale(Tape& tape, const Tensor& a, double factor, Loc at) {
  return unary(
      tape, "scale", a, at, [=](auto x) { return x * decltype(x)(factor); },
      [=](auto x, auto) { return decltype(x)(factor); });
}

Tensor exp(Tape& tape, const Tensor& x, Loc at) {
  return unary(
      tape, "exp", x, at, [](auto v) { return std::exp(v); }, [](auto, auto y) { return y; });
}

Tensor log(Tape& tape, const Tensor& x, Loc at) {
  return unary(
      tape, "log", x, at, [](auto v) { return std::log(v); }, [](auto v, auto) { return 1 / v; });
}

Tensor sigmoid(Tape& tape, const Tensor& x, Loc at) {
  return unary(
      tape, "sigmoid", x, at, [](auto v) { return cpu::sigmoid_of(v); },
      [](auto, auto y) { return y * (1 - y); });
}

Tensor silu(Tape& tape, const Tensor& x, Loc at) {
  return unary(
      tape, "silu", x, at, [](auto v) { return v * cpu::sigmoid_of(v); },
      [](auto v, auto y) { return cpu::sigmoid_of(v) * (1 + v - y); });
}

Tensor tanh(Tape& tape, const Tensor& x, Loc at) {
  return unary(
      tape, "tanh", x, at, [](auto v) { return std::tanh(v); },
      [](auto, auto y) { return 1 - y * y; });
}

Tensor square(Tape& tape, const Tensor& x, Loc at) {
  return unary(
      tape, "square", x, at, [](auto v) { return v * v; }, [](auto v, auto) { return 2 * v; });
}

Tensor softmax(Tape& tape, const Tensor& x, Loc at) {
  Op op(tape, "softmax", at, {{"x", x}});
  Tensor y = op.output("softmax", x.shape(), x.dtype());
  const int64_t rows = x.rows(), cols = row_size(x);
  run_as(op, x.dtype(), 2.0 * x.nbytes(), [&](auto z) {
    using T = decltype(z);
    std::vector<Acc<T>> e(static_cast<size_t>(cols));
    for (int64_t r = 0; r < rows; ++r) {
      const T* in = x.data<T>() + r * cols;
      const Acc<T> top = cols ? Acc<T>(*std::max_element(in, in + cols)) : 0;
      for (int64_t c = 0; c < cols; ++c) e[c] = std::exp(Acc<T>(in[c]) - top);
      const double sum = std::accumulate(e.begin(), e.end(), 0.0);
      for (int64_t c = 0; c < cols; ++c) y.data<T>()[r * cols + c] = T(Acc<T>(e[c] / sum));
    }
  });
  op.backward([=](Op& op) {
    const Tensor dy = op.grad(y);
    if (auto dx = op.accumulate(x))
      run_as(op, x.dtype(), 3.0 * x.nbytes(), [&](auto z) {
        using T = decltype(z);
        const T *p = y.data<T>(), *g = dy.data<T>();
        std::vector<double> dot(static_cast<size_t>(rows));
        for (int64_t i = 0; i < y.numel(); ++i) dot[i / cols] += double(g[i]) * double(p[i]);
        write<T>(dx,
                 [&](int64_t i) { return Acc<T>(p[i]) * Acc<T>(double(g[i]) - dot[i / cols]); });
      });
  });
  return y;
}

Tensor sum_cols(Tape& tape, const Tensor& x, Loc at) {
  return reduce(tape, "sum_cols", x, {x.rows(), 1}, {1, 0}, 1, at);
}

Tensor sum_rows_to_one(Tape& tape, const Tensor& x, Loc at) {
  return reduce(tape, "sum_rows_to_one", x, {1, row_size(x)}, {0, 1}, 1, at);
}

Tensor mean(Tape& tape, const Tensor& x, Loc at) {
  return reduce(tape, "mean", x, {1}, {0, 0}, 1.0 / double(x.numel()), at);
}

Tensor matmul(Tape& tape, const Tensor& a, const Tensor& b, Loc at) {
  Op op(tape, "matmul", at, {{"a", a}, {"b", b}});
  op.require(a.rank() == 2 && b.rank() == 2 && a.dim(1) == b.dim(0),
             "a [m, k] and b [k, n] must share k");
  op.require(a.dtype() == b.dtype(), "a and b must have one dtype: cast one of them");
  const int64_t m = a.dim(0), k = a.dim(1), n = b.dim(1);
  const DType t = a.dtype();
  const Cost cost{.flops = 2.0 * double(m) * double(n) * double(k),
                  .bytes = double(a.nbytes() + b.nbytes() + size_t(m * n) * size_of(t))};
  Tensor y = op.output("matmul", {m, n}, t);
  op.run(cost, [&] { cpu::gemm(false, false, m, n, k, a.raw(), b.raw(), t, y.raw(), t, false); });
  op.backward([=, y = y.identity()](Op& op) {
    const Tensor dy = op.grad(y);
    // gemm cannot add to bf16: the product is made beside it, wide, and rounded once.
    const auto product = [&](Op::Into to, bool ta, bool tb, int64_t rows, int64_t cols,
                             int64_t inner, const Tensor& p, const Tensor& q) {
      if (!to) return;
      const bool beside = t == DType::bf16 && to.add;
      Tensor out = beside ? op.workspace("matmul_grad", to.tensor.shape(), DType::f32) : to.tensor;
      op.run(cost, [&] {
        cpu::gemm(ta, tb, rows, cols, inner, p.raw(), q.raw(), t, out.raw(), out.dtype(),
                  to.add && !beside);
        if (beside) write<bf16>(to, [from = out.data<float>()](int64_t i) { return from[i]; });
      });
    };
    product(op.accumulate(a), false, true, m, k, n, dy, b);
    product(op.accumulate(b), true, false, k, n, m, a, dy);
  });
  return y;
}

Tensor transpose(Tape& tape, const Tensor& x, Loc at) {
  Op op(tape, "transpose", at, {{"x", x}});
  op.require(x.rank() == 2, "x must be a matrix");
  const int64_t cols = x.dim(1);
  return pick(op, "transpose", {x}, {cols, x.dim(0)}, [=](int64_t r, int64_t c) {
    return Source{0, c * cols + r};
  });
}

Tensor slice_rows(Tape& tape, const Tensor& x, int64_t begin, int64_t end, Loc at) {
  Op op(tape, "slice_rows", at, {{"x", x}});
  op.require(x.rank() > 0 && 0 <= begin && begin <= end && end <= x.rows(), "rows [{}, {}) of {}",
             begin, end, x.rows());
  const int64_t cols = row_size(x);
  return pick(op, "slice_rows", {x}, with_rows(x, end - begin), [=](int64_t r, int64_t c) {
    return Source{0, (begin + r) * cols + c};
  });
}

Tensor slice_cols(Tape& tape, const Tensor& x, int64_t begin, int64_t end, Loc at) {
  Op op(tape, "slice_cols", at, {{"x", x}});
  const int64_t cols = row_size(x);
  op.require(0 <= begin && begin <= end && end <= cols, "columns [{}, {}) of {}", begin, end, cols);
  return pick(op, "slice_cols", {x}, {x.rows(), end - begin}, [=](int64_t r, int64_t c) {
    return Source{0, r * cols + begin + c};
  });
}

Tensor concat_rows(Tape& tape, const Tensor& a, const Tensor& b, Loc at) {
  Op op(tape, "concat_rows", at, {{"a", a}, {"b", b}});
  op.require(a.rank() > 0 && row_size(a) == row_size(b), "a and b must have rows of one size");
  const int64_t rows = a.rows(), cols = row_size(a);
  return pick(op, "concat_rows", {a, b}, with_rows(a, rows + b.rows()), [=](int64_t r, int64_t c) {
    return r < rows ? Source{0, r * cols + c} : Source{1, (r - rows) * cols + c};
  });
}

Tensor concat_cols(Tape& tape, const Tensor& a, const Tensor& b, Loc at) {
  Op op(tape, "concat_cols", at, {{"a", a}, {"b", b}});
  op.require(a.rows() == b.rows(), "a and b must have one number of rows");
  const int64_t of_a = row_size(a), of_b = row_size(b);
  return pick(op, "concat_cols", {a, b}, {a.rows(), of_a + of_b}, [=](int64_t r, int64_t c) {
    return c < of_a ? Source{0, r * of_a + c} : Source{1, r * of_b + c - of_a};
  });
}

Tensor where(Tape& tape, const Tensor& mask_u8, const Tensor& a, const Tensor& b, Loc at) {
  Op op(tape, "where", at, {{"mask", mask_u8}, {"a", a}, {"b", b}});
  op.require(mask_u8.dtype() == DType::u8 && mask_u8.numel() == a.numel(),
             "the mask must be uint8, as large as a");
  const Strides of_b = broadcast(op, a, b);
  const int64_t cols = row_size(a);
  return pick(op, "where", {a, b}, a.shape(), [=](int64_t r, int64_t c) {
    return mask_u8.data<uint8_t>()[r * cols + c] ? Source{0, r * cols + c} : Source{1, of_b(r, c)};
  });
}

Tensor gather_cols(Tape& tape, const Tensor& x, const Tensor& index, Loc at) {
  Op op(tape, "gather_cols", at, {{"x", x}, {"index", index}});
  op.require(index.dtype() == DType::i32 && index.rank() == 2 && index.dim(0) == x.rows(),
             "index must be int32[{}, k]", x.rows());
  const int64_t cols = row_size(x), k = index.dim(1);
  return pick(op, "gather_cols", {x}, index.shape(), [=](int64_t r, int64_t c) {
    const int64_t column = index.data<int32_t>()[r * k + c];
    if (column < 0 || column >= cols) fail("index {} is outside {} columns", column, cols);
    return Source{0, r * cols + column};
  });
}

Tensor top_k(Tape& tape, const Tensor& x, int64_t k, Loc at) {
  Op op(tape, "top_k", at, {{"x", x}});
  const int64_t rows = x.rows(), cols = row_size(x);
  op.require(0 <= k && k <= cols, "the best {} of {} columns", k, cols);
  Tensor ids = op.workspace("top_k", {rows, k}, DType::i32);
  run_as(op, x.dtype(), double(x.nbytes() + ids.nbytes()), [&](auto z) {
    const auto* in = x.data<decltype(z)>();
    // NaN comes last.
    const auto value = [&in](int32_t i) { return in[i] == in[i] ? double(in[i]) : -HUGE_VAL; };
    std::vector<int32_t> order(static_cast<size_t>(cols));
    for (int64_t r = 0; r < rows; ++r, in += cols) {
      std::iota(order.begin(), order.end(), 0);
      std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int32_t i, int32_t j) {
        return value(i) > value(j) || (value(i) == value(j) && i < j);  // of equals the first
      });
      std::copy_n(order.begin(), k, ids.data<int32_t>() + r * k);
    }
  });
  return ids;
}

Tensor cast(Tape& tape, const Tensor& x, DType to, Loc at) {
  Op op(tape, "cast", at, {{"x", x}});
  Tensor y = op.output("cast", x.shape(), to);
  op.run({.bytes = double(x.nbytes() + y.nbytes())}, [&] { y.copy_from(x); });
  op.backward([=, x = x.identity(), y = y.identity()](Op& op) {
    const Tensor dy = op.grad(y);
    if (auto dx = op.accumulate(x))
      run_as(op, x.dtype(), double(x.nbytes() + y.nbytes()), [&](auto z) {
        by_float(to, [&](auto narrow) {
          const auto* g = dy.data<decltype(narrow)>();
          write<decltype(z)>(dx, [=](int64_t i) { return Acc<decltype(narrow)>(g[i]); });
        });
      });
  });
  return y;
}

}  // namespace pith
