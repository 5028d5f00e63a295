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
Tensor scale(Tape&, const Tensor& a, double factor, Loc at = Loc::current());
Tensor exp(Tape&, const Tensor& x, Loc at = Loc::current());
Tensor log(Tape&, const Tensor& x, Loc at = Loc::current());
Tensor sigmoid(Tape&, const Tensor& x, Loc at = Loc::current());
Tensor silu(Tape&, const Tensor& x, Loc at = Loc::current());
Tensor softmax(Tape&, const Tensor& x, Loc at = Loc::current());   // over columns
Tensor sum_cols(Tape&, const Tensor& x, Loc at = Loc::current());  // [rows, cols] -> [rows, 1]
Tensor sum_rows_to_one(Tape&, const Tensor& x,
                       Loc at = Loc::current());               // [rows, cols] -> [1, cols]
Tensor mean(Tape&, const Tensor& x, Loc at = Loc::current());  // all elements -> [1]
Tensor matmul(Tape&, const Tensor& a, const Tensor& b, Loc at = Loc::current());  // [m, k] [k, n]
Tensor transpose(Tape&, const Tensor& x, Loc at = Loc::current());  // [m, n] -> [n, m]
Tensor slice_rows(Tape&, const Tensor& x, int64_t begin, int64_t end, Loc at = Loc::current());
Tensor slice_cols(Tape&, const Tensor& x, int64_t begin, int64_t end, Loc at = Loc::current());
Tensor concat_rows(Tape&, const Tensor& a, const Tensor& b, Loc at = Loc::current());
Tensor concat_cols(Tape&, const Tensor& a, const Tensor& b, Loc at = Loc::current());
Tensor where(Tape&, const Tensor& mask_u8, const Tensor& a, const Tensor& b,
             Loc at = Loc::current());
Tensor gather_cols(Tape&, const Tensor& x, const Tensor& index,
                   Loc at = Loc::current());  // index i32 [rows, k]
Tensor top_k(Tape&, const Tensor& x, int64_t k,
             Loc at = Loc::current());  // i32 [rows, k], best first; no gradient
Tensor cast(Tape&, const Tensor& x, DType to, Loc at = Loc::current());

}  // namespace pith
