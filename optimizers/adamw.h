#pragma once

#include "optimizers/optimizer.h"
#include "optimizers/options.h"

#include <span>
#include <string>
#include <vector>

namespace lowband {

/// AdamW on pieces of parameters, element by element; sends nothing.
///
///     m <- b1 m + (1 - b1) g ; v <- b2 v + (1 - b2) g^2
///     w <- (1 - eta wd) w - eta m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
///
/// t counts the updates of this parameter, not the steps of the run: a skipped step leaves m, v and t alone.
/// Reference: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.
template <class Real>
class AdamW {
 public:
  struct Parameter {
    std::string name;
    Index elements = 0;  // of the piece
    bool decays = true;
  };
  AdamW(std::vector<Parameter> parameters, const OptimizerOptions& options);

  /// One update of parameter i with g = gradient_scale x gradient.
  void update(Index i, std::span<const Real> gradient, std::span<Real> weight, Real gradient_scale,
              double learning_rate);

  /// "<name>.m", "<name>.v" and "<name>.t", the number of updates (exact in float up to 2^24, where both
  /// corrections have long become 1).
  std::vector<StateTensor<Real>> state();

 private:
  struct Moments {
    Parameter parameter;
    Buffer<Real> m, v, t;
  };
  OptimizerOptions options_;
  std::vector<Moments> moments_;
};

}  // namespace lowband
