#pragma once

#include "optimizers/options.h"
#include "runtime/buffer.h"
#include "runtime/tensor.h"

#include <span>

namespace lowband {

/// One step X <- a X + (b A + c A^2) X with A the Gram matrix of the short side.
struct SignStep {
  double a, b, c;
};

/// An odd polynomial iteration that sends all singular values towards 1, from X_0 = U / (safety |U|_F + eps).
struct SignIteration {
  std::span<const SignStep> steps;
  double safety = 1;
  double epsilon = 0;
};

/// Reference: algorithms.md 2.4; Jordan et al., "Muon", 2024 (kNewtonSchulz5); Amsel et al., "The Polar
/// Express", arXiv 2505.16932 (the others).
const SignIteration& sign_iteration(SignPolynomial polynomial);

/// The matrix sign (orthonormal polar factor) of matrices up to a given size, one at a time.
///
/// Real: float, double. Products in Real, |U|_F in double, so that no scale of U over- or underflows in
/// float. Threads: compute_threads().
template <class Real>
class MatrixSign {
 public:
  /// Workspace for matrices with min(m, n) <= `short_side` and m n <= `elements`.
  /// In the memory of `device`, null for the host's.
  MatrixSign(SignPolynomial polynomial, Index short_side, Index elements, Device* device = nullptr);

  /// X <- sign X. Shapes: X is (m, n), contiguous. A zero matrix stays zero.
  void compute(MatrixView<Real> x);

  // The parts, for a matrix whose long side is cut into blocks: Gram matrices of all blocks add up.
  Index steps() const { return static_cast<Index>(iteration_->steps.size()); }
  /// X <- X_0, given the sum of squares of all blocks, where they lie.
  void start(MatrixView<Real> x, MatrixView<const double> sum_of_squares) const;
  /// A <- X X^T where `wide`, otherwise X^T X; both triangles.
  void gram(MatrixView<const Real> x, bool wide, MatrixView<Real> gram);
  /// X <- a X + (b A + c A^2) X, in step k.
  void advance(Index k, bool wide, MatrixView<const Real> gram, MatrixView<Real> x);

 private:
  const SignIteration* iteration_;
  Buffer<Real> gram_, polynomial_, previous_;
  Buffer<double> square_;
};

}  // namespace lowband
