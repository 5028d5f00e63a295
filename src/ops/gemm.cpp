#include "ops/gemm.h"

#include <cblas.h>

#include <dnnl.hpp>

namespace pith::cpu {
static dnnl::memory::desc describe(int64_t rows, int64_t cols, bool transposed, DType t) {
  using Memory = dnnl::memory;
  return {{rows, cols},
          t == DType::bf16 ? Memory::data_type::bf16 : Memory::data_type::f32,
          transposed ? Memory::dims{1, rows} : Memory::dims{cols, 1}};
}

// The dimension that follows the data (rows of a micro-batch or of an expert: M, and K of a weight
// gradient) is left open, so that oneDNN finds the primitive in its cache: making one takes longer
// than running it. Scratch memory is kept from call to call.
static void bf16_gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const void* a,
                      const void* b, void* c, DType out, bool add) {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  static thread_local dnnl::stream stream(engine);
  static thread_local std::vector<std::byte> scratch;
  const int64_t open_m = trans_a ? m : DNNL_RUNTIME_DIM_VAL;
  const int64_t open_k = trans_a && !trans_b ? DNNL_RUNTIME_DIM_VAL : k;
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  dnnl::post_ops sum;
  if (add) sum.append_sum(1.0f);
  attr.set_post_ops(sum);
  const dnnl::matmul::primitive_desc plan(
      {describe(open_m, open_k, trans_a, DType::bf16), describe(open_k, n, trans_b, DType::bf16),
       describe(open_m, n, false, out)},
      attr, engine);
  scratch.resize(std::max(scratch.size(), plan.scratchpad_desc().get_size()));
  const auto memory = [](const dnnl::memory::desc& desc, const void* p) {
    return dnnl::memory(desc, engine, const_cast<void*>(p));
  };
  dnnl::matmul(plan).execute(
      stream, {{DNNL_ARG_SRC, memory(describe(m, k, trans_a, DType::bf16), a)},
               {DNNL_ARG_WEIGHTS, memory(describe(k, n, trans_b, DType::bf16), b)},
               {DNNL_ARG_DST, memory(describe(m, n, false, out), c)},
               {DNNL_ARG_SCRATCHPAD, memory(plan.scratchpad_desc(), scratch.data())}});
}

void gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const void* a, const void* b,
          DType in, void* c, DType out, bool add) {
  const bool known = in == DType::bf16 ? out == DType::f32 || (out == DType::bf16 && !add)
                                       : in == out && (in == DType::f32 || in == DType::f64);
  if (!known)
    fail("no matrix product {} -> {}{}", name_of(in), name_of(out), add ? " that adds" : "");
  if (m == 0 || n == 0) return;
  if (k == 0) {  // the libraries refuse it or leave C as it was
    if (!add) std::memset(c, 0, m * n * size_of(out));
    return;
  }
  const int64_t lda = trans_a ? m : k, ldb = trans_b ? k : n;
  if (in == DType::f64) {
    cblas_dgemm(CblasRowMajor, trans_a ? CblasTrans : CblasNoTrans,
                trans_b ? CblasTrans : CblasNoTrans, m, n, k, 1.0, static_cast<const double*>(a),
                lda, static_cast<const double*>(b), ldb, add, static_cast<double*>(c), n);
  } else if (in == DType::f32) {
    const dnnl::status s = dnnl::sgemm(
        trans_a ? 'T' : 'N', trans_b ? 'T' : 'N', m, n, k, 1.0f, static_cast<const float*>(a), lda,
        static_cast<const float*>(b), ldb, add, static_cast<float*>(c), n);
    if (s != dnnl::status::success) fail("oneDNN sgemm of [{}, {}, {}] failed", m, n, k);
  } else if (__builtin_cpu_supports("avx512bf16")) {
    bf16_gemm(trans_a, trans_b, m, n, k, a, b, c, out, add);
  } else {
    warn_once("this processor lacks avx512_bf16: bf16 matrices are multiplied in fp32");
    gemm_bf16_as_fp32(trans_a, trans_b, m, n, k, a, b, c, out, add);
  }
}

void gemm_bf16_as_fp32(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const void* a,
                       const void* b, void* c, DType out, bool add) {
  const bf16 *pa = static_cast<const bf16*>(a), *pb = static_cast<const bf16*>(b);
  const std::vector<float> wide_a(pa, pa + m * k), wide_b(pb, pb + k * n);
  std::vector<float> wide_c(out == DType::bf16 ? m * n : 0);
  gemm(trans_a, trans_b, m, n, k, wide_a.data(), wide_b.data(), DType::f32,
       out == DType::bf16 ? wide_c.data() : c, DType::f32, add);
  for (size_t i = 0; i < wide_c.size(); ++i) static_cast<bf16*>(c)[i] = bf16(wide_c[i]);
}

}  // namespace pith::cpu
