#pragma once
// Linear layers and their deferred weight gradients. Letters: T rows, K in, N out, E experts, R
// rows of all experts.

#include "core/op.h"

namespace pith {

// y[T, N] = x[T, K] w[N, K]^T (+ bias[N]). `out` defaults to x's dtype; fp32 out of bf16 in keeps
// the accumulator (router logits). dx is computed in backward; the weight gradient is deferred to
// the tape's queue.
struct LinearOptions {
  Param* bias = nullptr;
  DType out = DType::u8;  // u8: as x
};
Tensor linear(Tape& tape, const Tensor& x, Param& w, LinearOptions options = {},
              Loc at = Loc::current());

// y[R, N]: rows [offsets[e], offsets[e + 1]) of x[R, K] times w[e][N, K]^T; w is [E, N, K], offsets
// i32 [E + 1]. Empty experts are fine.
Tensor grouped_linear(Tape& tape, const Tensor& x, Param& w, const Tensor& offsets,
                      Loc at = Loc::current());

// Executes and clears queues: grad(param) += dy^T x. The records of one parameter run next to each
// other whatever their micro-batch, in order of micro-batch, so the result does not depend on how
// many are flushed together.
void flush_wgrads(Context& context, std::span<WgradQueue*> queues);

}  // namespace pith
