#include "runtime/cpu/blas.h"
#include "runtime/cpu/gemm.h"

namespace lowband {

void library_gemm(Op op_a, Op op_b, float alpha, MatrixView<const float> a, MatrixView<const float> b,
                  float beta, MatrixView<float> c, Index inner) {
  // Row-major C = op(A) op(B) is column-major C^T = op(B)^T op(A)^T, so the operands change places.
  const auto letter = [](Op op) { return op == Op::kNone ? 'N' : 'T'; };
  const char trans_first = letter(op_b), trans_second = letter(op_a);
  const int m = static_cast<int>(c.cols), n = static_cast<int>(c.rows), k = static_cast<int>(inner);
  const int ld_first = static_cast<int>(b.row_stride), ld_second = static_cast<int>(a.row_stride);
  const int ld_c = static_cast<int>(c.row_stride);
  sgemm_(&trans_first, &trans_second, &m, &n, &k, &alpha, b.data, &ld_first, a.data, &ld_second, &beta,
         c.data, &ld_c);
}

std::string float_gemm_library() { return "BLAS"; }

}  // namespace lowband
