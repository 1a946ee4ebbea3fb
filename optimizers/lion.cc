#include "optimizers/lion.h"

namespace lowband {

template <class Real>
Lion<Real>::Lion(std::vector<ElementwisePiece> pieces, const OptimizerOptions& options) : options_(options) {
  for (ElementwisePiece& piece : pieces) {
    const Index n = piece.elements;
    momenta_.push_back({std::move(piece), Buffer<Real>(n)});
  }
}

template <class Real>
void Lion<Real>::update(Index i, std::span<const Real> gradient, std::span<Real> weight, Real gradient_scale,
                        double learning_rate) {
  Momentum& momentum = momenta_[static_cast<std::size_t>(i)];
  const auto b1 = static_cast<Real>(options_.lion_beta1), new1 = static_cast<Real>(1 - options_.lion_beta1);
  const auto b2 = static_cast<Real>(options_.lion_beta2), new2 = static_cast<Real>(1 - options_.lion_beta2);
  const auto eta = static_cast<Real>(learning_rate);
  const auto decay = static_cast<Real>(momentum.piece.decays ? 1 - learning_rate * options_.weight_decay : 1);
  Real* const m = momentum.m.data();
  for (std::size_t k = 0; k < weight.size(); ++k) {
    const Real g = gradient_scale * gradient[k];
    const Real u = b1 * m[k] + new1 * g;
    m[k] = b2 * m[k] + new2 * g;
    weight[k] = decay * weight[k] - (u > 0 ? eta : u < 0 ? -eta : Real{0});
  }
}

template <class Real>
std::vector<StateTensor<Real>> Lion<Real>::state() {
  std::vector<StateTensor<Real>> tensors;
  for (Momentum& momentum : momenta_)
    tensors.push_back({momentum.piece.name + ".m", momentum.m.matrix(0, 1, momentum.m.size())});
  return tensors;
}

template class Lion<float>;
template class Lion<double>;

}  // namespace lowband
