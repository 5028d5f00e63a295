#pragma once
// RMSNorm (Zhang & Sennrich 2019), as Hugging Face computes it: statistics in fp32 (fp64 for fp64),
// the normalized value rounded to the compute dtype before the weight is applied.

#include "core/op.h"

namespace pith {

// x[T, H], w[H]: y = x / sqrt(mean(x^2) + eps) * w
Tensor rms_norm(Tape& tape, const Tensor& x, Param& w, float eps, Loc at = Loc::current());

struct AddNorm {
  Tensor y;    // rms_norm(sum)
  Tensor sum;  // x + delta
};
// One pass for the residual addition that opens a stage. An empty delta means sum = x.
AddNorm add_rms_norm(Tape& tape, const Tensor& x, const Tensor& delta, Param& w, float eps,
                     Loc at = Loc::current());

}  // namespace pith
