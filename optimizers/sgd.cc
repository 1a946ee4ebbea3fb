#include "optimizers/sgd.h"

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
  const auto eta = static_cast<Real>(learning_rate);
  const auto decay = static_cast<Real>(momentum.piece.decays ? 1 - learning_rate * options_.weight_decay : 1);
  // The step is own g + across v.
  const Real own = options_.sgd_nesterov ? Real{1} : Real{0};
  const Real across = options_.sgd_nesterov ? mu : Real{1};
  Real* const v = momentum.v.data();
  for (std::size_t k = 0; k < weight.size(); ++k) {
    const Real g = gradient_scale * gradient[k];
    v[k] = mu * v[k] + g;
    weight[k] = decay * weight[k] - eta * (own * g + across * v[k]);
  }
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
