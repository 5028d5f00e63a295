#include <cublasLt.h>

#include <map>
#include <tuple>

#include "core/cuda.h"
#include "ops/cuda.h"
#include "ops/cuda_helpers.cuh"

// Dense products through cuBLASLt, which is loaded at run time. It thinks in columns: a row-major [m, n] is its [n, m],
// so c^T = b^T a^T is what it computes.

namespace pith::cuda {
namespace {

constexpr size_t kWorkspace = size_t(64) << 20;

// The functions of the library, by name.
#define PITH_CUBLAS(name) decltype(&::name) name = cuda::function<decltype(&::name)>(library, #name)
struct CublasLt {
  void* library = cuda::load_library("libcublasLt.so.13");
  PITH_CUBLAS(cublasLtCreate);
  PITH_CUBLAS(cublasLtMatmul);
  PITH_CUBLAS(cublasLtMatmulDescCreate);
  PITH_CUBLAS(cublasLtMatmulDescSetAttribute);
  PITH_CUBLAS(cublasLtMatrixLayoutCreate);
  PITH_CUBLAS(cublasLtMatmulPreferenceCreate);
  PITH_CUBLAS(cublasLtMatmulPreferenceSetAttribute);
  PITH_CUBLAS(cublasLtMatmulAlgoGetHeuristic);
  cublasLtHandle_t handle = nullptr;
  Tensor workspace{{int64_t(kWorkspace)}, DType::u8, Device::cuda, "cublas_workspace"};
};
#undef PITH_CUBLAS

void check(cublasStatus_t s) {
  if (s != CUBLAS_STATUS_SUCCESS) fail("cuBLASLt: status {}", int(s));
}

CublasLt& lt() {
  static CublasLt* const the = [] {
    auto* made = new CublasLt;  // never freed: the driver may be gone at exit
    check(made->cublasLtCreate(&made->handle));
    return made;
  }();
  return *the;
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

using Key = std::tuple<bool, bool, int64_t, int64_t, int64_t, DType, DType, bool>;

Plan make_plan(const Key& key) {
  const auto& [trans_a, trans_b, m, n, k, in, out, add] = key;
  CublasLt& l = lt();
  Plan p;
  check(l.cublasLtMatmulDescCreate(&p.product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  // Its first operand is b.
  const cublasOperation_t first = trans_b ? CUBLAS_OP_T : CUBLAS_OP_N,
                          second = trans_a ? CUBLAS_OP_T : CUBLAS_OP_N;
  check(l.cublasLtMatmulDescSetAttribute(p.product, CUBLASLT_MATMUL_DESC_TRANSA, &first,
                                         sizeof first));
  check(l.cublasLtMatmulDescSetAttribute(p.product, CUBLASLT_MATMUL_DESC_TRANSB, &second,
                                         sizeof second));
  const auto layout = [&](cublasLtMatrixLayout_t& to, DType t, int64_t rows, int64_t cols) {
    check(l.cublasLtMatrixLayoutCreate(&to, type_of(t), uint64_t(cols), uint64_t(rows), cols));
  };
  layout(p.a, in, trans_a ? k : m, trans_a ? m : k);
  layout(p.b, in, trans_b ? n : k, trans_b ? k : n);
  layout(p.c, out, m, n);
  cublasLtMatmulPreference_t wish = nullptr;
  check(l.cublasLtMatmulPreferenceCreate(&wish));
  check(l.cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                               &kWorkspace, sizeof kWorkspace));
  int found = 0;
  check(l.cublasLtMatmulAlgoGetHeuristic(l.handle, p.product, p.b, p.a, p.c, p.c, wish, 1,
                                         &p.chosen, &found));
  if (found == 0) fail("cuBLASLt has no algorithm for [{}, {}, {}]", m, n, k);
  return p;
}

}  // namespace

void gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const void* a, const void* b,
          DType in, void* c, DType out, bool add, Stream stream) {
  if (m == 0 || n == 0) return;
  if (k == 0) {
    if (!add) fill_zero(c, m * n * size_of(out));
    return;
  }
  static std::map<Key, Plan> plans;
  const Key key{trans_a, trans_b, m, n, k, in, out, add};
  auto it = plans.find(key);
  if (it == plans.end()) it = plans.emplace(key, make_plan(key)).first;
  const Plan& p = it->second;
  CublasLt& l = lt();
  const float alpha = 1, beta = add;
  check(l.cublasLtMatmul(l.handle, p.product, &alpha, b, p.b, a, p.a, &beta, c, p.c, c, p.c,
                         &p.chosen.algo, l.workspace.raw(), kWorkspace, stream));
}

}  // namespace pith::cuda
