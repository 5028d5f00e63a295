#pragma once
// Updates and norms. They record nothing; the tape gives device, cost and location.

#include "core/op.h"

namespace pith {

// sum of squares of g, in fp64 over fixed blocks of elements (independent of the number of
// threads); infinity or NaN if any element is.
double sum_of_squares(Tape& tape, const Tensor& g, Loc at = Loc::current());

// AdamW (Loshchilov & Hutter 2019), as torch.optim.AdamW: g = grad * grad_scale; m, v moments; bias
// correction by `step` (1-based); master -= lr * (m^ / (sqrt(v^) + eps) + weight_decay * master).
// Tensors of one shape; `value` (compute dtype) receives the rounded master, the others have its
// master dtype.
struct AdamW {
  double lr, beta1, beta2, eps, weight_decay, grad_scale;
  int64_t step;
};
void adamw_update(Tape& tape, const AdamW& rule, const Tensor& grad, Tensor m, Tensor v,
                  Tensor master, Tensor value, Loc at = Loc::current());

// Muon (Jordan et al. 2024; update scale of Liu et al. 2025, "Muon is scalable for LLM training"),
// for one matrix [r, c] or a batch [b, r, c] of matrices: momentum buf = lerp(buf, g, 1 -
// momentum), update = lerp(g, buf, momentum) (Nesterov), orthogonalized by five Newton-Schulz
// iterations with (3.4445, -4.7750, 2.0315) after dividing by the Frobenius norm + 1e-7, scaled by
// 0.2 sqrt(max(r, c)); master = master (1 - lr wd) - lr update. On a GPU the iterations multiply in
// TF32, which moves the update by up to 1% of its largest element.
struct Muon {
  double lr, momentum, weight_decay, grad_scale;
};
void muon_update(Tape& tape, const Muon& rule, const Tensor& grad, Tensor buf, Tensor master,
                 Tensor value, Loc at = Loc::current());

}  // namespace pith
