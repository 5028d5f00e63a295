#pragma once
// Launchers of the CUDA kernels, one block per name.cu; name.cpp calls them where its tape runs on a GPU, after its
// checks. All are asynchronous on `stream`, read and write device memory only, and may be called again before they
// have run. Shapes, dtypes and formulas are those of the op in name.h; "wide" is fp32.

#include "core/op.h"

struct CUstream_st;

namespace pith::cuda {

using Stream = CUstream_st*;

// grouped_gemm.cu. Rows [offsets[e], offsets[e + 1]) belong to expert e; w is [E, N, K]; no host reads offsets.
// y[R, N] = x[R, K] w[e]^T. Rows behind the last expert's are not written.
void grouped_forward(const Tensor& x, const Tensor& w, const Tensor& offsets, Tensor y, Stream);
// dx[R, K] = dy[R, N] w[e]
void grouped_input_gradient(const Tensor& dy, const Tensor& w, const Tensor& offsets, Tensor dx,
                            Stream);
// dw[e][N, K] (+)= the sum over the records of dy[rows of e, N]^T x[rows of e, K]. One pass over dw for up to 8
// records. fp32 or bf16 dw.
void grouped_weight_gradient(std::span<const WgradRecord* const> records, Op::Into dw, Stream);

}  // namespace pith::cuda
