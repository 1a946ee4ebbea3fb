#pragma once

#include "optimizers/distributed_sign.h"

namespace lowband {

/// Brings rows of signed matrices to equal size over time, as NorMuon:
///
///     v_i <- b2 v_i + (1 - b2) mean_j U_ij^2          for each row i
///     Y   <- U_ij / (sqrt v_i + eps)
///     U   <- |U| / |Y| Y                              Frobenius norms
///
/// Means and norms are those of whole rows and matrices: per matrix and step one sum of m row sums and one
/// more double over the processes of a replica.
///
/// Reference: Li et al., "NorMuon", arXiv 2510.05491; conventions of algorithms.md 2.6.
template <class Real>
class RowScaling {
 public:
  /// v of the rows of one block of signs.
  struct Rows {
    bool skipped = false;           // nothing changes
    std::span<Real> v;              // of a larger set of rows
    std::span<const Index> places;  // in v, of each row of the block
  };

  /// Borrows the mesh and the signs.
  RowScaling(ProcessMesh& mesh, DistributedSign<Real>& sign, double beta2);

  /// U in the blocks of the signs. Collective: all processes of the replica; `rows` by matrix.
  void apply(std::span<const Rows> rows);

 private:
  void sum_rows();
  void average(Index i, const Rows& rows);
  void scale(Index i, const Rows& rows, double factor);

  Communicator* group_;
  DistributedSign<Real>* sign_;
  double beta2_;
  std::vector<Index> row_sums_of_;        // where those of a matrix begin in row_sums_
  Buffer<double> row_sums_;               // of squares of U, all rows of all matrices
  Buffer<double> norms_;                  // by matrix, |Y|^2
  std::vector<PayloadShare> row_shares_;  // of row_sums_
  std::vector<PayloadShare> norm_shares_;
};

/// Payload bytes for one matrix on axis within_replica, as each of its processes counts them.
Index row_scaling_bytes(const CutMatrix& matrix);

}  // namespace lowband
