#include "optimizers/lion.h"

#include "runtime/passes.h"

namespace lowband {

template <class Real>
Lion<Real>::Lion(std::vector<ElementwisePiece> pieces, const OptimizerOptions& options) : options_(options) {
  for (ElementwisePiece& piece : pieces) {
    Buffer<Real> momentum(piece.elements, piece.device);
    momenta_.push_back({std::move(piece), std::move(momentum)});
  }
}

template <class Real>
void Lion<Real>::update(Index i, MatrixView<const Real> gradient, MatrixView<Real> weight,
                        const Scalar& gradient_scale, double learning_rate) {
  Momentum& momentum = momenta_[static_cast<std::size_t>(i)];
  const LionStep<Real> step{
      .beta1 = static_cast<Real>(options_.lion_beta1),
      .new1 = static_cast<Real>(1 - options_.lion_beta1),
      .beta2 = static_cast<Real>(options_.lion_beta2),
      .new2 = static_cast<Real>(1 - options_.lion_beta2),
      .eta = static_cast<Real>(learning_rate),
      .decay = static_cast<Real>(momentum.piece.decays ? 1 - learning_rate * options_.weight_decay : 1),
      .gradient_scale = 1};
  lowband::update<Real>(step, gradient_scale, gradient, momentum.m.line(), weight);
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
