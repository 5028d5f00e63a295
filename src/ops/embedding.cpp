#include "ops/embedding.h"

#include "ops/gemm.h"
#include "ops/simd.h"

namespace pith {
namespace {

using cpu::Acc;

void check_ids(const Op& op, const Tensor& ids, const char* what, int64_t first, int64_t end) {
  if (ids.device() != Device::cpu) return;
  const auto values = ids.span<int32_t>();
  for (size_t t = 0; t < values.size(); ++t)
    op.require(values[t] >= first && values[t] < end,
               "{} {} at position {} is outside the vocabulary [0, {})", what, values[t], t, end);
}

// Rows of logits that are held at a time: enough for the GEMMs' full speed (the weight gradient's
// K). On the CPU about 16 MB; on a GPU so many that the pass over the main gradient, which every
// chunk makes, costs little beside the products: at most 5 GB of bf16.
int64_t chunk_rows(int64_t rows, int64_t vocabulary, bool on_gpu) {
  const int64_t elements = on_gpu ? int64_t(5) << 29 : int64_t(4) << 20, step = on_gpu ? 1024 : 64;
  const int64_t fitting = elements / std::max<int64_t>(vocabulary, 1) / step * step;
  return std::min(rows, std::clamp<int64_t>(fitting, 256, on_gpu ? 1 << 20 : 1024));
}

// The loss of one row; logits become exponentials. `grad`, unless null, receives softmax -
// onehot(label).
template <class T> Acc<T> cross_entropy_row(Acc<T>* logits, int64_t n, int32_t label, T* grad) {
  using A = Acc<T>;
  if (label < 0) {
    if (grad) std::fill_n(grad, n, T(0));
    return 0;
  }
  A max = -std::numeric_limits<A>::infinity();
  const A score = logits[label], sum = cpu::exp_row(logits, logits, n, max);
  if (grad) {
    const A scale = 1 / sum, own = logits[label] * scale - 1;  // grad may be logits
    cpu::store(grad, false, n, [=](int64_t j) { return logits[j] * scale; });
    grad[label] = T(own);
  }
  return std::log(sum) + (max - score);
}

// logits and dlogits are of one chunk. dlogits, dx and dw are empty when not wanted.
struct Head {
  Tensor x, w, logits, dlogits, dx;
  Op::Into dw;
};

// One chunk after the other, with the matrix products of a device. loss_of(begin, end) makes the
// losses of these rows from the logits, and dlogits.
void run_head(Head& head, auto gemm, auto loss_of) {
  const int64_t tokens = head.x.dim(0), h = head.x.dim(1), v = head.w.dim(0);
  const DType type = head.x.dtype();
  if (tokens == 0 && head.dw && !head.dw.add) head.dw.tensor.fill_zero();
  for (int64_t begin = 0; begin < tokens; begin += head.logits.dim(0)) {
    const int64_t end = std::min(tokens, begin + head.logits.dim(0)), rows = end - begin;
    const Tensor x = head.x.row_range(begin, end);
    gemm(false, true, rows, v, h, x.raw(), head.w.raw(), type, head.logits.raw(),
         head.logits.dtype(), false);
    loss_of(begin, end);
    if (head.dx)
      gemm(false, false, rows, h, v, head.dlogits.raw(), head.w.raw(), type,
           head.dx.row_range(begin, end).raw(), type, false);
    if (head.dw)
      gemm(true, false, v, h, rows, head.dlogits.raw(), x.raw(), type, head.dw.tensor.raw(),
           head.dw.tensor.dtype(), head.dw.add || begin > 0);
  }
}

// The gradients were made for a seed of 1; another one multiplies that of x.
void scale_by(Op& op, const Tensor& seed, Tensor dx, const Param& w) {
  const double factor = seed.device() == Device::cpu ? seed.to_vector<double>()[0] : 1.0;
  if (factor == 1.0) return;
  op.require(!w.grad, "the gradient of sum must be 1, not {}: that of {} was made in the forward",
             factor, w.name);
  by_float(dx.dtype(), [&](auto z) {
    using T = decltype(z);
    for (T& d : dx.span<T>()) d = T(Acc<T>(d) * Acc<T>(factor));
  });
}

}  // namespace

Tensor embedding(Tape& tape, const Tensor& ids, Param& w, Loc at) {
  Op op(tape, "embedding", at, {{"ids", ids}, {"w", w.value}});
  op.require(ids.rank() == 1 && ids.dtype() == DType::i32, "ids must be int32 [T]");
  op.require(w.value.rank() == 2, "w must be [V, H]");
  check_ids(op, ids, "token id", 0, w.value.dim(0));
  Tensor y = op.output("y", {ids.dim(0), w.value.dim(1)}, w.value.dtype());
  cpu::run(
      op, {.bytes = 2.0 * y.nbytes()}, y.dtype(),
      [&](auto z) {
        auto *from = w.value.data<decltype(z)>(), *to = y.data<decltype(z)>();
        const int32_t* id = ids.data<int32_t>();
        const int64_t h = y.dim(1);
        cpu::parallel_rows(ids.dim(0), h,
                           [=](int64_t t) { std::copy_n(from + id[t] * h, h, to + t * h); });
      },
      [&](auto stream) { cuda::collect_rows(w.value, ids, {y}, stream); });
  op.backward([y = y.identity(), ids, &w](Op& op) {
    const Tensor dy = op.grad(y);
    const auto dw = op.accumulate(w);
    if (!dw) return;
    const int64_t room = op.on_gpu() ? cuda::sort_workspace(ids.numel()) : 0;
    Tensor work = op.workspace("embedding_sort", {room}, DType::i32);
    op.run(
        {.bytes = double(dy.nbytes() + dw.tensor.nbytes())},
        [&] { cpu::add_rows(dy, ids.data<int32_t>(), dw); },
        [&](auto stream) { cuda::embedding_backward(ids, dy, dw, work, stream); });
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
  const int64_t rows = x.dim(0), vocabulary = w.value.dim(0),
                chunk = chunk_rows(rows, vocabulary, op.on_gpu());
  check_ids(op, labels, "label", std::numeric_limits<int32_t>::min(), vocabulary);
  const DType wide = master_dtype(x.dtype());
  // Only the sum can carry a gradient.
  HeadLoss out{op.output("loss", {1}, wide), op.workspace("token_loss", {rows}, wide)};
  // On a GPU in the dtype of x: what reads and writes them costs as much as a product.
  const DType logits_type = op.on_gpu() ? x.dtype() : wide;
  Head head{x, w.value, op.workspace("logits", {chunk, vocabulary}, logits_type)};
  if (op.recording()) {
    head.dw = op.accumulate(w);
    head.dlogits = x.dtype() == logits_type
                       ? head.logits
                       : op.workspace("dlogits", {chunk, vocabulary}, x.dtype());
  }
  if (op.wants(x)) head.dx = op.workspace("head_dx", x.shape(), x.dtype());
  const double products = 1.0 + bool(head.dx) + bool(head.dw);
  const Cost cost{2.0 * products * rows * w.value.numel(),
                  products * (x.nbytes() + w.value.nbytes()) + 2.0 * rows * vocabulary * 4};
  cpu::run(
      op, cost, x.dtype(),
      [&](auto z) {
        using T = decltype(z);
        using A = Acc<T>;
        A *logits = head.logits.data<A>(), *loss = out.token_loss.data<A>();
        T* dlogits = head.dlogits ? head.dlogits.data<T>() : nullptr;
        const int32_t* label = labels.data<int32_t>();
        run_head(head, cpu::gemm, [&](int64_t begin, int64_t end) {
          cpu::parallel_rows(end - begin, vocabulary, [&](int64_t t) {
            loss[begin + t] =
                cross_entropy_row<T>(logits + t * vocabulary, vocabulary, label[begin + t],
                                     dlogits ? dlogits + t * vocabulary : nullptr);
          });
        });
        out.sum.data<A>()[0] = A(std::accumulate(loss, loss + rows, 0.0));
      },
      [&](auto stream) {
        const auto gemm = [&](auto... a) { cuda::gemm(a..., stream); };
        run_head(head, gemm, [&](int64_t begin, int64_t end) {
          cuda::cross_entropy(head.logits, labels.row_range(begin, end),
                              out.token_loss.row_range(begin, end), bool(head.dlogits), stream);
        });
        cuda::sum_terms(out.token_loss, out.sum, stream);
      });
  if (head.dx)
    op.backward([sum = out.sum.identity(), x = x.identity(), dx = head.dx, &w](Op& op) {
      scale_by(op, op.grad(sum), dx, w);
      op.give(x, dx);
    });
  return out;
}

}  // namespace pith
