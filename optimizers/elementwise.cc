#include "optimizers/elementwise.h"

#include "optimizers/adamw.h"
#include "optimizers/lion.h"
#include "optimizers/sgd.h"

namespace lowband {

template <class Real>
std::unique_ptr<ElementwiseOptimizer<Real>> make_elementwise(ElementwiseKind kind,
                                                             std::vector<ElementwisePiece> pieces,
                                                             const OptimizerOptions& options) {
  switch (kind) {
    case ElementwiseKind::kAdamW:
      return std::make_unique<AdamW<Real>>(std::move(pieces), options);
    case ElementwiseKind::kSgd:
      return std::make_unique<Sgd<Real>>(std::move(pieces), options);
    case ElementwiseKind::kLion:
      return std::make_unique<Lion<Real>>(std::move(pieces), options);
  }
  throw InvalidArgument(cat("elementwise optimizer: found ", static_cast<int>(kind)));
}

template std::unique_ptr<ElementwiseOptimizer<float>> make_elementwise(ElementwiseKind,
                                                                       std::vector<ElementwisePiece>,
                                                                       const OptimizerOptions&);
template std::unique_ptr<ElementwiseOptimizer<double>> make_elementwise(ElementwiseKind,
                                                                        std::vector<ElementwisePiece>,
                                                                        const OptimizerOptions&);

}  // namespace lowband
