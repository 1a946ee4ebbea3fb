#pragma once

#include "collectives/factors/factor_exchange.h"
#include "optimizers/cut_matrix.h"

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace lowband {

/// A matrix that a matrix optimizer treats as a whole: a parameter, or a block of one.
struct LayerMatrix {
  ParameterInfo info;     // its own
  CutMatrix cut;          // with the name of the parameter
  Index factor_rank = 0;  // 0 where the kind has none

  bool tall() const { return info.rows >= info.cols; }
  /// "<parameter>.<letter>", and "<parameter>.<letter>[i]" of block i.
  std::string state_name(std::string_view letter) const;
};

/// The matrices of a parameter (matrices_of), as processes hold them. `factor_ranks`: by matrix, or none.
/// Throws: InvalidArgument naming the matrix, as cut_matrix and matrices_of, and when a rank is missing or
/// outside 1..min(m, n).
std::vector<LayerMatrix> cut_matrices(const ParameterInfo& parameter, const MeshShape& mesh,
                                      std::span<const Index> factor_ranks);

/// How this process takes part in an exchange of factors of this rank. P has the rows of the matrix, and R
/// its columns; the other way round if `transposed`.
FactorShape factor_shape(const LayerMatrix& matrix, Index factor_rank, bool transposed, ProcessMesh& mesh);

/// One factor of `shape`, of which the processes that hold the same rows of it have partial sums.
template <class Real>
typename FactorRows<Real>::Shape left_rows(const FactorShape& shape) {
  return {shape.name, shape.left_rows, shape.factor_rank, shape.across_b};
}
template <class Real>
typename FactorRows<Real>::Shape right_rows(const FactorShape& shape) {
  return {shape.name, shape.right_rows, shape.factor_rank, shape.across_a};
}

}  // namespace lowband
