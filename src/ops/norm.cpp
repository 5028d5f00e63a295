#include "ops/norm.h"

#include <algorithm>
#include <cmath>

#include "ops/simd.h"

namespace pith {
namespace {

using cpu::Acc;

// Rows per partial sum of the weight gradient: depends on the rows alone, so that the result does
// not depend on the number of threads.
int64_t rows_per_part(int64_t rows) { return std::max<int64_t>(32, (rows + 63) / 64); }

template <class T> struct Forward {
  const T *x, *delta;  // delta may be null: then sum is not written
  const T* w;
  T *sum, *y;
  Acc<T>* rstd;  // may be null
};

template <class T> void forward_row(const Forward<T>& f, int64_t row, int64_t h, Acc<T> eps) {
  using A = Acc<T>;
  const T* x = f.x + row * h;
  A squares = 0;
  if (f.delta) {
    const T* delta = f.delta + row * h;
    T* sum = f.sum + row * h;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < h; ++j) {
      const T s = T(A(x[j]) + A(delta[j]));
      sum[j] = s;
      squares += A(s) * A(s);
    }
    x = sum;
  } else {
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < h; ++j) squares += A(x[j]) * A(x[j]);
  }
  const A rstd = A(1) / std::sqrt(squares / A(h) + eps);
  if (f.rstd) f.rstd[row] = rstd;
  T* y = f.y + row * h;
#pragma omp simd
  for (int64_t j = 0; j < h; ++j) y[j] = T(A(T(A(x[j]) * rstd)) * A(f.w[j]));
}

template <class T> struct Target {
  T* to = nullptr;
  bool add = false;
  explicit Target(const Op::Into& into)
      : to(into ? const_cast<Tensor&>(into.tensor).data<T>() : nullptr), add(into.add) {}
};

template <class T> struct Backward {
  const T *x, *dy, *dsum, *w;  // dsum may be null
  const Acc<T>* rstd;
  Target<T> dx, ddelta;
};

template <class T, class F>
void store_row(const Target<T>& target, int64_t row, int64_t h, F&& value) {
  if (!target.to) return;
  T* to = target.to + row * h;
  if (target.add) {
#pragma omp simd
    for (int64_t j = 0; j < h; ++j) to[j] = T(Acc<T>(to[j]) + value(j));
  } else {
#pragma omp simd
    for (int64_t j = 0; j < h; ++j) to[j] = T(value(j));
  }
}

// With n = x rstd and dn = dy w: dx = rstd (dn - n mean(dn n)) + dsum, and dw += dy n.
template <class T> void backward_row(const Backward<T>& b, int64_t row, int64_t h, Acc<T>* dw) {
  using A = Acc<T>;
  const T *x = b.x + row * h, *dy = b.dy + row * h, *w = b.w;
  const A rstd = b.rstd[row];
  A dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t j = 0; j < h; ++j) {
    const A n = A(x[j]) * rstd;
    dot += A(dy[j]) * A(w[j]) * n;
    dw[j] += A(dy[j]) * A(T(n));  // the weight saw the rounded value
  }
  const A scale = rstd * rstd * dot / A(h);
  const auto store = [&](auto&& extra) {
    const auto value = [&](int64_t j) {
      return A(dy[j]) * A(w[j]) * rstd - A(x[j]) * scale + extra(j);
    };
    store_row(b.dx, row, h, value);
    store_row(b.ddelta, row, h, value);
  };
  if (b.dsum)
    store([dsum = b.dsum + row * h](int64_t j) { return A(dsum[j]); });
  else
    store([](int64_t) { return A(0); });
}

template <class T>
void backward_all(const Backward<T>& b, Tensor& partial, int64_t rows, int64_t h) {
  using A = Acc<T>;
  const int64_t step = rows_per_part(rows), parts = partial.dim(0);
#pragma omp parallel for if (rows * h > 16384)
  for (int64_t p = 0; p < parts; ++p) {
    A* dw = partial.data<A>() + p * h;
    std::fill_n(dw, h, A(0));
    for (int64_t row = p * step; row < std::min(rows, (p + 1) * step); ++row)
      backward_row(b, row, h, dw);
  }
}

template <class A> void sum_parts(const Tensor& partial, Op::Into dw) {
  const int64_t parts = partial.dim(0), h = partial.dim(1);
  A* to = dw.tensor.data<A>();
  if (!dw.add) std::fill_n(to, h, A(0));
  for (int64_t p = 0; p < parts; ++p) {
    const A* from = partial.data<A>() + p * h;
#pragma omp simd
    for (int64_t j = 0; j < h; ++j) to[j] += from[j];
  }
}

void norm_backward(Op& op, const Tensor& x, const Tensor& dy, const Tensor& dsum,
                   const Tensor& rstd, Param& w, Op::Into dx, Op::Into ddelta) {
  const int64_t rows = x.dim(0), h = x.dim(1), step = rows_per_part(rows);
  Tensor partial = op.workspace("dw_partial", {(rows + step - 1) / step, h}, rstd.dtype());
  const Op::Into dw = op.accumulate(w);
  const double passes = 2.0 + bool(dsum) + (dx ? 1 + dx.add : 0) + (ddelta ? 1 + ddelta.add : 0);
  op.run({.bytes = passes * x.nbytes()}, [&] {
    by_float(x.dtype(), [&](auto z) {
      using T = decltype(z);
      backward_all<T>({x.data<T>(), dy.data<T>(), dsum ? dsum.data<T>() : nullptr,
                       w.value.data<T>(), rstd.data<Acc<T>>(), Target<T>(dx), Target<T>(ddelta)},
                      partial, rows, h);
      if (dw) sum_parts<Acc<T>>(partial, dw);
    });
  });
}

AddNorm norm(Tape& tape, const char* name, const Tensor& x, const Tensor& delta, Param& w,
             float eps, Loc at) {
  Op op(tape, name, at, {{"x", x}, {"delta", delta ? delta : x}, {"w", w.value}});
  op.require(x.rank() == 2, "x must be [T, H]");
  op.require(!delta || (delta.shape() == x.shape() && delta.dtype() == x.dtype()),
             "delta must be like x");
  op.require(w.value.shape() == Shape{x.dim(1)} && w.value.dtype() == x.dtype(), "w must be {}[{}]",
             name_of(x.dtype()), x.dim(1));
  const int64_t rows = x.dim(0), h = x.dim(1);
  AddNorm out{op.output("y", x.shape(), x.dtype()),
              delta ? op.output("sum", x.shape(), x.dtype()) : x};
  Tensor rstd;
  if (op.recording()) rstd = op.workspace("rstd", {rows}, master_dtype(x.dtype()));
  op.run({.bytes = (delta ? 4.0 : 2.0) * x.nbytes()}, [&] {
    by_float(x.dtype(), [&](auto z) {
      using T = decltype(z);
      const Forward<T> f{x.data<T>(),       delta ? delta.data<T>() : nullptr,
                         w.value.data<T>(), delta ? out.sum.data<T>() : nullptr,
                         out.y.data<T>(),   rstd ? rstd.data<Acc<T>>() : nullptr};
#pragma omp parallel for if (rows * h > 16384)
      for (int64_t row = 0; row < rows; ++row) forward_row(f, row, h, Acc<T>(eps));
    });
  });
  op.backward([x = x.identity(), delta = delta.identity(), has_delta = bool(delta),
               y = out.y.identity(), sum = out.sum, rstd, &w](Op& op) {
    const Tensor dy = op.grad(y), dsum = has_delta ? op.grad(sum) : Tensor();
    norm_backward(op, sum, dy, dsum, rstd, w, op.accumulate(x),
                  has_delta ? op.accumulate(delta) : Op::Into());
  });
  return out;
}

}  // namespace

Tensor rms_norm(Tape& tape, const Tensor& x, Param& w, float eps, Loc at) {
  return norm(tape, "rms_norm", x, {}, w, eps, at).y;
}

AddNorm add_rms_norm(Tape& tape, const Tensor& x, const Tensor& delta, Param& w, float eps,
                     Loc at) {
  return norm(tape, "add_rms_norm", x, delta, w, eps, at);
}

}  // namespace pith
