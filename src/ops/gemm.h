#pragma once
// Matrix multiplication on the CPU through libraries: oneDNN for fp32 and bf16, OpenBLAS for fp64.
// All matrices are row-major and contiguous.

#include <exception>

#include "core/tensor.h"

namespace pith::cpu {

// C[m, n] = (add ? C : 0) + op(A) op(B), where op(A) is [m, k] and op(B) is [k, n]; a transposed
// operand is stored [k, m] or [n, k]. Types (in -> out): fp64 -> fp64, fp32 -> fp32, bf16 -> bf16
// (only add = false), bf16 -> fp32. Any of m, n, k may be 0; k = 0 writes zeros unless add. Uses
// all OpenMP threads, or one inside a parallel region. Bit-equal from run to run at equal threads.
void gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const void* a, const void* b,
          DType in, void* c, DType out, bool add);

// What gemm does with bf16 operands where the processor has no bf16 dot product: through fp32
// copies.
void gemm_bf16_as_fp32(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const void* a,
                       const void* b, void* c, DType out, bool add);

// Runs task(0) ... task(count - 1) over the threads, first come first served, one thread each (a
// gemm inside uses one); a single task has all threads. Tasks must be independent. Rethrows the
// first exception.
template <class F> void parallel_tasks(int64_t count, F&& task) {
  if (count == 1) return task(0);  // in no team: libgomp would start new threads inside one
  std::exception_ptr error;
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < count; ++i) {
    try {
      task(i);
    } catch (...) {
#pragma omp critical(pith_task_error)
      if (!error) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace pith::cpu
