#include "ops/basic.h"

#include "ops/gemm.h"
#include "ops/simd.h"

namespace pith {
namespace {

// One term of a result: its element of y is the sum of f(element of a, element of b). An element of
// -1 stands for zero.
struct Term {
  int64_t y, a, b = -1;
};

// All loops but matmul's and top_k's, in fp64: y is the sum of the terms where(0) ... where(n - 1),
// where f gives {f(a, b), its derivative by a, by b}; b may be empty.
template <class W, class F>
Tensor combine(Op& op, const char* name, const Tensor& a, const Tensor& b, Shape shape, int64_t n,
               W where, F f) {
  // to = the sum of f(...)[part], times dy if there is one
  const auto write = [=](Op& op, Tensor to, int part, const Tensor& dy) {
    op.run({.bytes = double(a.nbytes() + (b ? b.nbytes() : 0) + to.nbytes())}, [&] {
      const auto values = [](const Tensor& t) {
        return t ? t.to_vector<double>() : std::vector<double>();
      };
      const std::vector<double> of_a = values(a), of_b = values(b), g = values(dy);
      std::vector<double> sums(size_t(to.numel()));
      // As many terms as results: each has its own.
#pragma omp parallel for if (part == 0 && n == to.numel() && n > 16384)
      for (int64_t i = 0; i < n; ++i) {
        const Term t = where(i);
        const int64_t place = part == 0 ? t.y : part == 1 ? t.a : t.b;
        if (place < 0) continue;
        const double value = f(t.a < 0 ? 0 : of_a[t.a], t.b < 0 ? 0 : of_b[t.b])[part];
        sums[place] += dy ? value * g[t.y] : value;
      }
      to.copy_from(Tensor::of<double>(to.shape(), sums));
    });
  };
  Tensor y = op.output(name, shape, a.dtype());
  write(op, y, 0, {});
  op.backward([=, y = y.identity()](Op& op) {
    const Tensor dy = op.grad(y);
    for (const int part : {1, 2}) {
      const Tensor& x = part == 1 ? a : b;
      if (!op.wants(x)) continue;
      const Tensor dx = op.workspace(name, x.shape(), x.dtype());
      write(op, dx, part, dy);
      op.give(x, dx);
    }
  });
  return y;
}

using Values = std::array<double, 3>;
Values sum_of(double a, double b) { return {a + b, 1, 1}; }

void require_one_dtype(const Op& op, const Tensor& a, const Tensor& b) {
  op.require(a.dtype() == b.dtype(), "a and b must have one dtype: cast one of them");
}

// The element of b, in one of the forms that broadcast, that meets element i of a.
auto broadcast(const Op& op, const Tensor& a, const Tensor& b) {
  require_one_dtype(op, a, b);
  const int64_t cols = a.cols();
  const bool same = b.shape() == a.shape(), one = b.numel() == 1,
             row = b.shape() == Shape{cols} || b.shape() == Shape{1, cols};
  op.require(same || one || row || b.shape() == Shape{a.rows(), 1},
             "b must have the shape of a, one row [{}], one column [{}, 1] or [1]", cols, a.rows());
  return [=](int64_t i) { return same ? i : one ? 0 : row ? i % cols : i / cols; };
}

template <class F>
Tensor binary(Tape& tape, const char* name, const Tensor& a, const Tensor& b, Loc at, F f) {
  Op op(tape, name, at, {{"a", a}, {"b", b}});
  const auto of_b = broadcast(op, a, b);
  const auto place = [=](int64_t i) { return Term{i, i, of_b(i)}; };
  return combine(op, name, a, b, a.shape(), a.numel(), place, f);
}

template <class F> Tensor unary(Tape& tape, const char* name, const Tensor& x, Loc at, F f) {
  Op op(tape, name, at, {{"x", x}});
  const auto place = [](int64_t i) { return Term{i, i}; };
  return combine(op, name, x, {}, x.shape(), x.numel(), place,
                 [f](double v, double) { return f(v); });
}

// y whose elements are sums of those of x: where(i) is {element of y, element of x}.
template <class W>
Tensor move(Op& op, const char* name, const Tensor& x, Shape shape, int64_t n, W where) {
  return combine(op, name, x, {}, shape, n, where, sum_of);
}

}  // namespace

Tensor add(Tape& tape, const Tensor& a, const Tensor& b, Loc at) {
  return binary(tape, "add", a, b, at, sum_of);
}

Tensor sub(Tape& tape, const Tensor& a, const Tensor& b, Loc at) {
  return binary(tape, "sub", a, b, at, [](double x, double y) { return Values{x - y, 1, -1}; });
}

Tensor mul(Tape& tape, const Tensor& a, const Tensor& b, Loc at) {
  return binary(tape, "mul", a, b, at, [](double x, double y) { return Values{x * y, y, x}; });
}

Tensor div(Tape& tape, const Tensor& a, const Tensor& b, Loc at) {
  return binary(tape, "div", a, b, at, [](double x, double y) {
    return Values{x / y, 1 / y, -x / (y * y)};
  });
}

Tensor exp(Tape& tape, const Tensor& x, Loc at) {
  return unary(tape, "exp", x, at, [](double v) { return Values{std::exp(v), std::exp(v)}; });
}

Tensor log(Tape& tape, const Tensor& x, Loc at) {
  return unary(tape, "log", x, at, [](double v) { return Values{std::log(v), 1 / v}; });
}

Tensor sigmoid(Tape& tape, const Tensor& x, Loc at) {
  return unary(tape, "sigmoid", x, at, [](double v) {
    const double s = cpu::sigmoid_of(v);
    return Values{s, s * (1 - s)};
  });
}

Tensor softmax(Tape& t, const Tensor& x, Loc at) {
  // The same for every row minus its largest, which keeps exp from overflowing.
  const Tensor top = gather_cols(t, x, top_k(t, x, 1, at), at), e = exp(t, sub(t, x, top, at), at);
  return div(t, e, sum(t, e, 1, at), at);
}

Tensor sum(Tape& tape, const Tensor& x, int dim, Loc at) {
  Op op(tape, "sum", at, {{"x", x}});
  const int64_t cols = x.cols();
  const auto place = [=](int64_t i) { return Term{dim == 0 ? i % cols : i / cols, i}; };
  return move(op, "sum", x, dim == 0 ? Shape{1, cols} : Shape{x.rows(), 1}, x.numel(), place);
}

Tensor mean(Tape& tape, const Tensor& x, Loc at) {
  Op op(tape, "mean", at, {{"x", x}});
  const double share = 1.0 / double(x.numel());
  const auto place = [](int64_t i) { return Term{0, i}; };
  const auto term = [share](double v, double) { return Values{share * v, share}; };
  return combine(op, "mean", x, {}, {1}, x.numel(), place, term);
}

// to = op(a) op(b)
static Tensor product(Op& op, bool trans_a, bool trans_b, const Tensor& a, const Tensor& b,
                      Tensor to) {
  const int64_t m = to.dim(0), n = to.dim(1), k = a.dim(trans_a ? 0 : 1);
  const double bytes = double(a.nbytes() + b.nbytes() + to.nbytes());
  op.run({2.0 * double(m) * double(n) * double(k), bytes}, [&] {
    cpu::gemm(trans_a, trans_b, m, n, k, a.raw(), b.raw(), a.dtype(), to.raw(), to.dtype(), false);
  });
  return to;
}

Tensor matmul(Tape& tape, const Tensor& a, const Tensor& b, Loc at) {
  Op op(tape, "matmul", at, {{"a", a}, {"b", b}});
  op.require(a.rank() == 2 && b.rank() == 2 && a.dim(1) == b.dim(0),
             "a [m, k] and b [k, n] must share k");
  require_one_dtype(op, a, b);
  Tensor y = op.output("matmul", {a.dim(0), b.dim(1)}, a.dtype());
  product(op, false, false, a, b, y);
  op.backward([=, y = y.identity()](Op& op) {
    const Tensor dy = op.grad(y);
    const auto grad = [&](const Tensor& x) { return op.workspace("dx", x.shape(), x.dtype()); };
    if (op.wants(a)) op.give(a, product(op, false, true, dy, b, grad(a)));
    if (op.wants(b)) op.give(b, product(op, true, false, a, dy, grad(b)));
  });
  return y;
}

Tensor transpose(Tape& tape, const Tensor& x, Loc at) {
  Op op(tape, "transpose", at, {{"x", x}});
  op.require(x.rank() == 2, "x must be a matrix");
  const int64_t rows = x.dim(0), cols = x.dim(1);
  const auto place = [=](int64_t i) { return Term{i % cols * rows + i / cols, i}; };
  return move(op, "transpose", x, {cols, rows}, x.numel(), place);
}

Tensor slice(Tape& tape, const Tensor& x, int dim, int64_t begin, int64_t end, Loc at) {
  Op op(tape, "slice", at, {{"x", x}});
  const int64_t rows = x.rows(), cols = x.cols(), size = dim == 0 ? rows : cols;
  op.require(0 <= begin && begin <= end && end <= size, "{} [{}, {}) of {}",
             dim == 0 ? "rows" : "columns", begin, end, size);
  const Shape shape = dim == 0 ? Shape{end - begin, cols} : Shape{rows, end - begin};
  const int64_t first = dim == 0 ? begin * cols : begin, width = shape[1];
  const auto place = [=](int64_t i) { return Term{i, first + i / width * cols + i % width}; };
  return move(op, "slice", x, shape, shape.numel(), place);
}

Tensor concat(Tape& tape, const Tensor& a, const Tensor& b, int dim, Loc at) {
  Op op(tape, "concat", at, {{"a", a}, {"b", b}});
  op.require(dim == 0 ? a.cols() == b.cols() : a.rows() == b.rows(), "a and b must have as many {}",
             dim == 0 ? "columns" : "rows");
  require_one_dtype(op, a, b);
  // Runs of a and b in turn: rows, or one run of each.
  const int64_t of_a = dim == 0 ? a.numel() : a.cols(), of_b = dim == 0 ? b.numel() : b.cols();
  const Shape shape =
      dim == 0 ? Shape{a.rows() + b.rows(), a.cols()} : Shape{a.rows(), a.cols() + b.cols()};
  const auto place = [=](int64_t i) {
    const int64_t run = i / (of_a + of_b), at = i % (of_a + of_b);
    return at < of_a ? Term{i, run * of_a + at} : Term{i, -1, run * of_b + at - of_a};
  };
  return combine(op, "concat", a, b, shape, shape.numel(), place, sum_of);
}

Tensor where(Tape& tape, const Tensor& mask_u8, const Tensor& a, const Tensor& b, Loc at) {
  Op op(tape, "where", at, {{"mask", mask_u8}, {"a", a}, {"b", b}});
  op.require(mask_u8.dtype() == DType::u8 && mask_u8.numel() == a.numel(),
             "the mask must be uint8, as large as a");
  const auto of_b = broadcast(op, a, b);
  const auto place = [=](int64_t i) {
    return mask_u8.data<uint8_t>()[i] ? Term{i, i} : Term{i, -1, of_b(i)};
  };
  return combine(op, "where", a, b, a.shape(), a.numel(), place, sum_of);
}

Tensor gather_cols(Tape& tape, const Tensor& x, const Tensor& index, Loc at) {
  Op op(tape, "gather_cols", at, {{"x", x}, {"index", index}});
  op.require(index.dtype() == DType::i32 && index.rank() == 2 && index.dim(0) == x.rows(),
             "index must be int32[{}, k]", x.rows());
  const int64_t cols = x.cols(), k = index.dim(1);
  if (index.device() == Device::cpu)
    for (const int32_t column : index.span<int32_t>())
      op.require(0 <= column && column < cols, "index {} is outside {} columns", column, cols);
  const auto place = [=](int64_t i) { return Term{i, i / k * cols + index.data<int32_t>()[i]}; };
  return move(op, "gather_cols", x, index.shape(), index.numel(), place);
}

Tensor top_k(Tape& tape, const Tensor& x, int64_t k, Loc at) {
  Op op(tape, "top_k", at, {{"x", x}});
  const int64_t rows = x.rows(), cols = x.cols();
  op.require(0 <= k && k <= cols, "the best {} of {} columns", k, cols);
  Tensor ids = op.workspace("top_k", {rows, k}, DType::i32);
  op.run({.bytes = double(x.nbytes() + ids.nbytes())}, [&] {
    const std::vector<double> values = x.to_vector<double>();
    const double* in = values.data();
    // NaN comes last.
    const auto value = [&in](int32_t i) { return in[i] == in[i] ? in[i] : -HUGE_VAL; };
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
  op.run({.bytes = double(x.nbytes() + y.nbytes())}, [&] { y.copy_from(x); });
  op.backward([x = x.identity(), y = y.identity()](Op& op) {
    op.give(x, op.grad(y).to(x.dtype(), "cast_grad"));
  });
  return y;
}

}  // namespace pith
