#include "ops/basic.h"

#include <tuple>

#include "ops/gemm.h"
#include "ops/simd.h"

// Two helpers hold nearly all loops: map (arithmetic, with broadcasting and sums) and pick (every
// op that moves elements). Arithmetic is in the accumulation type, sums are in fp64.

namespace pith {
namespace {

using cpu::Acc;
using std::tuple;

int64_t row_size(const Tensor& x) {  // columns, known for no rows too
  int64_t n = 1;
  for (int i = 1; i < x.rank(); ++i) n *= x.dim(i);
  return n;
}

// Element i of a matrix, seen from a row, a column or a single element of it: where that is. The
// default is the matrix itself.
struct Place {
  int64_t cols = 1, row = 1, col = 0;
  bool itself() const { return row == cols; }
  int64_t operator()(int64_t i) const { return i / cols * row + i % cols * col; }
};

// i -> element i in the accumulation type; 0 for a tensor without memory.
template <class T> auto values(const Tensor& x) {
  return [p = x ? x.data<T>() : nullptr](int64_t i) { return p ? Acc<T>(p[i]) : Acc<T>(0); };
}

// to[j] = (to.add ? to[j] : 0) + the sum of value(i) over all i < n at j, where value = make(a
// value of the type of `to`).
template <class F> void write(Op& op, Op::Into to, double bytes, int64_t n, Place at, F make) {
  if (!to) return;
  cpu::run(op, {.bytes = bytes}, to.tensor.dtype(), [&](auto z) {
    using T = decltype(z);
    const auto value = make(z);
    T* out = to.tensor.data<T>();
    const auto put = [&](int64_t j, Acc<T> v) { out[j] = T(to.add ? Acc<T>(out[j]) + v : v); };
    if (at.itself()) {
#pragma omp parallel for if (n > 65536)
      for (int64_t i = 0; i < n; ++i) put(i, Acc<T>(value(i)));
      return;
    }
    std::vector<double> sums(size_t(to.tensor.numel()));
    for (int64_t i = 0; i < n; ++i) sums[at(i)] += double(value(i));
    for (size_t j = 0; j < sums.size(); ++j) put(j, Acc<T>(sums[j]));
  });
}

// y[to(i)] = sum of f(a[i], b[of_b(i)]), where f gives its value and its derivatives by a and b; b
// may be empty. Unless `reads`, the derivatives are constants, and neither a nor b is kept.
template <class F>
Tensor map(Op& op, const char* name, const Tensor& a, const Tensor& b, Place of_b, Shape shape,
           Place to, bool reads, F f) {
  Tensor y = op.output(name, shape, a.dtype());
  const int64_t n = a.numel();
  const double bytes = double(a.nbytes() + (b ? b.nbytes() : 0) + y.nbytes());
  write(op, {y}, bytes, n, to, [&](auto z) {
    using T = decltype(z);
    return [=, va = values<T>(a), vb = values<T>(b)](int64_t i) {
      return std::get<0>(f(va(i), vb(of_b(i))));
    };
  });
  op.backward([=, a = reads ? a : a.identity(), b = reads ? b : b.identity(), two = bool(b),
               y = y.identity()](Op& op) {
    const Tensor dy = op.grad(y);
    const auto along = [&](auto z, bool by_b) {
      using T = decltype(z);
      return [=, g = values<T>(dy), va = values<T>(a), vb = values<T>(b)](int64_t i) {
        const auto [value, da, db] = f(va(i), vb(of_b(i)));
        return g(to(i)) * (by_b ? db : da);
      };
    };
    // a and b may be one tensor: the second contribution then adds to the first.
    write(op, op.accumulate(a), 1.5 * bytes, n, {}, [&](auto z) { return along(z, false); });
    if (two)
      write(op, op.accumulate(b), 1.5 * bytes, n, of_b, [&](auto z) { return along(z, true); });
  });
  return y;
}

template <class F> Tensor unary(Tape& tape, const char* name, const Tensor& x, Loc at, F f) {
  Op op(tape, name, at, {{"x", x}});
  return map(op, name, x, {}, {}, x.shape(), {}, true,
             [f](auto v, auto) { return std::tuple_cat(f(v), tuple(0)); });
}

Tensor reduce(Tape& tape, const char* name, const Tensor& x, Shape shape, Place to, double factor,
              Loc at) {
  Op op(tape, name, at, {{"x", x}});
  return map(op, name, x, {}, {}, shape, to, false,
             [factor](auto v, auto) { return tuple(factor * double(v), decltype(v)(factor), 0); });
}

Place broadcast(const Op& op, const Tensor& a, const Tensor& b) {
  op.require(a.dtype() == b.dtype(), "a and b must have one dtype: cast one of them");
  const int64_t cols = row_size(a);
  if (b.shape() == a.shape()) return {};
  if (b.numel() == 1) return {cols, 0, 0};
  if (b.shape() == Shape{cols} || b.shape() == Shape{1, cols}) return {cols, 0, 1};
  op.require(b.shape() == Shape{a.rows(), 1},
             "b must have the shape of a, one row [{}], one column [{}, 1] or [1]", cols, a.rows());
  return {cols, 1, 0};
}

template <class F>
Tensor binary(Tape& tape, const char* name, const Tensor& a, const Tensor& b, Loc at, bool reads,
              F f) {
  Op op(tape, name, at, {{"a", a}, {"b", b}});
  return map(op, name, a, b, broadcast(op, a, b), a.shape(), {}, reads, f);
}

struct Source {
  bool second;
  int64_t element;
};

// y[r, c] is one element of a or b (which may be empty), the one that where(r, c) names; an element
// may be named often.
template <class F>
Tensor pick(Op& op, const char* name, const Tensor& a, const Tensor& b, Shape shape, F where) {
  op.require(!b || a.dtype() == b.dtype(), "a and b must have one dtype: cast one of them");
  Tensor y = op.output(name, shape, a.dtype());
  const int64_t cols = std::max<int64_t>(1, y.cols());
  write(op, {y}, 2.0 * y.nbytes(), y.numel(), {}, [&](auto z) {
    using T = decltype(z);
    return [=, va = values<T>(a), vb = values<T>(b)](int64_t i) {
      const Source s = where(i / cols, i % cols);
      return s.second ? vb(s.element) : va(s.element);
    };
  });
  op.backward([=, a = a.identity(), b = b.identity(), two = bool(b), y = y.identity()](Op& op) {
    const Tensor dy = op.grad(y);
    Op::Into into[] = {op.accumulate(a), two ? op.accumulate(b) : Op::Into{}};
    op.run({.bytes = 3.0 * y.nbytes()}, [&] {
      for (Op::Into& d : into)
        if (d && !d.add) d.tensor.fill_zero();
      by_float(y.dtype(), [&](auto z) {
        using T = decltype(z);
        for (int64_t i = 0; i < dy.numel(); ++i) {
          const Source s = where(i / cols, i % cols);
          if (!into[s.second]) continue;
          T& sum = into[s.second].tensor.template data<T>()[s.element];
          sum = T(Acc<T>(sum) + Acc<T>(dy.data<T>()[i]));
        }
      });
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

}  // namespace

Tensor add(Tape& tape, const Tensor& a, const Tensor& b, Loc at) {
  return binary(tape, "add", a, b, at, false, [](auto x, auto y) { return tuple(x + y, 1, 1); });
}

Tensor sub(Tape& tape, const Tensor& a, const Tensor& b, Loc at) {
  return binary(tape, "sub", a, b, at, false, [](auto x, auto y) { return tuple(x - y, 1, -1); });
}

Tensor mul(Tape& tape, const Tensor& a, const Tensor& b, Loc at) {
  return binary(tape, "mul", a, b, at, true, [](auto x, auto y) { return tuple(x * y, y, x); });
}

Tensor div(Tape& tape, const Tensor& a, const Tensor& b, Loc at) {
  return binary(tape, "div", a, b, at, true,
                [](auto x, auto y) { return tuple(x / y, 1 / y, -x / (y * y)); });
}

Tensor scale(Tape& tape, const Tensor& a, double factor, Loc at) {
  return unary(tape, "scale", a, at,
               [factor](auto v) { return tuple(v * decltype(v)(factor), decltype(v)(factor)); });
}

Tensor exp(Tape& tape, const Tensor& x, Loc at) {
  return unary(tape, "exp", x, at, [](auto v) { return tuple(std::exp(v), std::exp(v)); });
}

Tensor log(Tape& tape, const Tensor& x, Loc at) {
  return unary(tape, "log", x, at, [](auto v) { return tuple(std::log(v), 1 / v); });
}

Tensor sigmoid(Tape& tape, const Tensor& x, Loc at) {
  return unary(tape, "sigmoid", x, at, [](auto v) {
    const auto s = cpu::sigmoid_of(v);
    return tuple(s, s * (1 - s));
  });
}

Tensor silu(Tape& tape, const Tensor& x, Loc at) {
  return unary(tape, "silu", x, at, [](auto v) {
    const auto s = cpu::sigmoid_of(v);
    return tuple(v * s, s * (1 + v - v * s));
  });
}

Tensor softmax(Tape& t, const Tensor& x, Loc at) {
  // The same for every row minus its largest, which keeps exp from overflowing.
  const Tensor top = gather_cols(t, x, top_k(t, x, 1, at), at), e = exp(t, sub(t, x, top, at), at);
  return div(t, e, sum_cols(t, e, at), at);
}

Tensor sum_cols(Tape& tape, const Tensor& x, Loc at) {
  return reduce(tape, "sum_cols", x, {x.rows(), 1}, {row_size(x), 1, 0}, 1, at);
}

Tensor sum_rows_to_one(Tape& tape, const Tensor& x, Loc at) {
  return reduce(tape, "sum_rows_to_one", x, {1, row_size(x)}, {row_size(x), 0, 1}, 1, at);
}

Tensor mean(Tape& tape, const Tensor& x, Loc at) {
  return reduce(tape, "mean", x, {1}, {row_size(x), 0, 0}, 1.0 / double(x.numel()), at);
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
    const auto product = [&](Op::Into to, bool ta, bool tb, int64_t inner, const Tensor& p,
                             const Tensor& q) {
      if (!to) return;
      const bool beside = t == DType::bf16 && to.add;
      Tensor out = beside ? op.workspace("matmul_grad", to.tensor.shape(), DType::f32) : to.tensor;
      op.run(cost, [&] {
        cpu::gemm(ta, tb, to.tensor.dim(0), to.tensor.dim(1), inner, p.raw(), q.raw(), t, out.raw(),
                  out.dtype(), to.add && !beside);
      });
      if (beside)
        write(op, to, double(out.nbytes()), out.numel(), {},
              [&](auto) { return values<float>(out); });
    };
    product(op.accumulate(a), false, true, n, dy, b);
    product(op.accumulate(b), true, false, m, a, dy);
  });
  return y;
}

Tensor transpose(Tape& tape, const Tensor& x, Loc at) {
  Op op(tape, "transpose", at, {{"x", x}});
  op.require(x.rank() == 2, "x must be a matrix");
  const int64_t cols = x.dim(1);
  return pick(op, "transpose", x, {}, {cols, x.dim(0)}, [=](int64_t r, int64_t c) {
    return Source{false, c * cols + r};
  });
}

Tensor slice_rows(Tape& tape, const Tensor& x, int64_t begin, int64_t end, Loc at) {
  Op op(tape, "slice_rows", at, {{"x", x}});
  op.require(x.rank() > 0 && 0 <= begin && begin <= end && end <= x.rows(), "rows [{}, {}) of {}",
             begin, end, x.rows());
  const int64_t cols = row_size(x);
  return pick(op, "slice_rows", x, {}, with_rows(x, end - begin), [=](int64_t r, int64_t c) {
    return Source{false, (begin + r) * cols + c};
  });
}

Tensor slice_cols(Tape& tape, const Tensor& x, int64_t begin, int64_t end, Loc at) {
  Op op(tape, "slice_cols", at, {{"x", x}});
  const int64_t cols = row_size(x);
  op.require(0 <= begin && begin <= end && end <= cols, "columns [{}, {}) of {}", begin, end, cols);
  return pick(op, "slice_cols", x, {}, {x.rows(), end - begin}, [=](int64_t r, int64_t c) {
    return Source{false, r * cols + begin + c};
  });
}

Tensor concat_rows(Tape& tape, const Tensor& a, const Tensor& b, Loc at) {
  Op op(tape, "concat_rows", at, {{"a", a}, {"b", b}});
  op.require(a.rank() > 0 && row_size(a) == row_size(b), "a and b must have rows of one size");
  const int64_t rows = a.rows(), cols = row_size(a);
  return pick(op, "concat_rows", a, b, with_rows(a, rows + b.rows()), [=](int64_t r, int64_t c) {
    return r < rows ? Source{false, r * cols + c} : Source{true, (r - rows) * cols + c};
  });
}

Tensor concat_cols(Tape& tape, const Tensor& a, const Tensor& b, Loc at) {
  Op op(tape, "concat_cols", at, {{"a", a}, {"b", b}});
  op.require(a.rows() == b.rows(), "a and b must have one number of rows");
  const int64_t of_a = row_size(a), of_b = row_size(b);
  return pick(op, "concat_cols", a, b, {a.rows(), of_a + of_b}, [=](int64_t r, int64_t c) {
    return c < of_a ? Source{false, r * of_a + c} : Source{true, r * of_b + c - of_a};
  });
}

Tensor where(Tape& tape, const Tensor& mask_u8, const Tensor& a, const Tensor& b, Loc at) {
  Op op(tape, "where", at, {{"mask", mask_u8}, {"a", a}, {"b", b}});
  op.require(mask_u8.dtype() == DType::u8 && mask_u8.numel() == a.numel(),
             "the mask must be uint8, as large as a");
  const Place of_b = broadcast(op, a, b);
  const int64_t cols = row_size(a);
  return pick(op, "where", a, b, a.shape(), [=](int64_t r, int64_t c) {
    return mask_u8.data<uint8_t>()[r * cols + c] ? Source{false, r * cols + c}
                                                 : Source{true, of_b(r * cols + c)};
  });
}

Tensor gather_cols(Tape& tape, const Tensor& x, const Tensor& index, Loc at) {
  Op op(tape, "gather_cols", at, {{"x", x}, {"index", index}});
  op.require(index.dtype() == DType::i32 && index.rank() == 2 && index.dim(0) == x.rows(),
             "index must be int32[{}, k]", x.rows());
  const int64_t cols = row_size(x), k = index.dim(1);
  if (index.device() == Device::cpu)
    for (const int32_t column : index.span<int32_t>())
      op.require(0 <= column && column < cols, "index {} is outside {} columns", column, cols);
  return pick(op, "gather_cols", x, {}, index.shape(), [=](int64_t r, int64_t c) {
    return Source{false, r * cols + index.data<int32_t>()[r * k + c]};
  });
}

Tensor top_k(Tape& tape, const Tensor& x, int64_t k, Loc at) {
  Op op(tape, "top_k", at, {{"x", x}});
  const int64_t rows = x.rows(), cols = row_size(x);
  op.require(0 <= k && k <= cols, "the best {} of {} columns", k, cols);
  Tensor ids = op.workspace("top_k", {rows, k}, DType::i32);
  cpu::run(op, {.bytes = double(x.nbytes() + ids.nbytes())}, x.dtype(), [&](auto z) {
    const auto* in = x.data<decltype(z)>();
    // NaN comes last.
    const auto value = [&in](int32_t i) { return in[i] == in[i] ? double(in[i]) : -HUGE_VAL; };
    std::vector<int32_t> order(static_cast<size_t>(cols));
    for (int64_t r = 0; r < rows; ++r, in += cols) {
      std::iota(order.begin(), order.end(), 0);
      std::ranges::stable_sort(order, std::greater(), value);  // of equals the first
      std::copy_n(order.begin(), k, ids.data<int32_t>() + r * k);
    }
  });
  return ids;
}

Tensor cast(Tape& tape, const Tensor& x, DType to, Loc at) {
  Op op(tape, "cast", at, {{"x", x}});
  Tensor y = op.output("cast", x.shape(), to);
  const double bytes = double(x.nbytes() + y.nbytes());
  op.run({.bytes = bytes}, [&] { y.copy_from(x); });
  op.backward([=, x = x.identity(), y = y.identity()](Op& op) {
    const Tensor dy = op.grad(y).to(master_dtype(x.dtype()), "cast_grad");
    write(op, op.accumulate(x), bytes, x.numel(), {},
          [&](auto z) { return values<Acc<decltype(z)>>(dy); });
  });
  return y;
}

}  // namespace pith
