#include "ops/attention.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "ops/block_gemm.h"
#include "ops/simd.h"

// Flash attention (Dao, "FlashAttention-2", 2023) on blocks of 64 rows and 64 keys. A row is a
// (token, query head) pair of one k/v head, token by token, so that the heads of a group share the
// packed keys and a block spans few positions. Scores are kept transposed, [key, row]: the softmax
// runs down the lanes of a vector and needs no horizontal sums.

namespace pith {
namespace {

using cpu::block_gemm;
using cpu::exp2_of;
using cpu::kTileCols;
using cpu::kTileRows;
using cpu::kWidth;
using cpu::narrow;
using cpu::round_up;
using cpu::vec;

constexpr int64_t kKeys = 64, kRows = 64;
constexpr double kFlopsForThreads = 1e6;  // some microseconds on one core

// Elements between packed rows: whole tiles, and one vector more so that a column of rows does not
// fall on few cache sets.
template <class F> int64_t packed_width(int64_t dim) {
  return round_up(dim, kTileCols<F>) + kWidth<F>;
}

// What is attended to by what. Queries are the positions first .. first + queries - 1 of each
// sequence, keys 0 .. keys - 1.
struct Problem {
  int64_t batch, queries, keys, first, heads, kv_heads, dim, window;
  Tensor document_start;  // or empty
  int64_t group() const { return heads / kv_heads; }
  int64_t rows() const { return queries * group(); }
  int64_t row_blocks() const { return (rows() + kRows - 1) / kRows; }
  int64_t padded_keys() const { return round_up(keys, kKeys); }
  int64_t kv_count() const { return batch * kv_heads; }
};

// Useful work: 4 D for every (query, key) pair a causal mask and the window leave, documents not
// counted.
double forward_flops(const Problem& n) {
  double pairs = 0;
  for (int64_t i = 0; i < n.queries; ++i) {
    const int64_t seen = n.first + i + 1;
    pairs += double(n.window ? std::min(seen, n.window) : seen);
  }
  return 4.0 * double(n.batch * n.heads * n.dim) * pairs;
}

// The heads of one kind in a packed tensor: dim consecutive elements each, stride elements from
// token to token.
template <class T> struct Heads {
  T* data;
  int64_t stride, dim;
  T* at(int64_t token, int64_t head) const { return data + token * stride + head * dim; }
};

template <class T> struct Qkv { Heads<T> q, k, v; };
template <class T> Qkv<T> split(T* data, const AttentionShape& s) {
  return {{data, s.width(), s.head_dim},
          {data + s.heads * s.head_dim, s.width(), s.head_dim},
          {data + (s.heads + s.kv_heads) * s.head_dim, s.width(), s.head_dim}};
}

// Rows [first, first + rows) of k/v head `kv` (counted over the batch), and the keys they see:
// `any` of them, `all` of them, and row by row (in floating point, to be compared in vectors). Rows
// past the end see nothing.
template <class F> struct RowBlock {
  struct Range {
    int64_t begin, end;
  };
  const Problem& n;
  int64_t kv, first, rows;
  Range any, all = {0, 0};
  alignas(64) F begin[kRows], end[kRows];

  RowBlock(const Problem& n, int64_t kv, int64_t block)
      : n(n),
        kv(kv),
        first(block * kRows),
        rows(std::min(kRows, n.rows() - first)),
        any{n.keys, 0} {
    const int32_t* document = n.document_start ? n.document_start.data<int32_t>() : nullptr;
    all.end = rows == kRows ? n.keys : 0;
    for (int64_t i = 0; i < kRows; ++i) {
      int64_t from = n.keys, to = 0;
      if (i < rows) {
        const int64_t at = (first + i) / n.group(), position = n.first + at;
        to = position + 1;
        from = n.window ? std::max<int64_t>(0, to - n.window) : 0;
        if (document) from = std::max<int64_t>(from, document[token(i)]);
        any = {std::min(any.begin, from), std::max(any.end, to)};
        all = {std::max(all.begin, from), std::min(all.end, to)};
      }
      begin[i] = F(from);
      end[i] = F(to);
    }
  }
  int64_t token(int64_t i) const { return kv / n.kv_heads * n.queries + (first + i) / n.group(); }
  int64_t head(int64_t i) const { return kv % n.kv_heads * n.group() + (first + i) % n.group(); }
  int64_t lanes() const { return round_up(rows, kTileCols<F>); }

  // The keys of `block` that any row sees, in whole tiles, counted from the block's first.
  Range in_block(int64_t block) const {
    const int64_t base = block * kKeys;
    return {std::max<int64_t>(any.begin - base, 0) / kTileRows * kTileRows,
            round_up(std::min(any.end - base, kKeys), kTileRows)};
  }
  void mask(int64_t block, Range in, F* scores) const {
    const int64_t base = block * kKeys;
    const auto never = typename cpu::Simd<F>::V{} - std::numeric_limits<F>::infinity();
    if (base + in.begin >= all.begin && base + in.end <= all.end) return;
    for (int64_t j = in.begin; j < in.end; ++j)
      for (int64_t i = 0; i < lanes(); i += kWidth<F>) {
        auto& s = vec(scores + j * kRows + i);
        const F key = F(base + j);
        s = (vec(begin + i) > key) | (vec(end + i) <= key) ? never : s;
      }
  }
  // dst[i] = factor * row i of src, zero-padded to whole vectors and rows.
  template <class T> void pack(Heads<const T> src, F factor, F* dst) const {
    const int64_t width = packed_width<F>(n.dim);
    std::fill_n(dst + rows * width, (kRows - rows) * width, F(0));
    for (int64_t i = 0; i < rows; ++i) {
      const T* x = src.at(token(i), head(i));
      for (int64_t d = 0; d < n.dim; ++d) dst[i * width + d] = factor * F(x[d]);
      std::fill(dst + i * width + n.dim, dst + (i + 1) * width, F(0));
    }
  }
  // dst[d, i] = factor * packed[i, d]
  void transpose(const F* packed, F factor, F* dst) const {
    const int64_t width = packed_width<F>(n.dim);
    for (int64_t i = 0; i < lanes(); ++i)
      for (int64_t d = 0; d < n.dim; ++d) dst[d * kRows + i] = factor * packed[i * width + d];
  }
};

// Keys or values of every k/v head, [kv heads of the batch, blocks * 64, packed width],
// zero-padded. Work-shared without a barrier, like sum_parts.
template <class T, class F> void pack_keys(const Problem& n, Heads<const T> src, F* dst) {
  const int64_t width = packed_width<F>(n.dim), padded = n.padded_keys();
#pragma omp for schedule(static) nowait
  for (int64_t r = 0; r < n.kv_count() * padded; ++r) {
    const int64_t kv = r / padded, j = r % padded, filled = j < n.keys ? n.dim : 0;
    const T* x = src.at(kv / n.kv_heads * n.keys + std::min(j, n.keys - 1), kv % n.kv_heads);
    for (int64_t d = 0; d < filled; ++d) dst[r * width + d] = F(x[d]);
    std::fill(dst + r * width + filled, dst + (r + 1) * width, F(0));
  }
}

// Online softmax of one block of scores (base 2): scores become weights, `top` and `sum` the
// running maximum and sum of each row, `keep` the factor on what was summed before.
template <class F>
void softmax_block(int64_t begin, int64_t end, int64_t lanes, F* scores, F* top, F* sum, F* keep) {
  for (int64_t i = 0; i < lanes; i += kWidth<F>) {
    const auto before = vec(top + i);
    auto m = before;
    for (int64_t j = begin; j < end; ++j) {
      const auto s = vec(scores + j * kRows + i);
      m = s > m ? s : m;
    }
    typename cpu::Simd<F>::V total = {};
    for (int64_t j = begin; j < end; ++j) {
      auto& s = vec(scores + j * kRows + i);
      s = exp2_of(s - m);
      total += s;
    }
    const auto factor = exp2_of(before - m);
    vec(keep + i) = factor;
    vec(sum + i) = vec(sum + i) * factor + total;
    vec(top + i) = m;
  }
}

template <class F> int64_t forward_scratch(int64_t dim) {
  return kRows * (dim + packed_width<F>(dim) + kKeys);
}

// lse (may be null): log2 of the sum of exponentials, [token, query head].
template <class T, class F>
void forward_rows(const RowBlock<F>& rows, Heads<const T> q, const F* keys, const F* values,
                  F scale, Heads<T> out, F* lse, F* scratch) {
  const Problem& n = rows.n;
  const int64_t width = packed_width<F>(n.dim), lanes = rows.lanes();
  F *acc = scratch, *scores = acc + kRows * width, *q_t = scores + kKeys * kRows;
  alignas(64) F top[kRows], sum[kRows] = {}, keep[kRows];
  rows.pack(q, F(1), acc);
  rows.transpose(acc, scale * std::numbers::log2e_v<F>, q_t);
  std::fill_n(acc, kRows * width, F(0));
  std::fill_n(top, kRows, F(-1e30));  // finite: a row that sees nothing yet must not give inf - inf
  for (int64_t block = rows.any.begin / kKeys; block * kKeys < rows.any.end; ++block) {
    const auto in = rows.in_block(block);
    const int64_t at = rows.kv * n.padded_keys() + block * kKeys + in.begin;
    block_gemm<false>(in.end - in.begin, lanes, n.dim, keys + at * width, width, q_t, kRows,
                      scores + in.begin * kRows, kRows, false);
    rows.mask(block, in, scores);
    softmax_block(in.begin, in.end, lanes, scores, top, sum, keep);
    for (int64_t i = 0; i < rows.rows; ++i)
      if (keep[i] != 1)
        for (int64_t d = 0; d < n.dim; ++d) acc[i * width + d] *= keep[i];
    block_gemm<true>(rows.rows, n.dim, in.end - in.begin, scores + in.begin * kRows, kRows,
                     values + at * width, width, acc, width, true);
  }
  for (int64_t i = 0; i < rows.rows; ++i) {
    T* y = out.at(rows.token(i), rows.head(i));
    const F inverse = sum[i] == 0 ? F(0) : 1 / sum[i];
    for (int64_t d = 0; d < n.dim; ++d) y[d] = narrow<T>(acc[i * width + d] * inverse);
    if (lse)
      lse[rows.token(i) * n.heads + rows.head(i)] = sum[i] == 0 ? F(0) : top[i] + std::log2(sum[i]);
  }
}

// Workspaces, in the accumulation type. Backward runs in tasks (k/v head, part): a part takes every
// parts-th block of rows and sums dk and dv in a buffer of its own; the parts are then added in
// order. Their number depends on shapes alone, so the result does not depend on threads.
struct Space {
  Tensor keys, values, d_keys, d_values, scratch;
};
int64_t backward_parts(const Problem& n) {
  constexpr int64_t tasks = 16;
  return std::max<int64_t>(1, std::min(tasks / std::max<int64_t>(1, n.kv_count()), n.row_blocks()));
}
template <class F> int64_t backward_scratch(int64_t dim) {
  return kRows * (2 * dim + 3 * packed_width<F>(dim) + 2 * kKeys);
}

Space space_for(Op& op, const Problem& n, bool backward, DType wide) {
  return by_float(wide, [&](auto z) -> Space {
    using F = cpu::Acc<decltype(z)>;
    const auto packed = [&](const char* name, int64_t parts) {
      return op.workspace(name, {n.kv_count(), parts, n.padded_keys(), packed_width<F>(n.dim)},
                          wide);
    };
    const int64_t scratch = backward ? backward_scratch<F>(n.dim) : forward_scratch<F>(n.dim);
    const int64_t parts = backward_parts(n);
    return {packed("attention_keys", 1), packed("attention_values", 1),
            backward ? packed("attention_d_keys", parts) : Tensor(),
            backward ? packed("attention_d_values", parts) : Tensor(),
            op.workspace("attention_scratch", {omp_get_max_threads(), scratch}, wide)};
  });
}

template <class T>
void forward(const Problem& n, Qkv<const T> in, cpu::Acc<T> scale, Heads<T> out, cpu::Acc<T>* lse,
             Space& space) {
  using F = cpu::Acc<T>;
  F *keys = space.keys.data<F>(), *values = space.values.data<F>(),
    *scratch = space.scratch.data<F>();
#pragma omp parallel if (forward_flops(n) > kFlopsForThreads)
  {
    pack_keys(n, in.k, keys);
    pack_keys(n, in.v, values);
#pragma omp barrier
#pragma omp for schedule(dynamic) nowait
    for (int64_t task = 0; task < n.kv_count() * n.row_blocks(); ++task)
      forward_rows(RowBlock<F>(n, task / n.row_blocks(), task % n.row_blocks()), in.q, keys, values,
                   scale, out, lse, scratch + omp_get_thread_num() * forward_scratch<F>(n.dim));
  }
}

// weights = exp2(scores - lse); d_weights = weights * (d_weights - delta), row by row in lanes.
template <class F>
void softmax_backward_block(int64_t begin, int64_t end, int64_t lanes, const F* lse, const F* delta,
                            F* weights, F* d_weights) {
  for (int64_t j = begin; j < end; ++j)
    for (int64_t i = 0; i < lanes; i += kWidth<F>) {
      auto &p = vec(weights + j * kRows + i), &d = vec(d_weights + j * kRows + i);
      p = exp2_of(p - vec(lse + i));
      d = p * (d - vec(delta + i));
    }
}

template <class T, class F> struct BackwardInputs {
  Qkv<const T> in;
  Heads<const T> out, d_out;
  F scale;
  const F *lse, *keys = nullptr, *values = nullptr;  // keys and values packed
};

template <class T, class F>
void backward_rows(const RowBlock<F>& rows, const BackwardInputs<T, F>& x, Heads<T> dq, bool add,
                   F* dk, F* dv, F* scratch) {
  const Problem& n = rows.n;
  const int64_t width = packed_width<F>(n.dim), lanes = rows.lanes();
  F *q = scratch, *d_out = q + kRows * width, *d_q = d_out + kRows * width;
  F *p = d_q + kRows * width, *ds = p + kKeys * kRows, *q_t = ds + kKeys * kRows,
    *d_out_t = q_t + n.dim * kRows;
  alignas(64) F lse[kRows] = {}, delta[kRows] = {};
  rows.pack(x.in.q, x.scale, q);
  rows.transpose(q, std::numbers::log2e_v<F>, q_t);
  rows.pack(x.d_out, F(1), d_out);
  rows.transpose(d_out, F(1), d_out_t);
  std::fill_n(d_q, kRows * width, F(0));
  for (int64_t i = 0; i < rows.rows; ++i) {
    const T* y = x.out.at(rows.token(i), rows.head(i));
    F sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < n.dim; ++d) sum += F(y[d]) * d_out[i * width + d];
    delta[i] = sum;
    lse[i] = x.lse[rows.token(i) * n.heads + rows.head(i)];
  }
  for (int64_t block = rows.any.begin / kKeys; block * kKeys < rows.any.end; ++block) {
    const auto in = rows.in_block(block);
    const int64_t count = in.end - in.begin, local = (block * kKeys + in.begin) * width;
    const int64_t at = rows.kv * n.padded_keys() * width + local;
    F *p_in = p + in.begin * kRows, *ds_in = ds + in.begin * kRows;
    block_gemm<false>(count, lanes, n.dim, x.keys + at, width, q_t, kRows, p_in, kRows, false);
    block_gemm<false>(count, lanes, n.dim, x.values + at, width, d_out_t, kRows, ds_in, kRows,
                      false);
    rows.mask(block, in, p);
    softmax_backward_block(in.begin, in.end, lanes, lse, delta, p, ds);
    block_gemm<false>(count, n.dim, rows.rows, p_in, kRows, d_out, width, dv + local, width, true);
    block_gemm<false>(count, n.dim, rows.rows, ds_in, kRows, q, width, dk + local, width, true);
    block_gemm<true>(rows.rows, n.dim, count, ds_in, kRows, x.keys + at, width, d_q, width, true);
  }
  for (int64_t i = 0; i < rows.rows; ++i) {
    T* y = dq.at(rows.token(i), rows.head(i));
    for (int64_t d = 0; d < n.dim; ++d)
      y[d] = narrow<T>((add ? F(y[d]) : F(0)) + x.scale * d_q[i * width + d]);
  }
}

// Adds the parts of a gradient of keys or values and writes it.
template <class T, class F>
void sum_parts(const Problem& n, const F* partial, int64_t parts, Heads<T> dst, bool add) {
  const int64_t width = packed_width<F>(n.dim), padded = n.padded_keys();
#pragma omp for schedule(static) nowait
  for (int64_t r = 0; r < n.kv_count() * n.keys; ++r) {
    const int64_t kv = r / n.keys, j = r % n.keys;
    const F* from = partial + (kv * parts * padded + j) * width;
    T* y = dst.at(kv / n.kv_heads * n.keys + j, kv % n.kv_heads);
    for (int64_t d = 0; d < n.dim; ++d) {
      F sum = add ? F(y[d]) : F(0);
      for (int64_t part = 0; part < parts; ++part) sum += from[part * padded * width + d];
      y[d] = narrow<T>(sum);
    }
  }
}

template <class T, class F = cpu::Acc<T>>
void backward(const Problem& n, BackwardInputs<T, F> x, Qkv<T> dst, bool add, Space& space) {
  const int64_t parts = backward_parts(n), size = n.padded_keys() * packed_width<F>(n.dim);
  F *keys = space.keys.data<F>(), *values = space.values.data<F>(),
    *scratch = space.scratch.data<F>();
  F *d_keys = space.d_keys.data<F>(), *d_values = space.d_values.data<F>();
  x.keys = keys;
  x.values = values;
#pragma omp parallel if (forward_flops(n) > kFlopsForThreads)
  {
    pack_keys(n, x.in.k, keys);
    pack_keys(n, x.in.v, values);
#pragma omp barrier
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < n.kv_count() * parts; ++task) {
      F *dk = d_keys + task * size, *dv = d_values + task * size;
      std::fill_n(dk, size, F(0));
      std::fill_n(dv, size, F(0));
      for (int64_t block = task % parts; block < n.row_blocks(); block += parts)
        backward_rows(RowBlock<F>(n, task / parts, block), x, dst.q, add, dk, dv,
                      scratch + omp_get_thread_num() * backward_scratch<F>(n.dim));
    }
    sum_parts(n, d_keys, parts, dst.k, add);
    sum_parts(n, d_values, parts, dst.v, add);
  }
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
                 const AttentionMask& mask, Loc at) {
  Op op(tape, "attention", at, {{"qkv", qkv}});
  require_shape(op, qkv, shape, mask.window);
  const Tensor start = mask.document_start;
  op.require(!start || (start.shape() == Shape{qkv.dim(0)} && start.dtype() == DType::i32 &&
                        start.device() == qkv.device()),
             "document_start must be int32[{}] on {}, it is {}", qkv.dim(0), name_of(qkv.device()),
             start.str());
  const DType wide = master_dtype(qkv.dtype());
  const Problem n{shape.batch,    shape.sequence, shape.sequence, 0,    shape.heads,
                  shape.kv_heads, shape.head_dim, mask.window,    start};
  const int64_t out_width = shape.heads * shape.head_dim;
  Tensor y = op.output("attention", {qkv.dim(0), out_width}, qkv.dtype());
  Tensor lse = op.workspace("attention_lse", {qkv.dim(0), shape.heads}, wide);
  const double flops = forward_flops(n), bytes = double(qkv.nbytes() + y.nbytes());
  {
    Space space = space_for(op, n, false, wide);
    op.run({.flops = flops, .bytes = bytes}, [&] {
      by_float(qkv.dtype(), [&](auto z) {
        using T = decltype(z);
        using F = cpu::Acc<T>;
        forward<T>(n, split(qkv.data<T>(), shape), F(scale),
                   {y.data<T>(), out_width, shape.head_dim}, lse.data<F>(), space);
      });
    });
  }
  op.backward([=](Op& op) {
    const Tensor dy = op.grad(y);
    auto d = op.accumulate(qkv);
    if (!d) return;
    Space space = space_for(op, n, true, wide);
    op.run({.flops = 2.5 * flops, .bytes = 2 * bytes}, [&] {
      by_float(qkv.dtype(), [&](auto z) {
        using T = decltype(z);
        using F = cpu::Acc<T>;
        const Heads<const T> out{y.data<T>(), out_width, shape.head_dim},
            d_out{dy.data<T>(), out_width, shape.head_dim};
        const BackwardInputs<T, F> x{split(qkv.data<T>(), shape), out, d_out, F(scale),
                                     lse.data<F>()};
        backward<T>(n, x, split(d.tensor.data<T>(), shape), d.add, space);
      });
    });
  });
  return y;
}

Tensor attention_cached(Tape& tape, const Tensor& qkv, KvCache& cache, const AttentionShape& shape,
                        float scale, int64_t window, Loc at) {
  Op op(tape, "attention_cached", at, {{"qkv", qkv}, {"kv", cache.kv}});
  require_shape(op, qkv, shape, window);
  const int64_t kv_width = 2 * shape.kv_heads * shape.head_dim;
  const int64_t out_width = shape.heads * shape.head_dim;
  const int64_t capacity = cache.kv.rows(), before = cache.length;
  op.require(!tape.recording() && shape.batch == 1,
             "needs one sequence and a tape that does not record");
  op.require(cache.kv.dtype() == qkv.dtype() && cache.kv.cols() == kv_width,
             "the cache must be {}[capacity, {}]", name_of(qkv.dtype()), kv_width);
  op.require(before + shape.sequence <= capacity,
             "the cache has room for {} tokens, {} + {} are asked", capacity, before,
             shape.sequence);
  cache.length += shape.sequence;
  const int64_t dim = shape.head_dim;
  const Problem n{1, shape.sequence, cache.length, before, shape.heads, shape.kv_heads, dim, window,
                  {}};
  Tensor y = op.output("attention", {qkv.dim(0), out_width}, qkv.dtype());
  Space space = space_for(op, n, false, master_dtype(qkv.dtype()));
  const double read = double(cache.length * kv_width) * double(size_of(qkv.dtype()));
  op.run({.flops = forward_flops(n), .bytes = double(qkv.nbytes() + y.nbytes()) + read}, [&] {
    by_float(qkv.dtype(), [&](auto z) {
      using T = decltype(z);
      const T* from = qkv.data<T>() + out_width;
      T* kv = cache.kv.data<T>();
      for (int64_t i = 0; i < shape.sequence; ++i)
        std::copy_n(from + i * shape.width(), kv_width, kv + (before + i) * kv_width);
      const Heads<const T> k{kv, kv_width, dim}, v{kv + kv_width / 2, kv_width, dim};
      forward<T>(n, {split(qkv.data<T>(), shape).q, k, v}, scale, {y.data<T>(), out_width, dim},
                 nullptr, space);
    });
  });
  return y;
}

}  // namespace pith
