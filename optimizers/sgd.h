#pragma once

#include "optimizers/elementwise.h"

namespace lowband {

/// Stochastic gradient descent with momentum:
///
///     v <- mu v + g
///     w <- (1 - eta wd) w - eta v    (Nesterov: g + mu v)
///
/// State: "<name>.v".
/// Reference: Sutskever, Martens, Dahl and Hinton, "On the importance of initialization and momentum in deep
/// learning", ICML 2013, in the form in which v does not contain eta; algorithms.md 2.1.
template <class Real>
class Sgd final : public ElementwiseOptimizer<Real> {
 public:
  Sgd(std::vector<ElementwisePiece> pieces, const OptimizerOptions& options);

  void update(Index i, MatrixView<const Real> gradient, MatrixView<Real> weight, const Scalar& gradient_scale,
              double learning_rate) override;
  std::vector<StateTensor<Real>> state() override;

 private:
  struct Momentum {
    ElementwisePiece piece;
    Buffer<Real> v;
  };
  OptimizerOptions options_;
  std::vector<Momentum> momenta_;
};

}  // namespace lowband
