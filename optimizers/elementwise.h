#pragma once

#include "optimizers/optimizer.h"
#include "optimizers/options.h"

#include <memory>
#include <span>
#include <string>
#include <vector>

namespace lowband {

/// A piece of a parameter as this process owns it.
struct ElementwisePiece {
  std::string name;  // of the parameter
  Index elements = 0;
  bool decays = true;  // under weight decay
  Device* device = nullptr;
};

/// Updates pieces of parameters element by element, so that it does not matter how parameters are cut; sends
/// nothing.
///
/// State follows the updates of a parameter, not the steps of the run: a skipped step leaves it alone.
template <class Real>
class ElementwiseOptimizer {
 public:
  ElementwiseOptimizer() = default;
  ElementwiseOptimizer(const ElementwiseOptimizer&) = delete;
  ElementwiseOptimizer& operator=(const ElementwiseOptimizer&) = delete;
  virtual ~ElementwiseOptimizer() = default;

  /// One update of piece i with g = gradient_scale x gradient.
  ///
  /// Shapes: (1, elements of the piece), where the piece lies.
  virtual void update(Index i, MatrixView<const Real> gradient, MatrixView<Real> weight,
                      const Scalar& gradient_scale, double learning_rate) = 0;
  /// "<name>.<letter>" in the order of pieces.
  virtual std::vector<StateTensor<Real>> state() = 0;
};

template <class Real>
std::unique_ptr<ElementwiseOptimizer<Real>> make_elementwise(ElementwiseKind kind,
                                                             std::vector<ElementwisePiece> pieces,
                                                             const OptimizerOptions& options);

}  // namespace lowband
