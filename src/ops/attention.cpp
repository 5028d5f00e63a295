#include "ops/attention.h"

#include "ops/gemm.h"
#include "ops/simd.h"

// Flash attention (Dao, "FlashAttention-2", 2023): blocks of rows against blocks of keys, with the
// products from the library. A row is a (token, query head) pair of one k/v head, token by token:
// the heads of a group share the keys, and a block spans few positions. A block is packed into
// scratch memory in the accumulation type.

namespace pith {
namespace {

using cpu::Acc;

constexpr int64_t kRows = 96, kKeys = 256;  // 96: whole tokens of most groups

struct Range {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// What is attended to by what: queries are the positions first .. first + s.sequence - 1 of each
// sequence, keys 0 .. keys - 1.
struct Problem {
  AttentionShape s;
  int64_t keys, first, window;
  Tensor document_start;  // or empty

  int64_t group() const { return s.heads / s.kv_heads; }
  int64_t kv_count() const { return s.batch * s.kv_heads; }
  int64_t block_tokens() const { return std::max<int64_t>(1, kRows / group()); }
  int64_t block_rows() const { return block_tokens() * group(); }
  int64_t blocks() const { return (s.sequence + block_tokens() - 1) / block_tokens(); }
  // Backward runs in tasks (k/v head, part): a part takes every parts-th block of rows and sums the
  // gradients of keys and values in a buffer of its own; the parts are then added in order. Their
  // number depends on shapes alone, so the result does not depend on threads.
  int64_t parts() const {
    constexpr int64_t tasks = 16;
    return std::max<int64_t>(1, std::min(tasks / std::max<int64_t>(1, kv_count()), blocks()));
  }
  // The keys that query i of sequence b sees.
  Range seen(int64_t b, int64_t i) const {
    const int64_t end = first + i + 1;
    int64_t begin = window ? std::max<int64_t>(0, end - window) : 0;
    if (document_start)
      begin = std::max<int64_t>(begin, document_start.data<int32_t>()[b * s.sequence + i]);
    return {std::min(begin, end), end};
  }
  // All that some queries see.
  Range seen(int64_t b, Range queries) const {
    Range all = seen(b, queries.begin);
    for (int64_t i = queries.begin; i < queries.end; ++i)
      all = {std::min(all.begin, seen(b, i).begin), seen(b, i).end};
    return all;
  }
  // Useful work: 4 D for every (query, key) pair a causal mask and the window leave, documents not
  // counted.
  double flops() const {
    double pairs = 0;
    for (int64_t end = first + 1; end <= first + s.sequence; ++end)
      pairs += double(window ? std::min(end, window) : end);
    return 4.0 * double(s.batch * s.heads * s.head_dim) * pairs;
  }
};

// The rows of k/v head `kv` of a sequence that belong to some tokens.
struct Block {
  const Problem& n;
  int64_t kv_of_batch, index;  // of k/v heads, of blocks of rows
  int64_t batch = kv_of_batch / n.s.kv_heads, kv = kv_of_batch % n.s.kv_heads;
  Range tokens = {index * n.block_tokens(), std::min((index + 1) * n.block_tokens(), n.s.sequence)};
  int64_t rows = tokens.count() * n.group();
  Range keys = n.seen(batch, tokens);
  // f(keys) for one block of keys after the other.
  template <class F> void for_keys(F f) const {
    for (int64_t at = keys.begin; at < keys.end; at += kKeys)
      f(Range{at, std::min(keys.end, at + kKeys)});
  }
  // f(row, its scores) for every row, those of keys it does not see set to -inf.
  template <class A, class F> void for_rows(Range at, A* scores, F f) const {
    for (int64_t r = 0; r < rows; ++r, scores += at.count()) {
      const Range seen = n.seen(batch, tokens.begin + r / n.group());
      constexpr A never = -std::numeric_limits<A>::infinity();
      std::fill(scores, scores + std::clamp(seen.begin, at.begin, at.end) - at.begin, never);
      std::fill(scores + std::clamp(seen.end, at.begin, at.end) - at.begin, scores + at.count(),
                never);
      f(r, scores);
    }
  }
};

// The columns of a matrix of tokens that belong to each k/v head: `width` consecutive ones.
template <class T> struct Heads {
  using F = Acc<std::remove_const_t<T>>;
  T* data;
  int64_t stride, width;  // of a token, of a head
  T* at(int64_t token, int64_t kv) const { return data + token * stride + kv * width; }

  // to = factor * those of some tokens of the block's sequence; store is the reverse for its own.
  // (With a cache, where keys are more than the queries, there is one sequence.)
  void load(const Block& b, Range tokens, F factor, F* to) const {
    for (int64_t i = tokens.begin; i < tokens.end; ++i, to += width)
      cpu::store(to, false, width,
                 [=, x = at(b.batch * b.n.keys + i, b.kv)](int64_t j) { return factor * F(x[j]); });
  }
  void store(const Block& b, F factor, const F* from, bool add) const {
    for (int64_t i = b.tokens.begin; i < b.tokens.end; ++i, from += width)
      cpu::store(at(b.batch * b.n.keys + i, b.kv), add, width,
                 [=](int64_t j) { return factor * from[j]; });
  }
};

template <class T> struct Qkv { Heads<T> q, k, v; };
template <class T> Qkv<T> split(T* data, const AttentionShape& s) {
  const int64_t dim = s.head_dim, width = s.width(), q_width = s.heads * dim;
  return {{data, width, q_width / s.kv_heads},
          {data + q_width, width, dim},
          {data + q_width + s.kv_heads * dim, width, dim}};
}

// C[m, n] = (add ? C : 0) + op(A) op(B)
template <class F>
void multiply(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const F* a, const F* b,
              F* c, bool add) {
  constexpr DType t = dtype_of<F>();
  cpu::gemm(trans_a, trans_b, m, n, k, a, b, t, c, t, add);
}

// What a thread needs for a block: q, dy and y [rows, D], k and v [keys, D], the scores p and ds
// [rows, keys], and two numbers for each row.
template <class F> struct Scratch {
  F *q, *dy, *y, *k, *v, *p, *ds, *top, *sum;
  Scratch(const Problem& n, Tensor& memory) {
    F* at = memory.data<F>() + omp_get_thread_num() * memory.dim(1);
    const int64_t rows = n.block_rows(), keys = std::min(n.keys, kKeys), dim = n.s.head_dim;
    for (F** of_rows : {&q, &dy, &y}) at = (*of_rows = at) + rows * dim;
    for (F** of_keys : {&k, &v}) at = (*of_keys = at) + keys * dim;
    for (F** scores : {&p, &ds}) at = (*scores = at) + rows * keys;
    for (F** numbers : {&top, &sum}) at = (*numbers = at) + rows;
  }
};
Tensor make_scratch(Op& op, const Problem& n, DType wide) {
  const int64_t rows = n.block_rows(), keys = std::min(n.keys, kKeys);
  const int64_t size = (3 * rows + 2 * keys) * n.s.head_dim + 2 * rows * (keys + 1);
  return op.workspace("attention_scratch", {omp_get_max_threads(), size}, wide);
}

// f(task) on one thread each, even if there is only one task: with several, the library may add in
// another order.
template <class F> void for_tasks(int64_t count, F f) {
#pragma omp parallel for schedule(dynamic)
  for (int64_t task = 0; task < count; ++task) f(task);
}

// lse: log of the sum of exponentials of each row.
template <class T, class F>
void forward(const Block& b, const Qkv<const T>& in, F scale, Heads<T> out, Heads<F> lse,
             const Scratch<F>& s) {
  const int64_t rows = b.rows, dim = b.n.s.head_dim;
  in.q.load(b, b.tokens, scale, s.q);
  std::fill_n(s.y, rows * dim, F(0));
  std::fill_n(s.top, rows, F(-1e30));  // finite: a row that sees nothing must not give inf - inf
  std::fill_n(s.sum, rows, F(0));
  b.for_keys([&](Range at) {
    in.k.load(b, at, 1, s.k);
    in.v.load(b, at, 1, s.v);
    multiply(false, true, rows, at.count(), dim, s.q, s.k, s.p, false);
    b.for_rows(at, s.p, [&](int64_t r, F* scores) {
      const F before = s.top[r], more = cpu::exp_row(scores, scores, at.count(), s.top[r]);
      const F keep = s.sum[r] == 0 ? F(1) : cpu::fast_exp(before - s.top[r]);
      s.sum[r] = s.sum[r] * keep + more;
      if (keep != 1)
        for (int64_t d = r * dim; d < (r + 1) * dim; ++d) s.y[d] *= keep;
    });
    multiply(false, false, rows, dim, at.count(), s.p, s.v, s.y, true);
  });
  for (int64_t r = 0; r < rows; ++r) {
    const F inverse = s.sum[r] == 0 ? F(0) : 1 / s.sum[r];
    for (int64_t d = r * dim; d < (r + 1) * dim; ++d) s.y[d] *= inverse;
    s.top[r] = s.sum[r] == 0 ? F(0) : s.top[r] + std::log(s.sum[r]);
  }
  out.store(b, 1, s.y, false);
  lse.store(b, 1, s.top, false);
}

// What backward reads beside q, k and v.
template <class T> struct Saved {
  Heads<const T> out, d_out;
  Heads<const Acc<T>> lse;
};

// Adds to d_keys and d_values. With P = exp(S - lse): dS = P (dP - delta), where delta is
// sum(out d_out) of a row.
template <class T, class F>
void backward(const Block& b, const Qkv<const T>& in, F scale, const Saved<T>& saved, Heads<T> d_q,
              bool add, F* d_keys, F* d_values, const Scratch<F>& s) {
  const int64_t rows = b.rows, dim = b.n.s.head_dim;
  F *lse = s.top, *delta = s.sum, *dq = s.y;
  in.q.load(b, b.tokens, scale, s.q);
  saved.out.load(b, b.tokens, 1, s.y);
  saved.d_out.load(b, b.tokens, 1, s.dy);
  saved.lse.load(b, b.tokens, 1, lse);
  for (int64_t r = 0; r < rows; ++r) delta[r] = cpu::dot(s.y + r * dim, s.dy + r * dim, dim);
  std::fill_n(dq, rows * dim, F(0));
  b.for_keys([&](Range at) {
    const int64_t count = at.count(), from = at.begin * dim;
    in.k.load(b, at, 1, s.k);
    in.v.load(b, at, 1, s.v);
    multiply(false, true, rows, count, dim, s.q, s.k, s.p, false);
    multiply(false, true, rows, count, dim, s.dy, s.v, s.ds, false);
    b.for_rows(at, s.p, [&](int64_t r, F* p) {
      F* ds = s.ds + r * count;
      const F shift = lse[r], mean = delta[r];
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) {
        p[j] = cpu::fast_exp(p[j] - shift);
        ds[j] = p[j] * (ds[j] - mean);
      }
    });
    multiply(true, false, count, dim, rows, s.p, s.dy, d_values + from, true);
    multiply(true, false, count, dim, rows, s.ds, s.q, d_keys + from, true);
    multiply(false, false, rows, dim, count, s.ds, s.k, dq, true);
  });
  d_q.store(b, scale, dq, add);
}

// to (+)= the sum of the parts [kv heads of the batch, parts, keys, D] of a gradient.
template <class T> void sum_parts(const Problem& n, const Tensor& parts, Heads<T> to, bool add) {
  using F = Acc<T>;
  const int64_t dim = n.s.head_dim, count = parts.dim(1), size = n.keys * dim;
  cpu::parallel_rows(n.kv_count() * n.keys, count * dim, [&](int64_t r) {
    const int64_t kv = r / n.keys, key = r % n.keys;
    const F* from = parts.data<F>() + kv * count * size + key * dim;
    T* row = to.at(kv / n.s.kv_heads * n.keys + key, kv % n.s.kv_heads);
    cpu::store(row, add, dim, [=](int64_t d) {
      F sum = 0;
      for (int64_t part = 0; part < count; ++part) sum += from[part * size + d];
      return sum;
    });
  });
}

template <class T, class F = Acc<T>>
void backward(const Problem& n, const Qkv<const T>& in, float scale, const Saved<T>& saved,
              Qkv<T> to, bool add, Tensor& d_kv, Tensor& scratch) {
  const int64_t parts = n.parts(), size = n.keys * n.s.head_dim;
  for_tasks(n.kv_count() * parts, [&](int64_t task) {
    F *dk = d_kv.data<F>() + task * size, *dv = dk + n.kv_count() * parts * size;
    std::fill_n(dk, size, F(0));
    std::fill_n(dv, size, F(0));
    for (int64_t block = task % parts; block < n.blocks(); block += parts)
      backward(Block{n, task / parts, block}, in, F(scale), saved, to.q, add, dk, dv,
               Scratch<F>(n, scratch));
  });
  sum_parts(n, d_kv.row_range(0, n.kv_count()), to.k, add);
  sum_parts(n, d_kv.row_range(n.kv_count(), 2 * n.kv_count()), to.v, add);
}

// The result [tokens, Hq D] and lse [tokens, Hq]. The keys and values of a token are consecutive in
// kv, from column `at` on. With on_gpu by the kernel.
std::pair<Tensor, Tensor> attend(Op& op, const Problem& n, const Tensor& qkv, const Tensor& kv,
                                 int64_t at, float scale, double bytes, bool on_gpu) {
  const AttentionShape& s = n.s;
  const DType wide = master_dtype(qkv.dtype());
  Tensor y = op.output("attention", {qkv.dim(0), s.heads * s.head_dim}, qkv.dtype());
  Tensor lse = op.workspace("attention_lse", {qkv.dim(0), s.heads}, wide);
  Tensor scratch = on_gpu ? Tensor() : make_scratch(op, n, wide);
  cpu::run(
      op, {.flops = n.flops(), .bytes = bytes + y.nbytes()}, qkv.dtype(),
      [&](auto z) {
        using T = decltype(z);
        using F = Acc<T>;
        const Heads<const T> q = split(qkv.data<T>(), s).q,
                             k{kv.data<T>() + at, kv.cols(), s.head_dim};
        const Heads<const T> v{k.data + s.kv_heads * s.head_dim, k.stride, k.width};
        const Heads<T> out{y.data<T>(), y.dim(1), q.width};
        const Heads<F> lses{lse.data<F>(), s.heads, n.group()};
        for_tasks(n.kv_count() * n.blocks(), [&](int64_t task) {
          forward<T>(Block{n, task / n.blocks(), task % n.blocks()}, {q, k, v}, F(scale), out, lses,
                     Scratch<F>(n, scratch));
        });
      },
      [&](auto stream) {
        if (on_gpu) cuda::attention(qkv, s, scale, n.window, y, lse, stream);
        return on_gpu;
      });
  return {y, lse};
}

void require_shape(const Op& op, const Tensor& qkv, const AttentionShape& s, int64_t window) {
  op.require(s.batch >= 0 && s.sequence >= 0 && s.kv_heads > 0 && s.head_dim > 0 && s.heads > 0 &&
                 s.heads % s.kv_heads == 0,
             "{} query heads must be a multiple of {} k/v heads of size {}", s.heads, s.kv_heads,
             s.head_dim);
  op.require(qkv.shape() == Shape{s.batch * s.sequence, s.width()},
             "qkv must be [{} x {} tokens, {}]", s.batch, s.sequence, s.width());
  op.require(window >= 0, "the window is {}, it must be 0 (none) or more", window);
}

}  // namespace

Tensor attention(Tape& tape, const Tensor& qkv, const AttentionShape& shape, float scale,
                 const Tensor& document_start, int64_t window, Loc at) {
  Op op(tape, "attention", at, {{"qkv", qkv}});
  require_shape(op, qkv, shape, window);
  op.require(!document_start ||
                 (document_start.shape() == Shape{qkv.dim(0)} &&
                  document_start.dtype() == DType::i32 && document_start.device() == qkv.device()),
             "document_start must be int32[{}] on {}, it is {}", qkv.dim(0), name_of(qkv.device()),
             document_start.str());
  const Problem n{shape, shape.sequence, 0, window, document_start};
  const bool on_gpu = op.on_gpu() && !document_start && cuda::attention_fits(qkv, shape);
  const auto [y, lse] =
      attend(op, n, qkv, qkv, shape.heads * shape.head_dim, scale, double(qkv.nbytes()), on_gpu);
  op.backward([=, y = y, lse = lse](Op& op) {
    const Tensor dy = op.grad(y);
    auto d = op.accumulate(qkv);
    if (!d) return;
    const bool apart = on_gpu && d.add;  // cuDNN cannot add
    const Tensor to = apart ? op.workspace("attention_dx", qkv.shape(), qkv.dtype()) : d.tensor;
    Tensor d_kv, scratch;
    if (!on_gpu) {
      d_kv = op.workspace("attention_d_kv", {2 * n.kv_count(), n.parts(), n.keys, shape.head_dim},
                          lse.dtype());
      scratch = make_scratch(op, n, lse.dtype());
    } else if (op.context().deterministic && op.context().device == Device::meta) {
      op.workspace("attention_scores", {shape.batch, shape.heads, n.keys, n.keys}, DType::bf16);
    }
    cpu::run(
        op, {.flops = 2.5 * n.flops(), .bytes = 2.0 * (qkv.nbytes() + y.nbytes())}, qkv.dtype(),
        [&](auto z) {
          using T = decltype(z);
          const int64_t stride = y.dim(1), width = n.group() * shape.head_dim;
          const Saved<T> saved{{y.data<T>(), stride, width},
                               {dy.data<T>(), stride, width},
                               {lse.data<Acc<T>>(), shape.heads, n.group()}};
          backward<T>(n, split(qkv.data<T>(), shape), scale, saved,
                      split(d.tensor.data<T>(), shape), d.add, d_kv, scratch);
        },
        [&](auto stream) {
          if (on_gpu)
            cuda::attention_backward(qkv, shape, scale, n.window, y, lse, dy, to,
                                     op.context().deterministic, stream);
          return on_gpu;
        });
    if (apart) d.tensor.add(to);
  });
  return y;
}

Tensor attention_cached(Tape& tape, const Tensor& qkv, KvCache& cache, const AttentionShape& shape,
                        float scale, int64_t window, Loc at) {
  Op op(tape, "attention_cached", at, {{"qkv", qkv}, {"kv", cache.kv}});
  require_shape(op, qkv, shape, window);
  const int64_t kv_width = 2 * shape.kv_heads * shape.head_dim;
  const int64_t capacity = cache.kv.rows(), before = cache.length;
  op.require(!tape.recording() && shape.batch == 1,
             "needs one sequence and a tape that does not record");
  op.require(cache.kv.dtype() == qkv.dtype() && cache.kv.cols() == kv_width,
             "the cache must be {}[capacity, {}]", name_of(qkv.dtype()), kv_width);
  op.require(before + shape.sequence <= capacity,
             "the cache has room for {} tokens, {} + {} are asked", capacity, before,
             shape.sequence);
  cache.length += shape.sequence;
  const double copied = double(shape.sequence * kv_width) * double(size_of(qkv.dtype()));
  cpu::run(op, {.bytes = 2 * copied}, qkv.dtype(), [&](auto z) {
    using T = decltype(z);
    for (int64_t i = 0; i < shape.sequence; ++i)
      std::copy_n(qkv.data<T>() + (i + 1) * shape.width() - kv_width, kv_width,
                  cache.kv.data<T>() + (before + i) * kv_width);
  });
  const double read = double(cache.length * kv_width) * double(size_of(qkv.dtype()));
  const Problem n{shape, cache.length, before, window, {}};
  return attend(op, n, qkv, cache.kv, 0, scale, read, false).first;
}

}  // namespace pith
