#include "ops/embedding.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/gemm.h"
#include "ops/simd.h"

namespace pith {
namespace {

using cpu::Acc;

// Every id below `end`, and from 0 on unless negative ones have a meaning.
void check_ids(const Op& op, const Tensor& ids, const char* what, int64_t end,
               bool negative_allowed) {
  if (ids.device() != Device::cpu) return;
  const auto values = ids.span<int32_t>();
  for (size_t t = 0; t < values.size(); ++t)
    if (values[t] >= end || (values[t] < 0 && !negative_allowed))
      op.reject(fmt::format("{} {} at position {} is outside the vocabulary [0, {})", what,
                            values[t], t, end));
}

// Counting sort: positions with id v are order[starts[v]] ... order[starts[v + 1] - 1], ascending.
void sort_by_id(const Tensor& ids, Tensor& starts, Tensor& order) {
  const auto id = ids.span<int32_t>();
  const auto start = starts.span<int32_t>();
  std::fill(start.begin(), start.end(), 0);
  for (int32_t v : id) ++start[v + 1];
  for (size_t v = 1; v < start.size(); ++v) start[v] += start[v - 1];
  for (size_t t = 0; t < id.size(); ++t) order.data<int32_t>()[start[id[t]]++] = int32_t(t);
  std::copy_backward(start.begin(), start.end() - 1,
                     start.end());  // each start had moved to the next one's place
  start[0] = 0;
}

template <class T>
void sum_by_id(const Tensor& dy, const Tensor& starts, const Tensor& order, Op::Into dw) {
  using A = Acc<T>;
  const int64_t vocabulary = dw.tensor.dim(0), h = dw.tensor.dim(1);
  const int32_t *start = starts.data<int32_t>(), *at = order.data<int32_t>();
  const T* from = dy.data<T>();
  A* grad = dw.tensor.data<A>();
#pragma omp parallel for schedule(dynamic, 64) if (dw.tensor.numel() > 16384)
  for (int64_t v = 0; v < vocabulary; ++v) {
    A* to = grad + v * h;
    if (!dw.add) std::fill_n(to, h, A(0));
    for (int64_t i = start[v]; i < start[v + 1]; ++i) {
      const T* row = from + at[i] * h;
#pragma omp simd
      for (int64_t j = 0; j < h; ++j) to[j] += A(row[j]);
    }
  }
}

// Rows of logits that are held at a time: enough for the GEMMs' full speed (the weight gradient's
// K), about 16 MB.
int64_t chunk_rows(int64_t rows, int64_t vocabulary) {
  const int64_t fitting = (int64_t(4) << 20) / std::max<int64_t>(vocabulary, 1) / 64 * 64;
  return std::min(rows, std::clamp<int64_t>(fitting, 256, 1024));
}

// The loss of one row; logits become exponentials. `grad`, unless null, receives softmax -
// onehot(label).
template <class T> Acc<T> cross_entropy_row(Acc<T>* logits, int64_t n, int32_t label, T* grad) {
  using A = Acc<T>;
  if (label < 0) {
    if (grad) std::fill_n(grad, n, T(0));
    return 0;
  }
  A max = -std::numeric_limits<A>::infinity(), sum = 0;
#pragma omp simd reduction(max : max)
  for (int64_t j = 0; j < n; ++j) max = logits[j] > max ? logits[j] : max;
  const A distance = max - logits[label];
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const A e = cpu::fast_exp(logits[j] - max);
    logits[j] = e;
    sum += e;
  }
  if (grad) {
    const A scale = 1 / sum, own = logits[label] * scale - 1;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) grad[j] = T(logits[j] * scale);
    grad[label] = T(own);
  }
  return std::log(sum) + distance;
}

struct Head {
  Tensor x, w, labels, token_loss;
  Tensor logits, dlogits;  // one chunk; dlogits is empty when no gradient is wanted
  Tensor dx;               // may be empty
  Op::Into dw;             // may be empty
};

template <class T> void head_chunk(Head& head, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t rows = end - begin, h = head.x.dim(1), v = head.w.dim(0);
  const DType narrow = dtype_of<T>(), wide = dtype_of<A>();
  const Tensor x = head.x.row_range(begin, end);
  A* logits = head.logits.data<A>();
  cpu::gemm(false, true, rows, v, h, x.raw(), head.w.raw(), narrow, logits, wide, false);
  T* dlogits = head.dlogits ? head.dlogits.data<T>() : nullptr;
  const int32_t* labels = head.labels.data<int32_t>() + begin;
  A* loss = head.token_loss.data<A>() + begin;
#pragma omp parallel for if (rows * v > 4096)
  for (int64_t t = 0; t < rows; ++t)
    loss[t] =
        cross_entropy_row<T>(logits + t * v, v, labels[t], dlogits ? dlogits + t * v : nullptr);
  if (head.dx)
    cpu::gemm(false, false, rows, h, v, dlogits, head.w.raw(), narrow,
              head.dx.row_range(begin, end).raw(), narrow, false);
  if (head.dw)
    cpu::gemm(true, false, v, h, rows, dlogits, x.raw(), narrow, head.dw.tensor.raw(), wide,
              head.dw.add || begin > 0);
}

template <class T> void run_head(Head& head, int64_t chunk, Tensor& sum) {
  const int64_t rows = head.x.dim(0);
  for (int64_t begin = 0; begin < rows; begin += chunk)
    head_chunk<T>(head, begin, std::min(rows, begin + chunk));
  if (rows == 0 && head.dw && !head.dw.add) head.dw.tensor.fill_zero();
  double total = 0;
  for (const auto loss : head.token_loss.span<Acc<T>>()) total += loss;
  sum.data<Acc<T>>()[0] = Acc<T>(total);
}

// The gradients were made for a seed of 1; another one multiplies that of x.
void head_backward(Op& op, const Tensor& seed, const Tensor& x, Tensor dx, const Param& w,
                   bool dw_made) {
  const double factor = seed.device() == Device::cpu ? seed.to_vector<double>()[0] : 1.0;
  if (factor != 1.0) {
    op.require(!dw_made,
               "the gradient of sum must be 1, not {}: that of {} was made in the forward", factor,
               w.name);
    op.run({.bytes = 2.0 * dx.nbytes()}, [&] {
      by_float(dx.dtype(), [&](auto z) {
        using T = decltype(z);
        for (T& d : dx.span<T>()) d = T(Acc<T>(d) * Acc<T>(factor));
      });
    });
  }
  op.give(x, dx);
}

}  // namespace

Tensor embedding(Tape& tape, const Tensor& ids, Param& w, Loc at) {
  Op op(tape, "embedding", at, {{"ids", ids}, {"w", w.value}});
  op.require(ids.rank() == 1 && ids.dtype() == DType::i32, "ids must be int32 [T]");
  op.require(w.value.rank() == 2, "w must be [V, H]");
  const int64_t rows = ids.dim(0), vocabulary = w.value.dim(0), h = w.value.dim(1);
  check_ids(op, ids, "token id", vocabulary, false);
  Tensor y = op.output("y", {rows, h}, w.value.dtype());
  op.run({.bytes = 2.0 * y.nbytes()}, [&] {
    const size_t size = cpu::offset_bytes(y.dtype(), h);
    const auto* from = static_cast<const std::byte*>(w.value.raw());
    auto* to = static_cast<std::byte*>(y.raw());
    const int32_t* id = ids.data<int32_t>();
#pragma omp parallel for if (y.nbytes() > 131072)
    for (int64_t t = 0; t < rows; ++t) std::memcpy(to + t * size, from + id[t] * size, size);
  });
  op.backward([y = y.identity(), ids, &w, rows, vocabulary](Op& op) {
    const auto dw = op.accumulate(w);
    if (!dw) return;
    const Tensor dy = op.grad(y);
    Tensor starts = op.workspace("id_starts", {vocabulary + 1}, DType::i32);
    Tensor order = op.workspace("id_order", {rows}, DType::i32);
    op.run({.bytes = double(dy.nbytes() + dw.tensor.nbytes())}, [&] {
      sort_by_id(ids, starts, order);
      by_float(dy.dtype(), [&](auto z) { sum_by_id<decltype(z)>(dy, starts, order, dw); });
    });
  });
  return y;
}

HeadLoss head_loss(Tape& tape, const Tensor& x, Param& w, const Tensor& labels, Loc at) {
  Op op(tape, "head_loss", at, {{"x", x}, {"w", w.value}, {"labels", labels}});
  op.require(x.rank() == 2 && w.value.rank() == 2 && x.dim(1) == w.value.dim(1),
             "x must be [T, H] and w [V, H]");
  op.require(x.dtype() == w.value.dtype(), "x and w must have one dtype");
  op.require(labels.dtype() == DType::i32 && labels.shape() == Shape{x.dim(0)},
             "labels must be int32[{}]", x.dim(0));
  const int64_t rows = x.dim(0), vocabulary = w.value.dim(0), chunk = chunk_rows(rows, vocabulary);
  check_ids(op, labels, "label", vocabulary, true);
  const DType wide = master_dtype(x.dtype());
  // Only the sum can carry a gradient.
  HeadLoss out{op.output("loss", {1}, wide), op.workspace("token_loss", {rows}, wide)};
  Head head{x,  w.value, labels, out.token_loss, op.workspace("logits", {chunk, vocabulary}, wide),
            {}, {},      {}};
  if (op.recording()) head.dw = op.accumulate(w);
  if (op.wants(x)) head.dx = op.workspace("head_dx", x.shape(), x.dtype());
  if (head.dw || head.dx)
    head.dlogits =
        x.dtype() == wide ? head.logits : op.workspace("dlogits", {chunk, vocabulary}, x.dtype());
  const double products = 1.0 + bool(head.dx) + bool(head.dw), weights = w.value.numel();
  op.run(
      {2.0 * products * rows * weights,
       products * (x.nbytes() + w.value.nbytes()) + 2.0 * rows * vocabulary * 4},
      [&] { by_float(x.dtype(), [&](auto z) { run_head<decltype(z)>(head, chunk, out.sum); }); });
  if (head.dx)
    op.backward(
        [sum = out.sum.identity(), x = x.identity(), dx = head.dx, &w,
         dw_made = bool(head.dw)](Op& op) { head_backward(op, op.grad(sum), x, dx, w, dw_made); });
  return out;
}

}  // namespace pith
