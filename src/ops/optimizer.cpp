#include "ops/optimizer.h"

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "ops/gemm.h"
#include "ops/simd.h"

namespace pith {
namespace {

// Calls f(T{}) for the type of a master weight.
template <class F> void by_master(DType t, F&& f) {
  if (t == DType::f64)
    f(double{});
  else
    f(float{});
}

void check_update(const Op& op, const Tensor& grad, std::initializer_list<Tensor> same,
                  const Tensor& value) {
  op.require(grad.dtype() == DType::f32 || grad.dtype() == DType::f64,
             "the gradient must be fp32 or fp64");
  for (const Tensor& t : same)
    op.require(t.shape() == grad.shape() && t.dtype() == grad.dtype(),
               "{} is not like the gradient {}", t.str(), grad.str());
  op.require(value.shape() == grad.shape(), "the value {} has another shape", value.str());
}

template <class T, class V>
void adamw(const AdamW& rule, int64_t n, const T* grad, T* m, T* v, T* master, V* value) {
  const T b1 = T(rule.beta1), b2 = T(rule.beta2), one_b1 = T(1 - rule.beta1),
          one_b2 = T(1 - rule.beta2);
  const T m_scale = T(1 / (1 - std::pow(rule.beta1, double(rule.step))));
  const T v_scale = T(1 / std::sqrt(1 - std::pow(rule.beta2, double(rule.step))));
  const T lr = T(rule.lr), eps = T(rule.eps), decay = T(rule.weight_decay),
          g_scale = T(rule.grad_scale);
#pragma omp parallel for simd if (n > 16384)
  for (int64_t i = 0; i < n; ++i) {
    const T g = grad[i] * g_scale;
    const T mi = b1 * m[i] + one_b1 * g, vi = b2 * v[i] + one_b2 * g * g;
    const T w =
        master[i] - lr * (mi * m_scale / (std::sqrt(vi) * v_scale + eps) + decay * master[i]);
    m[i] = mi;
    v[i] = vi;
    master[i] = w;
    value[i] = V(w);
  }
}

// A stack of matrices [batch, r, c]; a matrix [r, c] is a stack of one.
struct Stack {
  int64_t batch, r, c, small, area;
  explicit Stack(const Tensor& t)
      : batch(t.rank() == 3 ? t.dim(0) : 1),
        r(t.dim(t.rank() - 2)),
        c(t.dim(t.rank() - 1)),
        small(std::min(r, c)),
        area(r * c) {}
  // Few matrices are done one after the other by all threads, many at a time by one thread each.
  int64_t at_a_time() const {
    return batch >= omp_get_max_threads() ? std::min<int64_t>(batch, omp_get_max_threads()) : 1;
  }
  // Five iterations, each of the Gram matrix, its square and the product with the matrix.
  double flops() const { return 5.0 * batch * (4.0 * small * area + 2.0 * small * small * small); }
};

template <class T> struct Work { T *update, *next, *gram, *poly; };

// Scratch of one matrix at a time: two matrices and two squares of the smaller side.
Tensor work_space(Op& op, const Stack& s, DType dtype) {
  return op.workspace("muon_work", {s.at_a_time(), 2 * (s.area + s.small * s.small)}, dtype);
}
template <class T> Work<T> work_at(Tensor& space, const Stack& s, int64_t slot) {
  T* p = space.data<T>() + slot * space.dim(1);
  return {p, p + s.area, p + 2 * s.area, p + 2 * s.area + s.small * s.small};
}

template <class F> void for_each_matrix(const Stack& s, F&& f) {
  if (s.at_a_time() == 1)
    for (int64_t i = 0; i < s.batch; ++i) f(i, 0);
  else
    cpu::parallel_tasks(s.batch, [&](int64_t i) { f(i, omp_get_thread_num()); });
}

template <class T> double block_squares(const T* g, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += double(g[i]) * double(g[i]);
  return sum;
}

// In blocks of a fixed size, so that the order of additions does not depend on the number of
// threads.
template <class T> double squares(const T* g, int64_t n) {
  const int64_t block = 16384, blocks = (n + block - 1) / block;
  std::vector<double> sums(blocks);
#pragma omp parallel for if (blocks > 1)
  for (int64_t b = 0; b < blocks; ++b)
    sums[b] = block_squares(g + b * block, std::min(block, n - b * block));
  double sum = 0;
  for (double s : sums) sum += s;
  return sum;
}

// x / (|x| + 1e-7), then five times x = a x + (b G + c G^2) x with G = x x^T; for tall matrices G =
// x^T x from the right, which is the same with a smaller square.
template <class T> void orthogonalize(const Stack& s, T* x, const Work<T>& work) {
  const DType t = dtype_of<T>();
  const bool wide = s.r <= s.c;
  const int64_t k = s.small, n = k * k;
  const T scale = T(1 / (std::sqrt(squares(x, s.area)) + 1e-7));
#pragma omp parallel for simd if (s.area > 65536)
  for (int64_t i = 0; i < s.area; ++i) x[i] *= scale;
  T *from = x, *to = work.next;
  for (int iteration = 0; iteration < 5; ++iteration) {
    cpu::gemm(!wide, wide, k, k, wide ? s.c : s.r, from, from, t, work.gram, t, false);
    cpu::gemm(false, false, k, k, k, work.gram, work.gram, t, work.poly, t, false);
#pragma omp parallel for simd if (n > 65536)
    for (int64_t i = 0; i < n; ++i)
      work.poly[i] = T(-4.7750) * work.gram[i] + T(2.0315) * work.poly[i];
    for (int64_t i = 0; i < k; ++i) work.poly[i * k + i] += T(3.4445);
    if (wide)
      cpu::gemm(false, false, s.r, s.c, k, work.poly, from, t, to, t, false);
    else
      cpu::gemm(false, false, s.r, s.c, k, from, work.poly, t, to, t, false);
    std::swap(from, to);
  }
  std::copy_n(from, s.area, x);  // an odd number of iterations ends in the scratch
}

template <class T, class V>
void muon(const Muon& rule, const Stack& s, const T* grad, T* buf, T* master, V* value,
          const Work<T>& work) {
  const T g_scale = T(rule.grad_scale), momentum = T(rule.momentum), rest = T(1 - rule.momentum);
  T* update = work.update;
#pragma omp parallel for simd if (s.area > 16384)
  for (int64_t i = 0; i < s.area; ++i) {
    const T g = grad[i] * g_scale;
    buf[i] += rest * (g - buf[i]);
    update[i] = g + momentum * (buf[i] - g);
  }
  orthogonalize(s, update, work);
  const T keep = T(1 - rule.lr * rule.weight_decay);
  const T step = T(rule.lr * 0.2 * std::sqrt(double(std::max(s.r, s.c))));
#pragma omp parallel for simd if (s.area > 16384)
  for (int64_t i = 0; i < s.area; ++i) {
    const T w = master[i] * keep - step * update[i];
    master[i] = w;
    value[i] = V(w);
  }
}

}  // namespace

double sum_of_squares(Tape& tape, const Tensor& g, Loc at) {
  Op op(tape, "sum_of_squares", at, {{"g", g}});
  double sum = 0;
  op.run({.bytes = double(g.nbytes())}, [&] {
    by_float(g.dtype(), [&](auto z) { sum = squares(g.data<decltype(z)>(), g.numel()); });
  });
  return sum;
}

void adamw_update(Tape& tape, const AdamW& rule, const Tensor& grad, Tensor m, Tensor v,
                  Tensor master, Tensor value, Loc at) {
  Op op(tape, "adamw_update", at,
        {{"grad", grad}, {"m", m}, {"v", v}, {"master", master}, {"value", value}});
  check_update(op, grad, {m, v, master}, value);
  op.require(rule.step >= 1, "step counts from 1, not {}", rule.step);
  op.run({.bytes = 7.0 * grad.nbytes() + value.nbytes()}, [&] {
    by_master(grad.dtype(), [&](auto z) {
      by_float(value.dtype(), [&](auto y) {
        using T = decltype(z);
        adamw(rule, grad.numel(), grad.data<T>(), m.data<T>(), v.data<T>(), master.data<T>(),
              value.data<decltype(y)>());
      });
    });
  });
}

void muon_update(Tape& tape, const Muon& rule, const Tensor& grad, Tensor buf, Tensor master,
                 Tensor value, Loc at) {
  Op op(tape, "muon_update", at,
        {{"grad", grad}, {"buf", buf}, {"master", master}, {"value", value}});
  check_update(op, grad, {buf, master}, value);
  op.require(grad.rank() == 2 || grad.rank() == 3, "Muon updates matrices [r, c] or [b, r, c]");
  const Stack s(grad);
  Tensor space = work_space(op, s, grad.dtype());
  op.run({s.flops(), 5.0 * grad.nbytes() + value.nbytes()}, [&] {
    by_master(grad.dtype(), [&](auto z) {
      by_float(value.dtype(), [&](auto y) {
        using T = decltype(z);
        using V = decltype(y);
        for_each_matrix(s, [&](int64_t i, int64_t slot) {
          const int64_t o = i * s.area;
          muon(rule, s, grad.data<T>() + o, buf.data<T>() + o, master.data<T>() + o,
               value.data<V>() + o, work_at<T>(space, s, slot));
        });
      });
    });
  });
}

void newton_schulz(Tape& tape, Tensor x, Loc at) {
  Op op(tape, "newton_schulz", at, {{"x", x}});
  op.require(x.rank() == 3 && (x.dtype() == DType::f32 || x.dtype() == DType::f64),
             "x must be fp32 or fp64 [b, r, c]");
  const Stack s(x);
  Tensor space = work_space(op, s, x.dtype());
  op.run({s.flops(), 2.0 * x.nbytes()}, [&] {
    by_master(x.dtype(), [&](auto z) {
      using T = decltype(z);
      for_each_matrix(s, [&](int64_t i, int64_t slot) {
        orthogonalize(s, x.data<T>() + i * s.area, work_at<T>(space, s, slot));
      });
    });
  });
}

}  // namespace pith
