#pragma once

#include "optimizers/sign_descent.h"

namespace lowband {

/// Muon: momentum, then the matrix sign.
///
///     M <- mu M + G
///     U <- sign(M)                    (Nesterov: sign(G + mu M))
///     W <- (1 - eta wd) W - eta c U   c: UpdateScale
///
/// State: "<name>.M".
/// Reference: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; conventions of
/// algorithms.md 2.4.
template <class Real>
class Muon : public SignDescent<Real> {
 public:
  using typename SignDescent<Real>::Piece;

  Muon(ProcessMesh& mesh, std::vector<LayerMatrix> matrices, const OptimizerOptions& options, Index rotation);

  std::vector<StateTensor<Real>> state(Index i) override;

 private:
  void form_direction(Index i, const Piece& piece, const Scalar& scale) override;

  std::vector<Buffer<Real>> momenta_;
};

}  // namespace lowband
