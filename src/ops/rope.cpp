#include "ops/attention.h"
#include "ops/simd.h"

// qk_norm_rope of ops/attention.h. D is the head size.

namespace pith {
namespace {

using cpu::Acc;

constexpr int64_t kChunk = 64;  // tokens whose weight gradients are summed together

using Call = cuda::QkNormRope;  // the arguments of one call

// Its tokens one by one, in the accumulation type A; rounded to T where Hugging Face rounds. z
// [D] is scratch.
template <class T> struct Rope {
  using A = Acc<T>;
  const Call& call;
  const AttentionShape shape = call.shape;
  const int64_t half = call.rope.cos.dim(1);  // rotated channels / 2
  const A eps = A(call.eps);
  const T* x = call.qkv.data<T>();
  const T* wq = call.q_norm ? call.q_norm->value.data<T>() : nullptr;  // no norm
  const T* wk = call.k_norm ? call.k_norm->value.data<T>() : nullptr;
  const A *cos = call.rope.cos.data<A>(), *sin = call.rope.sin.data<A>();
  const int32_t* positions = call.positions.data<int32_t>();

  int64_t rotated_heads() const { return shape.heads + shape.kv_heads; }
  const T* weight(int64_t head) const { return head < shape.heads ? wq : wk; }
  A inverse_rms(const T* v) const {
    A sum = 0;
#pragma omp simd simdlen(16) reduction(+ : sum)
    for (int64_t d = 0; d < shape.head_dim; ++d) sum += A(v[d]) * A(v[d]);
    return 1 / std::sqrt(sum / A(shape.head_dim) + eps);
  }

  void forward(int64_t t, T* y, A* z) const {
    const A *c = cos + positions[t] * half, *s = sin + positions[t] * half;
    const T* in = x + t * shape.width();
    y += t * shape.width();
    for (int64_t h = 0; h < rotated_heads(); ++h, in += shape.head_dim, y += shape.head_dim) {
      if (const T* w = weight(h)) {
        const A r = inverse_rms(in);
#pragma omp simd
        for (int64_t d = 0; d < shape.head_dim; ++d) z[d] = A(T(A(T(A(in[d]) * r)) * A(w[d])));
      } else {
        std::copy_n(in, shape.head_dim, z);
      }
#pragma omp simd
      for (int64_t d = 0; d < half; ++d) {
        y[d] = T(z[d] * c[d] - z[d + half] * s[d]);
        y[d + half] = T(z[d + half] * c[d] + z[d] * s[d]);
      }
      for (int64_t d = 2 * half; d < shape.head_dim; ++d) y[d] = T(z[d]);
    }
    std::copy_n(in, shape.kv_heads * shape.head_dim, y);
  }

  // dx = (add ? dx : 0) + gradient; dwq and dwk += gradient. The rotation is undone, then the norm.
  void backward(int64_t t, const T* dy, T* dx, bool add, A* dwq, A* dwk, A* z) const {
    const A *c = cos + positions[t] * half, *s = sin + positions[t] * half;
    const int64_t dim = shape.head_dim;
    for (int64_t h = 0, at = t * shape.width(); h < shape.heads + 2 * shape.kv_heads;
         ++h, at += dim) {
      const T *in = x + at, *g = dy + at;
      std::copy_n(g, dim, z);
      const bool rotated = h < rotated_heads();
#pragma omp simd
      for (int64_t d = 0; d < (rotated ? half : 0); ++d) {
        z[d] = A(g[d]) * c[d] + A(g[d + half]) * s[d];
        z[d + half] = A(g[d + half]) * c[d] - A(g[d]) * s[d];
      }
      A r = 1, mean = 0;  // dx = r (z w - x r mean(z w x r))
      if (const T* w = rotated ? weight(h) : nullptr) {
        A* dw = h < shape.heads ? dwq : dwk;
        r = inverse_rms(in);
#pragma omp simd simdlen(16) reduction(+ : mean)
        for (int64_t d = 0; d < dim; ++d) {
          dw[d] += z[d] * A(T(A(in[d]) * r));
          z[d] *= A(w[d]);
          mean += z[d] * A(in[d]) * r;
        }
        mean *= r / A(dim);
      }
      cpu::store(dx + at, add, dim, [=](int64_t d) { return r * (z[d] - mean * A(in[d])); });
    }
  }
};

int64_t chunks_of(const Call& call) { return (call.qkv.dim(0) + kChunk - 1) / kChunk; }

void check(const Op& op, const Call& call) {
  const auto& [qkv, q_norm, k_norm, eps, table, positions, shape] = call;
  const DType own = qkv.dtype(), wide = master_dtype(own);
  const auto& [cos, sin] = table;
  op.require(qkv.shape() == Shape{shape.batch * shape.sequence, shape.width()},
             "qkv must be [{} x {} tokens, {}]", shape.batch, shape.sequence, shape.width());
  for (const Param* w : {q_norm, k_norm})
    op.require(!w || (w->value.shape() == Shape{shape.head_dim} && w->value.dtype() == own),
               "a norm weight must be {}[{}]", name_of(own), shape.head_dim);
  op.require(cos.rank() == 2 && cos.shape() == sin.shape() && cos.dtype() == wide &&
                 sin.dtype() == wide && 2 * cos.dim(1) <= shape.head_dim,
             "cos and sin must be {}[P, at most {}]", name_of(wide), shape.head_dim / 2);
  op.require(positions.dtype() == DType::i32 && positions.numel() == qkv.dim(0),
             "positions must be int32[{}]", qkv.dim(0));
  if (positions.device() != Device::cpu) return;
  for (int32_t p : positions.span<int32_t>())
    op.require(p >= 0 && p < cos.dim(0), "position {} is outside the rotary tables of {}", p,
               cos.dim(0));
}

// f(rope, token, z) for every token over the threads, the tokens of a chunk in order on one.
template <class T, class F> void for_tokens(const Call& call, F f) {
  const Rope<T> rope{call};
  const int64_t tokens = call.qkv.dim(0);
  cpu::parallel_rows(chunks_of(call), kChunk * call.qkv.dim(1), [&](int64_t chunk) {
    std::vector<Acc<T>> z(size_t(call.shape.head_dim));
    for (int64_t t = chunk * kChunk; t < std::min(tokens, (chunk + 1) * kChunk); ++t)
      f(rope, t, z.data());
  });
}

void rope_backward(Op& op, const Call& call, const Tensor& dy, Param* q_norm, Param* k_norm) {
  const Tensor& qkv = call.qkv;
  auto dx = op.accumulate(qkv);
  const Op::Into dw_q = q_norm ? op.accumulate(*q_norm) : Op::Into{};
  const Op::Into dw_k = k_norm ? op.accumulate(*k_norm) : Op::Into{};
  if (!dx) dx.tensor = op.workspace("qk_norm_rope_dx", qkv.shape(), qkv.dtype());
  const int64_t dim = call.shape.head_dim;
  const int64_t chunks = std::max(op.on_gpu() ? cuda::kRopeParts : 0, chunks_of(call));
  Tensor dw = op.workspace("qk_norm_dw", {2 * chunks, dim}, master_dtype(qkv.dtype()));
  cpu::run(
      op, {.bytes = 3.0 * qkv.nbytes()}, qkv.dtype(),
      [&](auto type) {
        using T = decltype(type);
        dw.fill_zero();
        for_tokens<T>(call, [&](const Rope<T>& rope, int64_t t, Acc<T>* z) {
          Acc<T>* of_chunk = dw.data<Acc<T>>() + t / kChunk * dim;
          rope.backward(t, dy.data<T>(), dx.tensor.data<T>(), dx.add, of_chunk,
                        of_chunk + chunks * dim, z);
        });
        if (dw_q) cpu::add_rows(dw.row_range(0, chunks), nullptr, dw_q);
        if (dw_k) cpu::add_rows(dw.row_range(chunks, 2 * chunks), nullptr, dw_k);
      },
      [&](auto stream) {
        return cuda::qk_norm_rope_backward(call, dy, dx, dw_q, dw_k, dw, stream);
      });
}

}  // namespace

Tensor qk_norm_rope(Tape& tape, const Tensor& qkv, Param* q_norm, Param* k_norm, float eps,
                    const RopeTable& rope, const Tensor& positions, const AttentionShape& shape,
                    Loc at) {
  Op op(tape, "qk_norm_rope", at,
        {{"qkv", qkv}, {"cos", rope.cos}, {"sin", rope.sin}, {"positions", positions}});
  const Call call{qkv, q_norm, k_norm, eps, rope, positions, shape};
  check(op, call);
  Tensor y = op.output("qk_norm_rope", qkv.shape(), qkv.dtype());
  cpu::run(
      op, {.bytes = 2.0 * qkv.nbytes()}, qkv.dtype(),
      [&](auto type) {
        using T = decltype(type);
        T* to = y.data<T>();
        for_tokens<T>(call,
                      [&](const Rope<T>& rope, int64_t t, Acc<T>* z) { rope.forward(t, to, z); });
      },
      [&](auto stream) { return cuda::qk_norm_rope(call, y, stream); });
  op.backward(
      [=, y = y.identity()](Op& op) { rope_backward(op, call, op.grad(y), q_norm, k_norm); });
  return y;
}

}  // namespace pith
