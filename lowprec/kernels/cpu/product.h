// A GEMM and the quantization of its left operand.
#pragma once
#include "task.h"

namespace lowprec {

// Q(x) right, or Q(x) right^T (turned), [m, n] in x's dtype: FP32 sums times the factors that belong after the GEMM,
// plus bias, rounded once.
//
// left:   Q, told nothing to write yet. side: the same x quantized for another GEMM, told what to write; or null
// right:  the other operand, decoded, FP32; after: its factor
// values: of Q(x), [m, k], to be kept; or null
//
// As whole matrices, the FP32 copies of x and y each pass through memory twice, and one kernel waits for all threads of
// another; where the GEMM is small, that is a good part of its time. Then a thread takes some rows through everything
// while its second-level cache holds them. Such sums may be added in another order.
at::Tensor multiply(const at::Tensor& x, Task& left, const Task* side, const at::Tensor& right, bool turned, float after,
                    const MaybeTensor& bias, at::Tensor* values);

}  // namespace lowprec
