#include "optimizers/sgd.h"

#include "runtime/elementwise_math.h"

namespace lowband {

template <class Real>
Sgd<Real>::Sgd(std::vector<ElementwisePiece> pieces, const OptimizerOptions& options) : options_(options) {
  for (ElementwisePiece& piece : pieces) {
    const Index n = piece.elements;
    momenta_.push_back({std::move(piece), Buffer<Real>(n)});
  }
}

template <class Real>
void Sgd<Real>::update(Index i, std::span<const Real> gradient, std::span<Real> weight, Real gradient_scale,
                       double learning_rate) {
  Momentum& momentum = momenta_[static_cast<std::size_t>(i)];
  const auto mu = static_cast<Real>(options_.sgd_momentum);
  const SgdStep<Real> step{
      .mu = mu,
      .own = options_.sgd_nesterov ? Real{1} : Real{0},
      .across = options_.sgd_nesterov ? mu : Real{1},
      .eta = static_cast<Real>(learning_rate),
      .decay = static_cast<Real>(momentum.piece.decays ? 1 - learning_rate * options_.weight_decay : 1),
      .gradient_scale = gradient_scale};
  Real* const v = momentum.v.data();
  for (std::size_t k = 0; k < weight.size(); ++k) step(gradient[k], v[k], weight[k]);
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
