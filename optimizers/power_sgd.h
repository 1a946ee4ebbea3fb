#pragma once

#include "optimizers/factored_matrices.h"

namespace lowband {

/// PowerSGD with error feedback and momentum after decompression: replicas keep their own error e, and apply
/// the same low-rank gradient D = P R^T. S of FactoredMatrices is e:
///
///     e_i <- B_i - P R_i^T             (local; aggregated: P R^T)
///     Q   <- c R                       not orthogonalised: the next step starts from its span
///     u   <- lambda u + c D
///     W   <- (1 - eta wd) W - eta (c D + u)
///
/// c is the update scale, which clips |D|; what D lost by it is not fed back. mean e_T + sum D = sum of mean
/// G.
///
/// Reference: PowerSGD, arXiv 1905.13727, algorithms 1 and 2; conventions of algorithms.md 2.9.
template <class Real>
class PowerSgd final : public FactoredMatrices<Real> {
 public:
  PowerSgd(ProcessMesh& mesh, Communicator& alone, const std::vector<LayerMatrix>& matrices,
           const std::vector<DenseTensor>& riders, const OptimizerOptions& options);

 private:
  double removed() const override { return 1; }
  void apply(Index i, MatrixView<Real> weight, const Scalar& update_scale, const StepInfo& info) override;
  void add_state(Index i, std::vector<StateTensor<Real>>& tensors) override;

  std::vector<Buffer<Real>> momentum_;  // u, as the block of e
};

}  // namespace lowband
