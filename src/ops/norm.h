#pragma once
// RMSNorm (Zhang & Sennrich 2019), as Hugging Face computes it: statistics in fp32 (fp64 for fp64),
// the normalized value rounded to the compute dtype before the weight is applied.

#include "core/op.h"

namespace pith {

struct AddNorm {
  Tensor y;    // sum / sqrt(mean(sum^2) + eps) * w
  Tensor sum;  // x + delta
};
// x[T, H], w[H]. One pass for the residual addition that opens a stage; an empty delta means sum =
// x.
AddNorm add_rms_norm(Tape& tape, const Tensor& x, const Tensor& delta, Param& w, float eps,
                     Loc at = Loc::current());

}  // namespace pith
