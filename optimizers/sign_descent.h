#pragma once

#include "optimizers/distributed_sign.h"
#include "optimizers/layer_matrix.h"
#include "optimizers/matrix_optimizer.h"
#include "optimizers/options.h"

namespace lowband {

/// c of the update W <- W - eta c sign U for an m x n matrix. Of global shapes.
double update_scale(UpdateScale scale, Index rows, Index cols);

/// What optimizers have in common whose weights move along signs of matrices:
///
///     U <- the optimizer's own, of the mean gradient
///     U <- sign(U)
///     W <- (1 - eta wd) W - s U       s: step_size
///
/// Gradients are dense over replicas. Blocks lie as the weights' shards; signs are those of whole matrices
/// (DistributedSign).
template <class Real>
class SignDescent : public MatrixOptimizer<Real> {
 public:
  using typename MatrixOptimizer<Real>::Piece;
  using typename MatrixOptimizer<Real>::LaterOutcome;
  using typename MatrixOptimizer<Real>::Outcome;

  LaterOutcome update(std::span<const Piece> pieces, const Scalar& scale, const StepInfo& info,
                      Diagnosis<Real>* diagnosis) override;
  Index size() const override { return static_cast<Index>(matrices_.size()); }

 protected:
  /// `rotation`: of the processes that compute signs.
  SignDescent(ProcessMesh& mesh, std::vector<LayerMatrix> matrices, const OptimizerOptions& options,
              Index rotation);

  const OptimizerOptions& options() const { return options_; }
  const LayerMatrix& matrix(Index i) const { return matrices_[static_cast<std::size_t>(i)]; }
  /// Of the matrices, at their positions.
  DistributedSign<Real>& sign() { return sign_; }
  const DistributedSign<Real>& sign() const { return sign_; }

  /// eta c of matrix i, whose block on this process is not empty.
  virtual double step_size(Index i, const StepInfo& info) const;

 private:
  /// Block i of sign() <- U; not of a matrix that is skipped.
  virtual void form_direction(Index i, const Piece& piece, const Scalar& scale) = 0;
  /// Blocks of sign() <- what weights move along. Collective.
  virtual void form_signs(std::span<const Piece> /*pieces*/, const StepInfo& /*info*/) { sign_.compute(); }

  OptimizerOptions options_;
  std::vector<LayerMatrix> matrices_;
  DistributedSign<Real> sign_;
};

}  // namespace lowband
