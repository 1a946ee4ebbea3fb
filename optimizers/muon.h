#pragma once

#include "optimizers/distributed_sign.h"
#include "optimizers/matrix_optimizer.h"
#include "optimizers/options.h"

namespace lowband {

/// c of the update W <- W - eta c sign U for an m x n matrix. Of global shapes.
double update_scale(UpdateScale scale, Index rows, Index cols);

/// Muon: momentum, then the matrix sign.
///
///     M <- mu M + G
///     U <- sign(M)                    (Nesterov: sign(G + mu M))
///     W <- (1 - eta wd) W - eta c U   c: UpdateScale
///
/// G is the mean gradient, dense over replicas. The blocks of M are those of the weights' shards; signs are
/// those of whole matrices (DistributedSign).
///
/// State: "<name>.M".
/// Reference: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; conventions of
/// algorithms.md 2.4.
template <class Real>
class Muon : public MatrixOptimizer<Real> {
 public:
  using typename MatrixOptimizer<Real>::Piece;
  using typename MatrixOptimizer<Real>::Outcome;

  /// `rotation`: of the processes that compute signs.
  Muon(ProcessMesh& mesh, std::vector<ParameterInfo> matrices, const OptimizerOptions& options,
       Index rotation);

  Outcome update(std::span<const Piece> pieces, Real scale, const StepInfo& info,
                 Diagnosis<Real>* diagnosis) override;
  Index size() const override { return sign_.size(); }
  std::vector<StateTensor<Real>> state(Index i) override;

 protected:
  DistributedSign<Real>& sign() { return sign_; }

 private:
  /// What relatives do to U = sign(M) in the blocks of sign(), before weights are updated. Collective.
  virtual void finish_signs(std::span<const Piece> /*pieces*/) {}
  void accumulate(Index i, const Piece& piece, Real scale);

  OptimizerOptions options_;
  DistributedSign<Real> sign_;
  std::vector<Buffer<Real>> momenta_;
};

}  // namespace lowband
