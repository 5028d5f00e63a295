#pragma once
// The two ends of the model: token embedding, and the head with its cross entropy. V vocabulary, T
// tokens, H hidden.

#include "core/op.h"

namespace pith {

// ids i32 [T] in [0, V), w[V, H] -> [T, H]. Backward adds into the main gradient in order of
// tokens: deterministic.
Tensor embedding(Tape& tape, const Tensor& ids, Param& w, Loc at = Loc::current());

struct HeadLoss {
  // wide [1]: sum over labels >= 0 of -log softmax(x w^T)[label]; labels < 0 are ignored
  Tensor sum;
  Tensor token_loss;  // wide [T]: the terms; 0 where ignored. Not differentiable.
};
// labels i32 [T] below V. Chunked over tokens, so [T, V] logits never exist. While recording, the
// *sum* gradient of x and of w is made in the forward: w's goes straight into its main gradient,
// and backward hands out x's. The seed of `sum` must be 1 then; any other multiplies x's gradient
// and is refused if w has one. On a GPU the seed is not read: that would wait for it.
HeadLoss head_loss(Tape& tape, const Tensor& x, Param& w, const Tensor& labels,
                   Loc at = Loc::current());

}  // namespace pith
