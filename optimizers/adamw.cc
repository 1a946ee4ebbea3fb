#include "optimizers/adamw.h"

#include "runtime/passes.h"

#include <cmath>

namespace lowband {

template <class Real>
AdamW<Real>::AdamW(std::vector<ElementwisePiece> pieces, const OptimizerOptions& options)
    : options_(options) {
  for (ElementwisePiece& piece : pieces) {
    const Index n = piece.elements;
    Device* const device = piece.device;
    moments_.push_back({std::move(piece), Buffer<Real>(n, device), Buffer<Real>(n, device), Buffer<Real>(1)});
  }
}

template <class Real>
void AdamW<Real>::update(Index i, MatrixView<const Real> gradient, MatrixView<Real> weight,
                         Real gradient_scale, double learning_rate) {
  Moments& moments = moments_[static_cast<std::size_t>(i)];
  moments.t[0] += 1;
  const double t = static_cast<double>(moments.t[0]);
  const double decay = moments.piece.decays ? 1 - learning_rate * options_.weight_decay : 1.0;
  const AdamWStep<Real> step{
      .beta1 = static_cast<Real>(options_.adamw_beta1),
      .beta2 = static_cast<Real>(options_.adamw_beta2),
      .step_size = static_cast<Real>(learning_rate / (1 - std::pow(options_.adamw_beta1, t))),
      .inv_sqrt_correction2 = static_cast<Real>(1 / std::sqrt(1 - std::pow(options_.adamw_beta2, t))),
      .epsilon = static_cast<Real>(options_.adamw_epsilon),
      .decay = static_cast<Real>(decay),
      .gradient_scale = gradient_scale};
  lowband::update<Real>(step, gradient, moments.m.line(), moments.v.line(), weight);
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
