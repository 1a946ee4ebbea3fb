#pragma once

#include "optimizers/elementwise.h"

namespace lowband {

/// Lion, whose every step has the size of the learning rate:
///
///     u <- sign(b1 m + (1 - b1) g)    with the old m; sign(0) = 0
///     m <- b2 m + (1 - b2) g
///     w <- (1 - eta wd) w - eta u
///
/// State: "<name>.m".
/// Reference: Chen et al., "Symbolic discovery of optimization algorithms", arXiv 2302.06675, algorithm 2.
template <class Real>
class Lion final : public ElementwiseOptimizer<Real> {
 public:
  Lion(std::vector<ElementwisePiece> pieces, const OptimizerOptions& options);

  void update(Index i, MatrixView<const Real> gradient, MatrixView<Real> weight, const Scalar& gradient_scale,
              double learning_rate) override;
  std::vector<StateTensor<Real>> state() override;

 private:
  struct Momentum {
    ElementwisePiece piece;
    Buffer<Real> m;
  };
  OptimizerOptions options_;
  std::vector<Momentum> momenta_;
};

}  // namespace lowband
