#include "optimizers/lion.h"

#include "runtime/elementwise_math.h"

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
  const LionStep<Real> step{
      .beta1 = static_cast<Real>(options_.lion_beta1),
      .new1 = static_cast<Real>(1 - options_.lion_beta1),
      .beta2 = static_cast<Real>(options_.lion_beta2),
      .new2 = static_cast<Real>(1 - options_.lion_beta2),
      .eta = static_cast<Real>(learning_rate),
      .decay = static_cast<Real>(momentum.piece.decays ? 1 - learning_rate * options_.weight_decay : 1),
      .gradient_scale = gradient_scale};
  Real* const m = momentum.m.data();
  for (std::size_t k = 0; k < weight.size(); ++k) step(gradient[k], m[k], weight[k]);
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
