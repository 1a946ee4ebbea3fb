#pragma once

#include "optimizers/matrix_optimizer.h"

namespace lowband {

/// Matrices that cross the replica axis compressed, by an exchange of their own.
template <class Real>
class CompressedMatrices : public MatrixOptimizer<Real> {
 public:
  using typename MatrixOptimizer<Real>::Piece;

  /// Forms from G = gradient_scale x piece.gradient, the sum over shards, what `update` needs of all
  /// replicas. What is sent depends on `step` and on nothing else.
  virtual void exchange(std::span<const Piece> pieces, const Scalar& gradient_scale, Index step) = 0;
  /// Adds over the matrices |D|^2, D being what the last exchange made of the mean gradient; equal on all
  /// processes. `sum`: where the matrices lie.
  virtual void add_sum_of_squares(MatrixView<double> sum) const = 0;
  /// Payload elements that a diagnosis sends on the replica axis, over the processes of one replica.
  virtual Index diagnosed_elements() const { return 0; }
};

}  // namespace lowband
