#pragma once
// Updates and norms. They record nothing; the tape gives device, cost and location.

#include "core/op.h"

namespace pith {

// The sum of squares of each tensor, fp64 [n], over fixed blocks of elements (independent of the
// number of threads); infinity or NaN if any element is.
Tensor sum_of_squares(Tape& tape, std::span<const Tensor> tensors, Loc at = Loc::current());

// Clipping by the global norm, as torch.nn.utils.clip_grad_norm_, of gradients that are sums over
// `labels`: fp64 [2], the norm of the mean gradient and the factor min(1, clip / (norm + 1e-6)) /
// labels (clip 0: 1 / labels). It stays on the device, so that no step waits for its norm.
Tensor clip_by_norm(Tape& tape, const Tensor& squares, double labels, double clip,
                    Loc at = Loc::current());

// AdamW (Loshchilov & Hutter 2019), as torch.optim.AdamW: g = grad * norm[1]; m, v moments; bias
// correction by `step` (1-based); master -= lr * (m^ / (sqrt(v^) + eps) + weight_decay * master).
// `norm` is of clip_by_norm: where it is not finite nothing happens. Tensors of one shape: m, v
// and grad in the master dtype of `value` (grad also in bf16 where that is the value's); value and
// rest are the master (core/param.h).
struct AdamW {
  double lr, beta1, beta2, eps, weight_decay;
  int64_t step;
};
void adamw_update(Tape& tape, const AdamW& rule, const Tensor& norm, const Tensor& grad, Tensor m,
                  Tensor v, Tensor value, Tensor rest, Loc at = Loc::current());

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
