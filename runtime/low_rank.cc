#include "runtime/low_rank.h"

#include "runtime/buffer.h"
#include "runtime/vector_kernels.h"

#include <algorithm>

namespace lowband {
namespace {

template <class T>
std::string shape(MatrixView<T> view) {
  return cat("(", view.rows, ", ", view.cols, ")");
}

template <class Real>
void expect_product(const char* function, Op op, MatrixView<const Real> m, MatrixView<const Real> q,
                    MatrixView<Real> out) {
  const Index rows = op == Op::kNone ? m.rows : m.cols, inner = op == Op::kNone ? m.cols : m.rows;
  LB_EXPECTS(q.rows == inner && out.rows == rows && q.cols == out.cols, function, ": found M ", shape(m),
             op == Op::kNone ? "" : "^T", ", Q ", shape(q), ", out ", shape(out), ", expected Q (", inner,
             ", r) and out (", rows, ", r)");
}

template <class Real>
void expect_same_shape(const char* function, MatrixView<const Real> a, MatrixView<const Real> b) {
  LB_EXPECTS(a.rows == b.rows && a.cols == b.cols, function, ": found matrices ", shape(a), " and ", shape(b),
             ", expected equal shapes");
}

template <class Real>
void expect_factors(const char* function, const FactorPair<Real>& factors, MatrixView<const Real> m) {
  LB_EXPECTS(
      factors.left.rows == m.rows && factors.right.rows == m.cols && factors.left.cols == factors.right.cols,
      function, ": found factors ", shape(factors.left), " and ", shape(factors.right), ", expected (",
      m.rows, ", r) and (", m.cols, ", r)");
}

// Rows of a panel whose `matrices` blocks of `cols` columns fit into half of a 512 KiB second-level cache.
template <class Real>
Index panel_rows(Index cols, Index matrices) {
  const Index row_bytes = std::max<Index>(1, cols) * matrices * static_cast<Index>(sizeof(Real));
  return std::max<Index>(8, (256 * 1024 / row_bytes) & ~Index{7});
}

}  // namespace

template <class Real>
void accumulate_and_multiply(Real alpha, MatrixView<const Real> g, MatrixView<Real> m, Op op,
                             MatrixView<const Real> q, MatrixView<Real> out) {
  expect_same_shape<Real>("accumulate_and_multiply", m, g);
  expect_product<Real>("accumulate_and_multiply", op, m, q, out);
  for (Index i = 0; i < m.rows; ++i) vector_kernels<Real>().axpy(alpha, g.row(i), m.row(i), m.cols);
  gemm<Real>(op, Op::kNone, Real{1}, m, q, Real{0}, out);
}

template <class Real>
void multiply(Op op, MatrixView<const Real> m, MatrixView<const Real> q, MatrixView<Real> out) {
  expect_product<Real>("multiply", op, m, q, out);
  gemm<Real>(op, Op::kNone, Real{1}, m, q, Real{0}, out);
}

template <class Real>
void add_product(Real alpha, const FactorPair<Real>& factors, Real beta, MatrixView<Real> m) {
  expect_factors<Real>("add_product", factors, m);
  gemm<Real>(Op::kNone, Op::kTranspose, alpha, factors.left, factors.right, beta, m);
}

template <class Real>
void decompress(const FactorPair<Real>& sent, const FactorPair<Real>& own, MatrixView<Real> d,
                MatrixView<Real> e) {
  expect_same_shape<Real>("decompress", d, e);
  expect_factors<Real>("decompress", sent, d);
  expect_factors<Real>("decompress", own, e);
  add_product<Real>(Real{-1}, own, Real{1}, e);
  add_product<Real>(Real{1}, sent, Real{0}, d);
}

template <class Real>
void decompress_and_update(const FactorPair<Real>& sent, const FactorPair<Real>& own, Real lambda, Real eta,
                           Real decay, MatrixView<Real> e, MatrixView<Real> u, MatrixView<Real> w) {
  expect_same_shape<Real>("decompress_and_update", e, u);
  expect_same_shape<Real>("decompress_and_update", e, w);
  expect_factors<Real>("decompress_and_update", sent, e);
  expect_factors<Real>("decompress_and_update", own, e);
  const VectorKernels<Real>& kernels = vector_kernels<Real>();
  const Index block_rows = panel_rows<Real>(e.cols, 4);
  Buffer<Real> block(std::min(block_rows, e.rows) * e.cols);
  for (Index begin = 0; begin < e.rows; begin += block_rows) {
    const Index rows = std::min(block_rows, e.rows - begin);
    const MatrixView<Real> d = block.matrix(0, rows, e.cols);
    add_product<Real>(Real{-1}, {own.left.row_block(begin, rows), own.right}, Real{1},
                      e.row_block(begin, rows));
    add_product<Real>(Real{1}, {sent.left.row_block(begin, rows), sent.right}, Real{0}, d);
    for (Index i = 0; i < rows; ++i) {
      Real* const momentum = u.row(begin + i);
      Real* const weight = w.row(begin + i);
      kernels.scale(lambda, momentum, e.cols);
      kernels.add(momentum, d.row(i), e.cols);
      kernels.scale(decay, weight, e.cols);
      kernels.axpy(-eta, d.row(i), weight, e.cols);
      kernels.axpy(-eta, momentum, weight, e.cols);
    }
  }
}

#define LB_INSTANTIATE(Real)                                                                              \
  template void accumulate_and_multiply<Real>(Real, MatrixView<const Real>, MatrixView<Real>, Op,         \
                                              MatrixView<const Real>, MatrixView<Real>);                  \
  template void multiply<Real>(Op, MatrixView<const Real>, MatrixView<const Real>, MatrixView<Real>);     \
  template void add_product<Real>(Real, const FactorPair<Real>&, Real, MatrixView<Real>);                 \
  template void decompress<Real>(const FactorPair<Real>&, const FactorPair<Real>&, MatrixView<Real>,      \
                                 MatrixView<Real>);                                                       \
  template void decompress_and_update<Real>(const FactorPair<Real>&, const FactorPair<Real>&, Real, Real, \
                                            Real, MatrixView<Real>, MatrixView<Real>, MatrixView<Real>);
LB_INSTANTIATE(float)
LB_INSTANTIATE(double)
#undef LB_INSTANTIATE

}  // namespace lowband
