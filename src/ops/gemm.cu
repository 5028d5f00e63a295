#include <cublasLt.h>

#include <map>
#include <tuple>

#include "core/cuda_helpers.cuh"
#include "ops/cuda.h"

// Dense products through cuBLASLt, which is loaded at run time. It thinks in columns: a row-major [m, n] is its [n, m],
// so c^T = b^T a^T is what it computes.

namespace pith::cuda {
namespace {


void check(cublasStatus_t s) {
  if (s != CUBLAS_STATUS_SUCCESS) fail("cuBLASLt: status {}", int(s));
}

// The functions of the library, by name.
struct CublasLt {
  void* library = cuda::load_library("libcublasLt.so.13");
  PITH_LOADED(cublasLtCreate);
  PITH_LOADED(cublasLtMatmul);
  PITH_LOADED(cublasLtMatmulDescCreate);
  PITH_LOADED(cublasLtMatmulDescSetAttribute);
  PITH_LOADED(cublasLtMatrixLayoutCreate);
  PITH_LOADED(cublasLtMatrixLayoutSetAttribute);
  PITH_LOADED(cublasLtMatmulPreferenceCreate);
  PITH_LOADED(cublasLtMatmulPreferenceSetAttribute);
  PITH_LOADED(cublasLtMatmulAlgoGetHeuristic);
  cublasLtHandle_t handle = [this] {
    cublasLtHandle_t h = nullptr;
    check(cublasLtCreate(&h));
    return h;
  }();
  Tensor workspace{{kGemmWorkspace}, DType::u8, Device::cuda, "cublas_workspace"};
};

template <class F, class To, class Key, class Value>
void set(F function, To to, Key key, const Value& value) {
  check(function(to, key, &value, sizeof value));
}

CublasLt& lt() {
  static CublasLt& the = *new CublasLt;  // never freed: the driver may be gone at exit
  return the;
}

cudaDataType_t type_of(DType t) {
  if (t == DType::bf16) return CUDA_R_16BF;
  if (t == DType::f32) return CUDA_R_32F;
  fail("no CUDA matrix product of {}", name_of(t));
}

struct Plan {
  cublasLtMatmulDesc_t product = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr;
  cublasLtMatmulHeuristicResult_t chosen{};
};

// Without a batch products are those of bf16 or fp32, with one of TF32.
using Key = std::tuple<bool, bool, int64_t, int64_t, int64_t, DType, DType, int64_t, uint32_t>;

Plan make_plan(const Key& key) {
  const auto& [trans_a, trans_b, m, n, k, in, out, batch, alignment] = key;
  CublasLt& l = lt();
  Plan p;
  check(l.cublasLtMatmulDescCreate(
      &p.product, batch > 0 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F));
  // Its first operand is b.
  set(l.cublasLtMatmulDescSetAttribute, p.product, CUBLASLT_MATMUL_DESC_TRANSA,
      trans_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(l.cublasLtMatmulDescSetAttribute, p.product, CUBLASLT_MATMUL_DESC_TRANSB,
      trans_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  const auto layout = [&](cublasLtMatrixLayout_t& to, DType t, int64_t rows, int64_t cols) {
    check(l.cublasLtMatrixLayoutCreate(&to, type_of(t), uint64_t(cols), uint64_t(rows), cols));
    if (batch == 0) return;
    set(l.cublasLtMatrixLayoutSetAttribute, to, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, int32_t(batch));
    set(l.cublasLtMatrixLayoutSetAttribute, to, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
        rows * cols);
  };
  layout(p.a, in, trans_a ? k : m, trans_a ? m : k);
  layout(p.b, in, trans_b ? n : k, trans_b ? k : n);
  layout(p.c, out, m, n);
  cublasLtMatmulPreference_t wish = nullptr;
  check(l.cublasLtMatmulPreferenceCreate(&wish));
  set(l.cublasLtMatmulPreferenceSetAttribute, wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
      kGemmWorkspace);
  for (const auto of_matrix :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
    set(l.cublasLtMatmulPreferenceSetAttribute, wish, of_matrix, alignment);
  int found = 0;
  check(l.cublasLtMatmulAlgoGetHeuristic(l.handle, p.product, p.b, p.a, p.c, p.c, wish, 1,
                                         &p.chosen, &found));
  if (found == 0) fail("cuBLASLt has no algorithm for [{}, {}, {}]", m, n, k);
  return p;
}

// batch 0: one product, not of TF32.
void multiply(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const void* a,
              const void* b, DType in, const Scaled& scaled, void* d, DType out, int64_t batch,
              Stream stream) {
  static std::map<Key, Plan> plans;
  // Rows and matrices of a batch may begin anywhere; what is aligned to 16 bytes is aligned enough for all.
  uintptr_t bits = uintptr_t(a) | uintptr_t(b) | uintptr_t(scaled.c) | uintptr_t(d);
  if (batch > 1) bits |= uintptr_t(m * k | k * n | m * n) * sizeof(float);
  const uint32_t alignment = bits % 16 == 0 ? 256 : uint32_t(bits & -bits);
  const Key key{trans_a, trans_b, m, n, k, in, out, batch, alignment};
  auto it = plans.find(key);
  if (it == plans.end()) it = plans.emplace(key, make_plan(key)).first;
  const Plan& p = it->second;
  CublasLt& l = lt();
  check(l.cublasLtMatmul(l.handle, p.product, &scaled.alpha, b, p.b, a, p.a, &scaled.beta, scaled.c,
                         p.c, d, p.c, &p.chosen.algo, l.workspace.raw(), kGemmWorkspace, stream));
}

}  // namespace

void gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const void* a, const void* b,
          DType in, void* c, DType out, bool add, Stream stream) {
  if (m == 0 || n == 0) return;
  if (k == 0) {
    if (!add) fill_zero(c, m * n * size_of(out));
    return;
  }
  multiply(trans_a, trans_b, m, n, k, a, b, in, {1, float(add), c}, c, out, 0, stream);
}

void gemm_tf32(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const void* a,
               const void* b, const Scaled& scaled, void* d, int64_t batch, Stream stream) {
  multiply(trans_a, trans_b, m, n, k, a, b, DType::f32, scaled, d, DType::f32, batch, stream);
}

}  // namespace pith::cuda
