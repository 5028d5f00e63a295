#pragma once
// Plain differentiable ops, so that a new idea needs no new kernel. Matrices are [rows, cols]; a
// tensor of higher rank is seen as [dim(0), rest] where a row matters. Broadcasting: b may have the
// shape of a, one row ([cols] or [1, cols]), one column ([rows, 1]), or one element ([1]).

#include "core/op.h"

namespace pith {

Tensor add(Tape&, const Tensor& a, const Tensor& b, Loc at = Loc::current());
Tensor sub(Tape&, const Tensor& a, const Tensor& b, Loc at = Loc::current());
Tensor mul(Tape&, const Tensor& a, const Tensor& b, Loc at = Loc::current());
Tensor div(Tape&, const Tensor& a, const Tensor& b, Loc at = Loc::current());
Tensor exp(Tape&, const Tensor& x, Loc at = Loc::current());
Tensor log(Tape&, const Tensor& x, Loc at = Loc::current());
Tensor sigmoid(Tape&, const Tensor& x, Loc at = Loc::current());
Tensor softmax(Tape&, const Tensor& x, Loc at = Loc::current());  // over columns
// dim 0: down the columns, [rows, cols] -> [1, cols]; dim 1: along the rows, -> [rows, 1].
Tensor sum(Tape&, const Tensor& x, int dim, Loc at = Loc::current());
Tensor mean(Tape&, const Tensor& x, Loc at = Loc::current());  // all elements -> [1]
Tensor matmul(Tape&, const Tensor& a, const Tensor& b, Loc at = Loc::current());  // [m, k] [k, n]
Tensor transpose(Tape&, const Tensor& x, Loc at = Loc::current());  // [m, n] -> [n, m]
// dim 0: rows [begin, end); dim 1: columns.
Tensor slice(Tape&, const Tensor& x, int dim, int64_t begin, int64_t end, Loc at = Loc::current());
// dim 0: the rows of b below those of a; dim 1: its columns beside them.
Tensor concat(Tape&, const Tensor& a, const Tensor& b, int dim, Loc at = Loc::current());
Tensor where(Tape&, const Tensor& mask_u8, const Tensor& a, const Tensor& b,
             Loc at = Loc::current());
Tensor gather_cols(Tape&, const Tensor& x, const Tensor& index,
                   Loc at = Loc::current());  // index i32 [rows, k]
Tensor top_k(Tape&, const Tensor& x, int64_t k,
             Loc at = Loc::current());  // i32 [rows, k], best first; no gradient
Tensor cast(Tape&, const Tensor& x, DType to, Loc at = Loc::current());

}  // namespace pith
