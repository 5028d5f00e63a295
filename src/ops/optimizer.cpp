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

template <class T, class G, class V>
void adamw(const AdamW& rule, double scale, int64_t n, const G* grad, T* m, T* v, V* value,
           uint16_t* rest) {
  const T b1 = T(rule.beta1), b2 = T(rule.beta2), one_b1 = T(1 - rule.beta1),
          one_b2 = T(1 - rule.beta2);
  const T m_scale = T(1 / (1 - std::pow(rule.beta1, double(rule.step))));
  const T v_scale = T(1 / std::sqrt(1 - std::pow(rule.beta2, double(rule.step))));
  const T lr = T(rule.lr), eps = T(rule.eps), decay = T(rule.weight_decay), g_scale = T(scale);
  cpu::parallel_elements(n, [=](int64_t i) {
    const T g = T(grad[i]) * g_scale;
    m[i] = b1 * m[i] + one_b1 * g;
    v[i] = b2 * v[i] + one_b2 * g * g;
    const T step = m[i] * m_scale / (std::sqrt(v[i]) * v_scale + eps);
    if constexpr (std::is_same_v<V, bf16>) {
      float master = join_master(value[i].bits, rest[i]);
      master -= lr * (step + decay * master);
      value[i] = bf16(master);
      rest[i] = rest_of_master(master, value[i].bits);
    } else {
      value[i] -= lr * (step + decay * value[i]);
    }
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

Tensor sum_of_squares(Tape& tape, std::span<const Tensor> tensors, Loc at) {
  Op op(tape, "sum_of_squares", at, {});
  const int64_t n = int64_t(tensors.size());
  Tensor sums = op.workspace("squares", {n}, DType::f64);
  for (int64_t i = 0; i < n; ++i) {
    const Tensor& g = tensors[size_t(i)];
    Tensor sum = sums.row_range(i, i + 1);
    cpu::run(
        op, {.bytes = double(g.nbytes())}, g.dtype(),
        [&](auto z) { sum.data<double>()[0] = squares(g.data<decltype(z)>(), g.numel()); },
        [&](auto stream) {
          const Tensor parts = op.workspace("squares", {cuda::kSquareParts}, DType::f64);
          return cuda::sum_of_squares(g, parts, sum, stream);
        });
  }
  return sums;
}

Tensor clip_by_norm(Tape& tape, const Tensor& squares, double labels, double clip, Loc at) {
  Op op(tape, "clip_by_norm", at, {{"squares", squares}});
  op.require(squares.dtype() == DType::f64 && labels > 0, "squares must be fp64, labels positive");
  Tensor norm = op.workspace("norm", {2}, DType::f64);
  op.run(
      {.bytes = double(squares.nbytes())},
      [&] {
        const auto all = squares.span<double>();
        double* to = norm.data<double>();
        to[0] = std::sqrt(std::accumulate(all.begin(), all.end(), 0.0)) / labels;
        to[1] = (clip > 0 ? std::min(1.0, clip / (to[0] + 1e-6)) : 1.0) / labels;
      },
      [&](auto stream) { cuda::clip_by_norm(squares, labels, clip, norm, stream); });
  return norm;
}

void adamw_update(Tape& tape, const AdamW& rule, const Tensor& norm, const Tensor& grad, Tensor m,
                  Tensor v, Tensor value, Tensor rest, Loc at) {
  Op op(tape, "adamw_update", at,
        {{"norm", norm}, {"grad", grad}, {"m", m}, {"v", v}, {"value", value}});
  check_update(op, value, {grad.dtype() == value.dtype() ? m : grad, m, v});
  op.require(grad.shape() == value.shape(), "grad must be like the value");
  op.require(!rest == (value.dtype() != DType::bf16) && (!rest || rest.shape() == value.shape()),
             "a bf16 value needs the rest of its master, others have none");
  op.require(rule.step >= 1, "step counts from 1, not {}", rule.step);
  cpu::run(
      op, {.bytes = 5.0 * grad.nbytes() + 2.0 * (value.nbytes() + (rest ? rest.nbytes() : 0))},
      value.dtype(),
      [&](auto z) {
        using T = cpu::Acc<decltype(z)>;
        const double* scale = norm.data<double>();
        if (!std::isfinite(scale[0])) return;
        by_float(grad.dtype(), [&](auto g) {
          if constexpr (sizeof g <= sizeof(T))
            adamw(rule, scale[1], grad.numel(), grad.data<decltype(g)>(), m.data<T>(), v.data<T>(),
                  value.data<decltype(z)>(), rest ? rest.data<uint16_t>() : nullptr);
        });
      },
      [&](auto stream) { cuda::adamw_update(rule, norm, grad, m, v, value, rest, stream); });
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
