#include "optimizers/matrix_sign.h"

#include "runtime/copy.h"
#include "runtime/linalg.h"
#include "runtime/numbers.h"
#include "runtime/passes.h"

#include <algorithm>
#include <array>

namespace lowband {
namespace {

// Leading decimals of the published tables; algorithms.md 2.4.
constexpr std::array kNewtonSchulz5 = {SignStep{3.4445, -4.7750, 2.0315}, SignStep{3.4445, -4.7750, 2.0315},
                                       SignStep{3.4445, -4.7750, 2.0315}, SignStep{3.4445, -4.7750, 2.0315},
                                       SignStep{3.4445, -4.7750, 2.0315}};
constexpr std::array kPolarExpress5 = {
    SignStep{8.156554524902461, -22.48329292557795, 15.878769915207462},
    SignStep{4.042929935166739, -2.808917465908714, 0.5000178451051316},
    SignStep{3.8916678022926607, -2.772484153217685, 0.5060648178503393},
    SignStep{3.285753657755655, -2.3681294933425376, 0.46449024233003106},
    SignStep{2.3465413258596377, -1.7097828382687081, 0.42323551169305323}};
constexpr std::array kPolarExpress8 = {
    SignStep{8.2051, -22.9019, 16.4607}, SignStep{4.0664, -2.8612, 0.5184}, SignStep{3.9096, -2.8234, 0.5250},
    SignStep{3.2856, -2.4153, 0.4853},   SignStep{2.2779, -1.6198, 0.3985}, SignStep{1.8726, -1.2307, 0.3585},
    SignStep{1.8564, -1.2132, 0.3568},   SignStep{1.8750, -1.2500, 0.3750}};

// Added to the norm, or where the norm is smaller: zero matrices stay zero.
constexpr SignIteration kIterations[] = {
    {.steps = kNewtonSchulz5, .safety = 1, .epsilon = 1e-7},
    {.steps = kPolarExpress5, .safety = 1.02, .epsilon = 1e-8},
    {.steps = kPolarExpress8, .safety = 1, .epsilon = 1e-15},
};

// Rows of a symmetric product that are formed together: half of it is computed, and this much of the diagonal
// twice.
constexpr Index kSymmetricRows = 192;

/// C <- L R where the result is symmetric: blocks on and below the diagonal are computed, the others copied.
template <class Real>
void symmetric_product(Op op_left, MatrixView<const Real> left, Op op_right, MatrixView<const Real> right,
                       MatrixView<Real> c) {
  if (Device* const device = computing_device<Real>("symmetric product", left, right, c)) {
    if constexpr (kOnDevices<Real>) return device->gemm(op_left, op_right, 1, left, right, 0, c, true);
  }
  const auto rows_of = [](Op op, MatrixView<const Real> x, Index begin, Index count) {
    return op == Op::kNone ? x.row_block(begin, count) : x.block(0, x.rows, begin, count);
  };
  const auto cols_of = [](Op op, MatrixView<const Real> x, Index count) {
    return op == Op::kNone ? x.block(0, x.rows, 0, count) : x.row_block(0, count);
  };
  for (Index begin = 0; begin < c.rows; begin += kSymmetricRows) {
    const Index rows = std::min(kSymmetricRows, c.rows - begin);
    gemm<Real>(op_left, op_right, Real{1}, rows_of(op_left, left, begin, rows),
               cols_of(op_right, right, begin + rows), Real{0}, c.block(begin, rows, 0, begin + rows));
  }
  for (Index i = 0; i < c.rows; ++i) {
    const Index end = std::min(c.rows, (i / kSymmetricRows + 1) * kSymmetricRows);
    for (Index j = end; j < c.rows; ++j) c(i, j) = c(j, i);
  }
}

}  // namespace

const SignIteration& sign_iteration(SignPolynomial polynomial) {
  return kIterations[static_cast<std::size_t>(polynomial)];
}

template <class Real>
MatrixSign<Real>::MatrixSign(SignPolynomial polynomial, Index short_side, Index elements, Device* device)
    : iteration_(&sign_iteration(polynomial)),
      gram_(short_side * short_side, device),
      polynomial_(short_side * short_side, device),
      previous_(elements, device),
      square_(1, device) {}

template <class Real>
void MatrixSign<Real>::compute(MatrixView<Real> x) {
  const bool wide = x.rows <= x.cols;
  const Index side = std::min(x.rows, x.cols);
  const MatrixView<Real> a = gram_.matrix(0, side, side);
  sum_of_squares<Real>(x, square_.line());
  start(x, square_.line());
  for (Index k = 0; k < steps(); ++k) {
    gram(x, wide, a);
    advance(k, wide, a, x);
  }
}

template <class Real>
void MatrixSign<Real>::start(MatrixView<Real> x, MatrixView<const double> sum_of_squares) const {
  divide_by_norm<Real>(sum_of_squares, iteration_->safety, iteration_->epsilon, x);
}

template <class Real>
void MatrixSign<Real>::gram(MatrixView<const Real> x, bool wide, MatrixView<Real> gram) {
  symmetric_product<Real>(wide ? Op::kNone : Op::kTranspose, x, wide ? Op::kTranspose : Op::kNone, x, gram);
}

template <class Real>
void MatrixSign<Real>::advance(Index k, bool wide, MatrixView<const Real> gram, MatrixView<Real> x) {
  const SignStep& step = iteration_->steps[static_cast<std::size_t>(k)];
  const Index side = gram.rows;
  // P <- b A + c A^2
  const MatrixView<Real> p = polynomial_.matrix(0, side, side);
  symmetric_product<Real>(Op::kNone, gram, Op::kNone, gram, p);
  add<Real>(static_cast<Real>(step.b), gram, static_cast<Real>(step.c), p);
  // X <- P X + a X, or X P + a X: a I stays out of P, where it would take the digits of b A.
  const MatrixView<Real> previous = previous_.matrix(0, x.rows, x.cols);
  copy<Real>(x, previous);
  const auto a = static_cast<Real>(step.a);
  wide ? gemm<Real>(Op::kNone, Op::kNone, Real{1}, p, previous, a, x)
       : gemm<Real>(Op::kNone, Op::kNone, Real{1}, previous, p, a, x);
}

template class MatrixSign<float>;
template class MatrixSign<double>;

}  // namespace lowband
