#pragma once

#include "optimizers/muon.h"

namespace lowband {

/// NorMuon: Muon whose signs are brought to rows of equal size over time.
///
///     U   <- sign(M)                                  as Muon
///     v_i <- b2 v_i + (1 - b2) mean_j U_ij^2          for each output row i
///     Y   <- U_ij / (sqrt v_i + eps)
///     W   <- (1 - eta wd) W - eta c |U| / |Y| Y       Frobenius norms
///
/// Means and norms are those of whole rows and matrices: per matrix and step one sum of m row sums and one
/// more double over the processes of a replica. v starts at zero and is not corrected for it, since |Y| is
/// divided out.
///
/// State: "<name>.M", and "<name>.row_v", the v of the rows of the block: "<name>.v" is AdamW's, of elements.
/// Reference: Li et al., "NorMuon", arXiv 2510.05491; conventions of algorithms.md 2.6.
template <class Real>
class NorMuon final : public Muon<Real> {
 public:
  using typename Muon<Real>::Piece;

  NorMuon(ProcessMesh& mesh, std::vector<ParameterInfo> matrices, const OptimizerOptions& options,
          Index rotation);

  std::vector<StateTensor<Real>> state(Index i) override;

 private:
  void finish_signs(std::span<const Piece> pieces) override;
  void sum_rows();
  void average_rows(Index i);
  void scale_rows(Index i, double factor);

  ProcessMesh* mesh_;
  double beta2_;
  std::vector<Buffer<Real>> v_;           // by matrix, of the block's rows
  std::vector<Index> row_sums_of_;        // where those of a matrix begin in row_sums_
  Buffer<double> row_sums_;               // of squares of U, all rows of all matrices
  Buffer<double> norms_;                  // by matrix, |Y|^2
  std::vector<PayloadShare> row_shares_;  // of row_sums_
  std::vector<PayloadShare> norm_shares_;
};

/// Payload bytes of one update of `matrix` by Muon or NorMuon on axis within_replica, as every process of it
/// counts them.
Index update_bytes(const ParameterInfo& matrix, const MeshShape& mesh, const OptimizerOptions& options,
                   Index element_bytes);

}  // namespace lowband
