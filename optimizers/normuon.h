#pragma once

#include "optimizers/muon.h"
#include "optimizers/row_scaling.h"

namespace lowband {

/// NorMuon: Muon whose signs are brought to rows of equal size over time.
///
///     U   <- sign(M)                                  as Muon
///     v_i <- b2 v_i + (1 - b2) mean_j U_ij^2          for each output row i
///     Y   <- U_ij / (sqrt v_i + eps)
///     W   <- (1 - eta wd) W - eta c |U| / |Y| Y       Frobenius norms
///
/// v starts at zero and is not corrected for it, since |Y| is divided out.
///
/// State: "<name>.M", and "<name>.row_v", v ("<name>.v" is AdamW's, of elements), of which every process
/// keeps a share of the rows of its block: m n + m elements over the processes of a replica, each once.
/// Reference: Li et al., "NorMuon", arXiv 2510.05491; conventions of algorithms.md 2.6.
template <class Real>
class NorMuon final : public Muon<Real> {
 public:
  using typename SignDescent<Real>::Piece;

  NorMuon(ProcessMesh& mesh, std::vector<LayerMatrix> matrices, const OptimizerOptions& options,
          Index rotation);

  std::vector<StateTensor<Real>> state(Index i) override;

 private:
  void form_signs(std::span<const Piece> pieces, const StepInfo& info) override;

  RowScaling<Real> row_scaling_;
  std::vector<Buffer<Real>> v_;             // by matrix, of the rows kept here
  std::vector<Index> first_kept_;           // of the block's rows
  std::vector<std::vector<Index>> places_;  // 0, 1, ...
};

}  // namespace lowband
