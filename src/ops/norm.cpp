#include "ops/norm.h"

#include "ops/simd.h"

namespace pith {
using cpu::Acc;

// Rows per partial sum of the weight gradient: fixed, so that the result does not depend on the
// number of threads.
constexpr int64_t kPartRows = 64;

template <class T>
static void forward(const Tensor& x, const Tensor& delta, const Tensor& w, AddNorm& out,
                    Tensor rstd, float eps) {
  using A = Acc<T>;
  const int64_t h = x.dim(1);
  const T *in = x.data<T>(), *added = delta ? delta.data<T>() : nullptr, *weight = w.data<T>();
  T *sums = out.sum.data<T>(), *normed = out.y.data<T>();
  A* rstds = rstd.data<A>();
  cpu::parallel_rows(x.dim(0), h, [=](int64_t row) {
    T* sum = sums + row * h;
    if (added)
      cpu::store(sum, false, h,
                 [a = in + row * h, b = added + row * h](int64_t j) { return A(a[j]) + A(b[j]); });
    A squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < h; ++j) squares += A(sum[j]) * A(sum[j]);
    const A r = rstds[row] = A(1) / std::sqrt(squares / A(h) + A(eps));
    cpu::store(normed + row * h, false, h,
               [=](int64_t j) { return A(T(A(sum[j]) * r)) * A(weight[j]); });
  });
}

// With n = x rstd and dn = dy w: the gradient of x, here the sum, and of everything added to it is
// rstd (dn - n mean(dn n)) + dsum; dw += dy n, one row of `parts` for every kPartRows.
template <class T>
static void backward(const Tensor& x, const Tensor& dy, const Tensor& dsum, const Tensor& w,
                     const Tensor& rstd, std::span<Op::Into> grads, Tensor& parts) {
  using A = Acc<T>;
  const int64_t h = x.dim(1);
  cpu::parallel_rows(parts.dim(0), kPartRows * h, [&](int64_t part) {
    A* dw = parts.data<A>() + part * h;
    std::fill_n(dw, h, A(0));
    for (int64_t row = part * kPartRows; row < std::min(x.dim(0), (part + 1) * kPartRows); ++row) {
      const T *in = x.data<T>() + row * h, *g = dy.data<T>() + row * h, *weight = w.data<T>(),
              *extra = dsum ? dsum.data<T>() + row * h : nullptr;
      const A r = rstd.data<A>()[row];
      A dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t j = 0; j < h; ++j) {
        const A n = A(in[j]) * r;
        dot += A(g[j]) * A(weight[j]) * n;
        dw[j] += A(g[j]) * A(T(n));  // the weight saw the rounded value
      }
      const A scale = r * r * dot / A(h);
      for (Op::Into& to : grads)
        if (to)
          cpu::store(to.tensor.data<T>() + row * h, to.add, h, [=](int64_t j) {
            return A(g[j]) * A(weight[j]) * r - A(in[j]) * scale + (extra ? A(extra[j]) : A(0));
          });
    }
  });
}

AddNorm add_rms_norm(Tape& tape, const Tensor& x, const Tensor& delta, Param& w, float eps,
                     Loc at) {
  Op op(tape, "add_rms_norm", at, {{"x", x}, {"delta", delta ? delta : x}, {"w", w.value}});
  op.require(x.rank() == 2, "x must be [T, H]");
  op.require(!delta || (delta.shape() == x.shape() && delta.dtype() == x.dtype()),
             "delta must be like x");
  op.require(w.value.shape() == Shape{x.dim(1)} && w.value.dtype() == x.dtype(), "w must be {}[{}]",
             name_of(x.dtype()), x.dim(1));
  AddNorm out{op.output("y", x.shape(), x.dtype()),
              delta ? op.output("sum", x.shape(), x.dtype()) : x};
  Tensor rstd = op.workspace("rstd", {x.dim(0)}, master_dtype(x.dtype()));
  const auto norm = [=, w = w.value](Op& op, const Tensor& x, const Tensor& delta, AddNorm out) {
    cpu::run(
        op, {.bytes = (delta ? 4.0 : 2.0) * x.nbytes()}, x.dtype(),
        [&](auto z) { forward<decltype(z)>(x, delta, w, out, rstd, eps); },
        [&](auto stream) { cuda::add_rms_norm(x, delta, w, out, rstd, eps, stream); });
  };
  norm(op, x, delta, out);
  op.recompute(op.context().recompute.norm, false, out.y,
               [norm, sum = out.sum](Op& op, const Tensor& y) {
                 norm(op, sum, {}, {y, sum});
               });
  op.backward([x = x.identity(), delta = delta.identity(), has_delta = bool(delta),
               y = out.y.identity(), sum = out.sum, rstd, &w](Op& op) {
    const Tensor dy = op.grad(y), dsum = has_delta ? op.grad(sum) : Tensor();
    Op::Into grads[] = {op.accumulate(x), op.accumulate(delta)};
    const int64_t count =
        op.on_gpu() ? cuda::norm_parts(x.dim(0)) : (x.dim(0) + kPartRows - 1) / kPartRows;
    Tensor parts = op.workspace("dw_parts", {count, x.dim(1)}, rstd.dtype());
    const Op::Into dw = op.accumulate(w);
    const double passes = 3.0 + 2 * has_delta + grads[0].add + grads[1].add;
    op.run(
        {.bytes = passes * sum.nbytes()},
        [&] {
          by_float(sum.dtype(), [&](auto z) {
            backward<decltype(z)>(sum, dy, dsum, w.value, rstd, grads, parts);
          });
          if (dw) cpu::add_rows(parts, nullptr, dw);
        },
        [&](auto stream) {
          cuda::add_rms_norm_backward(sum, dy, dsum, w.value, rstd, grads[0], grads[1], dw, parts,
                                      stream);
        });
  });
  return out;
}

}  // namespace pith
