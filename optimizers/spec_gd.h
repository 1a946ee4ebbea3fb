#pragma once

#include "optimizers/sign_descent.h"

namespace lowband {

/// Spectral gradient descent: the step of steepest descent where curvature is bounded in the spectral norm.
///
///     U <- sign(G)
///     W <- (1 - eta wd) W - eta |G|_* U      |G|_* = <G, U>, the nuclear norm
///
/// eta stands for 1 / (L_op + C_op), the inverse of that bound: for features X of n tokens L_op = |X|_F^2 /
/// n. It is not the size of the step, which shrinks with the gradient. Inner products are formed in double
/// over the whole matrix, one for each over the processes of a replica.
///
/// Stateless.
/// Reference: "When do spectral gradient updates help in deep learning?", eq. 1.4 and 4.15; conventions of
/// algorithms.md 2.14.
template <class Real>
class SpecGd final : public SignDescent<Real> {
 public:
  using typename SignDescent<Real>::Piece;

  SpecGd(ProcessMesh& mesh, std::vector<LayerMatrix> matrices, const OptimizerOptions& options,
         Index rotation);

  std::vector<StateTensor<Real>> state(Index /*i*/) override { return {}; }

 private:
  void form_direction(Index i, const Piece& piece, const Scalar& scale) override;
  void form_signs(std::span<const Piece> pieces, const StepInfo& info) override;
  double step_size(Index i, const StepInfo& info) const override;

  Communicator* group_;
  double scale_ = 0;               // of gradients, in this step
  Buffer<double> inner_products_;  // by matrix
  std::vector<PayloadShare> shares_;
};

/// Payload bytes of <G, U> for one matrix on axis within_replica, as each of its processes counts them.
Index inner_product_bytes(const CutMatrix& matrix);

}  // namespace lowband
