// Products of the host for the checks of a build without a BLAS.
#include "runtime/linalg.h"

namespace lowband {

template <class Real>
void gemm(Op op_a, Op op_b, Real alpha, MatrixView<const Real> a, MatrixView<const Real> b, Real beta,
          MatrixView<Real> c) {
  const Index inner = op_a == Op::kNone ? a.cols : a.rows;
  for (Index i = 0; i < c.rows; ++i) {
    for (Index j = 0; j < c.cols; ++j) {
      Real sum = 0;
      for (Index k = 0; k < inner; ++k)
        sum += (op_a == Op::kNone ? a(i, k) : a(k, i)) * (op_b == Op::kNone ? b(k, j) : b(j, k));
      c(i, j) = alpha * sum + (beta == Real{0} ? Real{0} : beta * c(i, j));
    }
  }
}

template void gemm(Op, Op, float, MatrixView<const float>, MatrixView<const float>, float, MatrixView<float>);
template void gemm(Op, Op, double, MatrixView<const double>, MatrixView<const double>, double,
                   MatrixView<double>);

}  // namespace lowband
