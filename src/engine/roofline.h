#pragma once
#include "core/tensor.h"

namespace pith {

// The peak of this machine in FLOP/s for fp64, fp32 or bf16: every OpenMP thread multiplies matrices
// of its own through cpu::gemm at the same time, and the best rates of the threads are added, which
// no barrier and little other load can spoil. About 0.1 s; not counted in core/memory.h.
double measure_peak_flops(DType dtype);

}  // namespace pith
