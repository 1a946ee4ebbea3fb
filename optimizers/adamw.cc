#include "optimizers/adamw.h"

#include "runtime/passes.h"

namespace lowband {

template <class Real>
AdamW<Real>::AdamW(std::vector<ElementwisePiece> pieces, const OptimizerOptions& options)
    : options_(options) {
  for (ElementwisePiece& piece : pieces) {
    const Index n = piece.elements;
    Device* const device = piece.device;
    moments_.push_back(
        {std::move(piece), Buffer<Real>(n, device), Buffer<Real>(n, device), Buffer<Real>(1, device)});
  }
}

template <class Real>
void AdamW<Real>::update(Index i, MatrixView<const Real> gradient, MatrixView<Real> weight,
                         const Scalar& gradient_scale, double learning_rate) {
  Moments& moments = moments_[static_cast<std::size_t>(i)];
  const AdamWRule<Real> rule{.beta1 = options_.adamw_beta1,
                             .beta2 = options_.adamw_beta2,
                             .epsilon = options_.adamw_epsilon,
                             .decay = moments.piece.decays ? 1 - learning_rate * options_.weight_decay : 1.0,
                             .learning_rate = learning_rate};
  lowband::update<Real>(rule, gradient_scale, moments.t.line(), gradient, moments.m.line(), moments.v.line(),
                        weight);
}

template <class Real>
std::vector<StateTensor<Real>> AdamW<Real>::state() {
  std::vector<StateTensor<Real>> tensors;
  for (Moments& moments : moments_) {
    const Index n = moments.m.size();
    tensors.push_back({moments.piece.name + ".m", moments.m.matrix(0, 1, n)});
    tensors.push_back({moments.piece.name + ".v", moments.v.matrix(0, 1, n)});
    tensors.push_back({moments.piece.name + ".t", moments.t.matrix(0, 1, 1)});
  }
  return tensors;
}

template class AdamW<float>;
template class AdamW<double>;

}  // namespace lowband
