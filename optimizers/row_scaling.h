#pragma once

#include "optimizers/distributed_sign.h"

namespace lowband {

/// Brings rows of signed matrices to equal size over time, as NorMuon:
///
///     v_i <- b2 v_i + (1 - b2) mean_j U_ij^2          for each row i
///     Y   <- U_ij / (sqrt v_i + eps)
///     U   <- |U| / |Y| Y                              Frobenius norms
///
/// Means and norms are those of whole rows and matrices: per matrix and step one sum of m numbers over the
/// processes of a replica, and one of the squares of both norms. Each v_i is kept by one process of a
/// replica, which adds b2 v_i to its own part of the mean, so that the sum is the next v_i.
///
/// Reference: Li et al., "NorMuon", arXiv 2510.05491; conventions of algorithms.md 2.6.
template <class Real>
class RowScaling {
 public:
  /// Of one block of signs, some rows of a block of the matrix.
  struct Rows {
    bool skipped = false;           // nothing changes
    std::span<Real> v;              // of the rows kept here, which are consecutive
    Index first_kept = 0;           // of the rows of the block of the matrix
    std::span<const Index> places;  // in these, of each row of the block of signs
    /// That of row `row` of the block of signs, if it is kept here.
    Real* kept(std::size_t row) const {
      const Index k = places[row] - first_kept;
      return k >= 0 && k < std::ssize(v) ? &v[static_cast<std::size_t>(k)] : nullptr;
    }
  };

  /// Borrows the mesh and the signs.
  RowScaling(ProcessMesh& mesh, DistributedSign<Real>& sign, double beta2);

  /// U in the blocks of the signs. Collective: all processes of the replica; `rows` by matrix.
  void apply(std::span<const Rows> rows);

 private:
  void average(Index i, const Rows& rows);
  void keep(Index i, const Rows& rows);
  void scale(Index i);

  Communicator* group_;
  DistributedSign<Real>* sign_;
  double beta2_;
  std::vector<Index> rows_of_;            // where those of a matrix begin in v_ and own_sums_
  Buffer<double> v_;                      // next, of all rows of all matrices
  Buffer<double> own_sums_;               // sum_j U_ij^2 of this process's columns, likewise
  Buffer<double> norms_;                  // by matrix, |U|^2 and |Y|^2
  std::vector<PayloadShare> row_shares_;  // of v_
  std::vector<PayloadShare> norm_shares_;
};

/// Payload bytes for one matrix on axis within_replica, as each of its processes counts them.
Index row_scaling_bytes(const CutMatrix& matrix);

}  // namespace lowband
