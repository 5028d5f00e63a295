#include "ops/gemm.h"

#include <cblas.h>
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <dnnl.hpp>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

namespace pith::cpu {
namespace {

struct Problem {
  bool trans_a, trans_b;
  int64_t m, n, k;
  bool add;
};

void sgemm(const Problem& g, const float* a, const float* b, float* c) {
  const dnnl::status s =
      dnnl::sgemm(g.trans_a ? 'T' : 'N', g.trans_b ? 'T' : 'N', g.m, g.n, g.k, 1.0f, a,
                  g.trans_a ? g.m : g.k, b, g.trans_b ? g.k : g.n, g.add ? 1.0f : 0.0f, c, g.n);
  if (s != dnnl::status::success) fail("oneDNN sgemm of [{}, {}, {}] failed", g.m, g.n, g.k);
}

void dgemm(const Problem& g, const double* a, const double* b, double* c) {
  cblas_dgemm(CblasRowMajor, g.trans_a ? CblasTrans : CblasNoTrans,
              g.trans_b ? CblasTrans : CblasNoTrans, g.m, g.n, g.k, 1.0, a, g.trans_a ? g.m : g.k,
              b, g.trans_b ? g.k : g.n, g.add ? 1.0 : 0.0, c, g.n);
}

const dnnl::engine& engine() {
  static const dnnl::engine e(dnnl::engine::kind::cpu, 0);
  return e;
}

using MemoryDesc = dnnl::memory::desc;

MemoryDesc describe(int64_t rows, int64_t cols, bool transposed, DType t) {
  return {{rows, cols},
          t == DType::bf16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32,
          transposed ? dnnl::memory::dims{1, rows} : dnnl::memory::dims{cols, 1}};
}

// Making a primitive takes longer than running it, so the dimension that follows the data (rows of
// a micro-batch or of an expert: M, and K of a weight gradient) is left open and the primitive is
// kept. Scratch memory is the caller's because oneDNN's own belongs to the thread that made the
// primitive.
dnnl::matmul make_matmul(const Problem& g, DType out) {
  const int64_t open = DNNL_RUNTIME_DIM_VAL;
  const int64_t m = g.trans_a ? g.m : open, k = g.trans_a && !g.trans_b ? open : g.k;
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if (g.add) {
    dnnl::post_ops ops;
    ops.append_sum(1.0f);
    attr.set_post_ops(ops);
  }
  const dnnl::matmul::desc desc(describe(m, k, g.trans_a, DType::bf16),
                                describe(k, g.n, g.trans_b, DType::bf16),
                                describe(m, g.n, false, out));
  return dnnl::matmul({desc, attr, engine()});
}

dnnl::matmul cached_matmul(const Problem& g, DType out) {
  using Key = std::tuple<bool, bool, bool, DType, int64_t, int64_t, int64_t, int>;
  static std::mutex mutex;
  static std::map<Key, dnnl::matmul> cache;
  // A primitive is planned for the threads it is made under.
  const int threads = omp_in_parallel() ? 1 : omp_get_max_threads();
  const Key key{g.trans_a,
                g.trans_b,
                g.add,
                out,
                g.trans_a ? g.m : -1,
                g.n,
                g.trans_a && !g.trans_b ? -1 : g.k,
                threads};
  std::lock_guard lock(mutex);
  auto found = cache.find(key);
  if (cache.size() > 2048) cache.clear(), found = cache.end();
  if (found == cache.end()) found = cache.emplace(key, make_matmul(g, out)).first;
  return found->second;
}

// A product this small ends before a second thread has begun; sgemm and dgemm see that themselves.
constexpr int64_t kOneThread = 1 << 17;

struct LimitThreads {
  const int before = omp_get_max_threads();
  explicit LimitThreads(bool one) {
    if (one) omp_set_num_threads(1);
  }
  ~LimitThreads() { omp_set_num_threads(before); }
};

void bf16_gemm(const Problem& g, const void* a, const void* b, void* c, DType out) {
  const LimitThreads limit(g.m * g.n * g.k <= kOneThread);
  static thread_local dnnl::stream stream(engine());
  static thread_local std::vector<std::byte> scratch;
  const dnnl::matmul matmul = cached_matmul(g, out);
  const auto memory = [](const MemoryDesc& desc, const void* p) {
    return dnnl::memory(desc, engine(), const_cast<void*>(p));
  };
  const auto* pd = matmul.get_primitive_desc();
  const MemoryDesc scratch_desc(*dnnl_primitive_desc_query_md(pd, dnnl_query_scratchpad_md, 0));
  if (scratch.size() < scratch_desc.get_size()) scratch.resize(scratch_desc.get_size());
  matmul.execute(stream, {{DNNL_ARG_SRC, memory(describe(g.m, g.k, g.trans_a, DType::bf16), a)},
                          {DNNL_ARG_WEIGHTS, memory(describe(g.k, g.n, g.trans_b, DType::bf16), b)},
                          {DNNL_ARG_DST, memory(describe(g.m, g.n, false, out), c)},
                          {DNNL_ARG_SCRATCHPAD, memory(scratch_desc, scratch.data())}});
}

bool has_bf16_dot() {
  static const bool has = __builtin_cpu_supports("avx512bf16");
  if (!has)
    warn_once(
        "this processor has no bf16 dot product (avx512_bf16): bf16 matrices are multiplied in "
        "fp32");
  return has;
}

std::vector<float> widen(const void* from, int64_t n) {
  std::vector<float> to(n);
  const bf16* p = static_cast<const bf16*>(from);
#pragma omp parallel for simd if (n > 65536)
  for (int64_t i = 0; i < n; ++i) to[i] = p[i];
  return to;
}

}  // namespace

void gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const void* a, const void* b,
          DType in, void* c, DType out, bool add) {
  const bool known = in == DType::bf16 ? out == DType::f32 || (out == DType::bf16 && !add)
                                       : in == out && (in == DType::f32 || in == DType::f64);
  if (!known)
    fail("no matrix product {} -> {}{}", name_of(in), name_of(out), add ? " that adds" : "");
  if (m == 0 || n == 0) return;
  if (k == 0) {  // the libraries refuse it or leave C as it was
    if (!add) std::memset(c, 0, offset_bytes(out, m * n));
    return;
  }
  const Problem g{trans_a, trans_b, m, n, k, add};
  if (in == DType::f64)
    dgemm(g, static_cast<const double*>(a), static_cast<const double*>(b), static_cast<double*>(c));
  else if (in == DType::f32)
    sgemm(g, static_cast<const float*>(a), static_cast<const float*>(b), static_cast<float*>(c));
  else if (has_bf16_dot())
    bf16_gemm(g, a, b, c, out);
  else
    gemm_bf16_as_fp32(trans_a, trans_b, m, n, k, a, b, c, out, add);
}

void gemm_bf16_as_fp32(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const void* a,
                       const void* b, void* c, DType out, bool add) {
  const std::vector<float> wide_a = widen(a, m * k), wide_b = widen(b, k * n);
  const Problem g{trans_a, trans_b, m, n, k, add};
  if (out == DType::f32) return sgemm(g, wide_a.data(), wide_b.data(), static_cast<float*>(c));
  std::vector<float> wide_c(m * n);
  sgemm(g, wide_a.data(), wide_b.data(), wide_c.data());
  bf16* to = static_cast<bf16*>(c);
#pragma omp parallel for simd if (m * n > 65536)
  for (int64_t i = 0; i < m * n; ++i) to[i] = bf16(wide_c[i]);
}

}  // namespace pith::cpu
