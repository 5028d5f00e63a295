#include "ops/optimizer.h"

#include "ops/gemm.h"
#include "ops/simd.h"

namespace pith {
namespace {

void check_update(const Op& op, const Tensor& value, std::initializer_list<Tensor> tensors) {
  const DType master = master_dtype(value.dtype());
  for (const Tensor& t : tensors)
    op.require(t.shape() == value.shape() && t.dtype() == master, "{} must be {}{} as the value {}",
               t.str(), name_of(master), value.shape().str(), value.str());
}

// In blocks of a fixed size, so that the order of additions does not depend on the number of
// threads.
template <class T> double squares(const T* g, int64_t n) {
  const int64_t block = 16384;
  std::vector<double> sums((n + block - 1) / block);
  cpu::parallel_rows(sums.size(), block, [&](int64_t b) {
    const T* from = g + b * block;
    const int64_t count = std::min(block, n - b * block);
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += double(from[i]) * double(from[i]);
    sums[b] = sum;
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

template <class T, class V>
void adamw(const AdamW& rule, int64_t n, const T* grad, T* m, T* v, T* master, V* value) {
  const T b1 = T(rule.beta1), b2 = T(rule.beta2), one_b1 = T(1 - rule.beta1),
          one_b2 = T(1 - rule.beta2);
  const T m_scale = T(1 / (1 - std::pow(rule.beta1, double(rule.step))));
  const T v_scale = T(1 / std::sqrt(1 - std::pow(rule.beta2, double(rule.step))));
  const T lr = T(rule.lr), eps = T(rule.eps), decay = T(rule.weight_decay),
          g_scale = T(rule.grad_scale);
  cpu::parallel_elements(n, [=](int64_t i) {
    const T g = grad[i] * g_scale;
    m[i] = b1 * m[i] + one_b1 * g;
    v[i] = b2 * v[i] + one_b2 * g * g;
    const T step = m[i] * m_scale / (std::sqrt(v[i]) * v_scale + eps);
    master[i] -= lr * (step + decay * master[i]);
    value[i] = V(master[i]);
  });
}

// A matrix [r, c] of a stack.
struct Matrix {
  int64_t r, c;
  int64_t small() const { return std::min(r, c); }
  // Scratch: two matrices and two squares of the smaller side, and room for the GPU's sums.
  int64_t work() const { return cuda::muon_work(r, c); }
  // Five iterations, each of the Gram matrix, its square and the product with the matrix.
  double flops() const { return 5.0 * small() * (4.0 * r * c + 2.0 * small() * small()); }
};

// x / (|x| + 1e-7), then five times x = a x + (b G + c G^2) x with G = x x^T; for tall matrices G =
// x^T x from the right, which is the same with a smaller square. The scratch `work` begins with x;
// returns where in it the result lies.
template <class T> const T* orthogonalize(const Matrix& s, T* work) {
  const DType t = dtype_of<T>();
  const bool wide = s.r <= s.c;
  const int64_t k = s.small(), area = s.r * s.c;
  T *x = work, *next = x + area, *gram = next + area, *poly = gram + k * k;
  const T scale = T(1 / (std::sqrt(squares(x, area)) + 1e-7));
  cpu::parallel_elements(area, [=](int64_t i) { x[i] *= scale; });
  for (int iteration = 0; iteration < 5; ++iteration) {
    cpu::gemm(!wide, wide, k, k, std::max(s.r, s.c), x, x, t, gram, t, false);
    cpu::gemm(false, false, k, k, k, gram, gram, t, poly, t, false);
    cpu::parallel_elements(
        k * k, [=](int64_t i) { poly[i] = T(-4.7750) * gram[i] + T(2.0315) * poly[i]; });
    for (int64_t i = 0; i < k; ++i) poly[i * k + i] += T(3.4445);
    cpu::gemm(false, false, s.r, s.c, k, wide ? poly : x, wide ? x : poly, t, next, t, false);
    std::swap(x, next);
  }
  return x;
}

template <class T, class V>
void muon(const Muon& rule, const Matrix& s, const T* grad, T* buf, T* master, V* value, T* work) {
  const T g_scale = T(rule.grad_scale), momentum = T(rule.momentum), rest = T(1 - rule.momentum);
  cpu::parallel_elements(s.r * s.c, [=](int64_t i) {
    const T g = grad[i] * g_scale;
    buf[i] += rest * (g - buf[i]);
    work[i] = g + momentum * (buf[i] - g);
  });
  const T* update = orthogonalize(s, work);
  const T keep = T(1 - rule.lr * rule.weight_decay);
  const T step = T(rule.lr * 0.2 * std::sqrt(double(std::max(s.r, s.c))));
  cpu::parallel_elements(s.r * s.c, [=](int64_t i) {
    master[i] = master[i] * keep - step * update[i];
    value[i] = V(master[i]);
  });
}

}  // namespace

double sum_of_squares(Tape& tape, const Tensor& g, Loc at) {
  Op op(tape, "sum_of_squares", at, {{"g", g}});
  double sum = 0;
  cpu::run(
      op, {.bytes = double(g.nbytes())}, g.dtype(),
      [&](auto z) { sum = squares(g.data<decltype(z)>(), g.numel()); },
      [&](auto stream) {
        const Tensor parts = op.workspace("squares", {cuda::kSquareParts}, DType::f64),
                     out = op.workspace("squares", {1}, DType::f64);
        cuda::sum_of_squares(g, parts, out, stream);
        sum = out.template to_vector<double>()[0];
      });
  return sum;
}

void adamw_update(Tape& tape, const AdamW& rule, const Tensor& grad, Tensor m, Tensor v,
                  Tensor master, Tensor value, Loc at) {
  Op op(tape, "adamw_update", at,
        {{"grad", grad}, {"m", m}, {"v", v}, {"master", master}, {"value", value}});
  check_update(op, value, {grad, m, v, master});
  op.require(rule.step >= 1, "step counts from 1, not {}", rule.step);
  cpu::run(
      op, {.bytes = 7.0 * grad.nbytes() + value.nbytes()}, value.dtype(),
      [&](auto z) {
        using T = cpu::Acc<decltype(z)>;
        adamw(rule, grad.numel(), grad.data<T>(), m.data<T>(), v.data<T>(), master.data<T>(),
              value.data<decltype(z)>());
      },
      [&](auto stream) { cuda::adamw_update(rule, grad, m, v, master, value, stream); });
}

void muon_update(Tape& tape, const Muon& rule, const Tensor& grad, Tensor buf, Tensor master,
                 Tensor value, Loc at) {
  Op op(tape, "muon_update", at,
        {{"grad", grad}, {"buf", buf}, {"master", master}, {"value", value}});
  check_update(op, value, {grad, buf, master});
  const int rank = grad.rank();
  op.require(rank == 2 || rank == 3, "Muon updates matrices [r, c] or [b, r, c]");
  const Matrix s{grad.dim(rank - 2), grad.dim(rank - 1)};
  // Matrices of a stack are done at a time by one thread each, on a GPU as many as fit into half a
  // gigabyte; a single one has all threads.
  const int64_t batch = rank == 3 ? grad.dim(0) : 1, room = (int64_t(1) << 27) / s.work();
  int64_t slots = 1;
  if (batch > 1)
    slots = op.on_gpu() ? std::clamp<int64_t>(room, 1, std::min<int64_t>(batch, 65535))
                        : omp_get_max_threads();
  Tensor work = op.workspace("muon_work", {slots, s.work()}, grad.dtype());
  cpu::run(
      op, {batch * s.flops(), 5.0 * grad.nbytes() + value.nbytes()}, value.dtype(),
      [&](auto z) {
        using T = cpu::Acc<decltype(z)>;
        cpu::parallel_tasks(batch, [&](int64_t i) {
          const int64_t at = i * s.r * s.c, slot = omp_get_thread_num();
          muon(rule, s, grad.data<T>() + at, buf.data<T>() + at, master.data<T>() + at,
               value.data<decltype(z)>() + at, work.data<T>() + slot * s.work());
        });
      },
      [&](auto stream) { cuda::muon_update(rule, grad, buf, master, value, work, stream); });
}

}  // namespace pith
