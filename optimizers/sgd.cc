#include "optimizers/sgd.h"

#include "runtime/passes.h"

namespace lowband {

template <class Real>
Sgd<Real>::Sgd(std::vector<ElementwisePiece> pieces, const OptimizerOptions& options) : options_(options) {
  for (ElementwisePiece& piece : pieces) {
    Buffer<Real> momentum(piece.elements, piece.device);
    momenta_.push_back({std::move(piece), std::move(momentum)});
  }
}

template <class Real>
void Sgd<Real>::update(Index i, MatrixView<const Real> gradient, MatrixView<Real> weight,
                       const Scalar& gradient_scale, double learning_rate) {
  Momentum& momentum = momenta_[static_cast<std::size_t>(i)];
  const auto mu = static_cast<Real>(options_.sgd_momentum);
  const SgdStep<Real> step{
      .mu = mu,
      .own = options_.sgd_nesterov ? Real{1} : Real{0},
      .across = options_.sgd_nesterov ? mu : Real{1},
      .eta = static_cast<Real>(learning_rate),
      .decay = static_cast<Real>(momentum.piece.decays ? 1 - learning_rate * options_.weight_decay : 1),
      .gradient_scale = 1};
  lowband::update<Real>(step, gradient_scale, gradient, momentum.v.line(), weight);
}

template <class Real>
std::vector<StateTensor<Real>> Sgd<Real>::state() {
  std::vector<StateTensor<Real>> tensors;
  for (Momentum& momentum : momenta_)
    tensors.push_back({momentum.piece.name + ".v", momentum.v.matrix(0, 1, momentum.v.size())});
  return tensors;
}

template class Sgd<float>;
template class Sgd<double>;

}  // namespace lowband
