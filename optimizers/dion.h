#pragma once

#include "optimizers/factored_matrices.h"

namespace lowband {

/// Dion with decoupled momentum: replicas keep their own momentum M and exchange nothing but the factors P, R
/// of what they apply. S of FactoredMatrices is M:
///
///     M_i <- B_i - (1 - mu) P R_i^T    (local; aggregated: P R^T)
///     Q_j <- R_j / (|R_j| + 1e-8)
///     W   <- (1 - eta wd) W - eta sqrt(m/n) P Q^T
///
/// so that mean M_T = sum of mean G - (1 - mu) sum P R^T: what is not sent stays in the momentum.
///
/// Reference: Dion, arXiv 2504.05295; conventions of algorithms.md 2.7.
template <class Real>
class Dion final : public FactoredMatrices<Real> {
 public:
  Dion(ProcessMesh& mesh, Communicator& alone, const std::vector<LayerMatrix>& matrices,
       const std::vector<DenseTensor>& riders, const OptimizerOptions& options)
      : FactoredMatrices<Real>(mesh, alone, matrices, riders, options, "M") {}

 private:
  double removed() const override { return 1 - this->options().mu; }
  void apply(Index i, MatrixView<Real> weight, const Scalar& update_scale, const StepInfo& info) override;
};

}  // namespace lowband
