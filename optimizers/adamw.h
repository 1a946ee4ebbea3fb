#pragma once

#include "optimizers/elementwise.h"

namespace lowband {

/// AdamW:
///
///     m <- b1 m + (1 - b1) g ; v <- b2 v + (1 - b2) g^2
///     w <- (1 - eta wd) w - eta m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
///
/// t counts the updates of this parameter.
///
/// State: "<name>.m", "<name>.v" and "<name>.t" (exact in float up to 2^24, where both corrections have long
/// become 1).
/// Reference: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.
template <class Real>
class AdamW final : public ElementwiseOptimizer<Real> {
 public:
  AdamW(std::vector<ElementwisePiece> pieces, const OptimizerOptions& options);

  void update(Index i, MatrixView<const Real> gradient, MatrixView<Real> weight, const Scalar& gradient_scale,
              double learning_rate) override;
  std::vector<StateTensor<Real>> state() override;

 private:
  struct Moments {
    ElementwisePiece piece;
    Buffer<Real> m, v, t;
  };
  OptimizerOptions options_;
  std::vector<Moments> moments_;
};

}  // namespace lowband
