#include "optimizers/adamw.h"

#include "runtime/vector_kernels.h"

#include <cmath>

namespace lowband {

template <class Real>
AdamW<Real>::AdamW(std::vector<ElementwisePiece> pieces, const OptimizerOptions& options)
    : options_(options) {
  for (ElementwisePiece& piece : pieces) {
    const Index n = piece.elements;
    moments_.push_back({std::move(piece), Buffer<Real>(n), Buffer<Real>(n), Buffer<Real>(1)});
  }
}

template <class Real>
void AdamW<Real>::update(Index i, std::span<const Real> gradient, std::span<Real> weight, Real gradient_scale,
                         double learning_rate) {
  Moments& moments = moments_[static_cast<std::size_t>(i)];
  moments.t[0] += 1;
  const double t = static_cast<double>(moments.t[0]);
  const double step_size = learning_rate / (1 - std::pow(options_.adamw_beta1, t));
  const double inv_sqrt_correction2 = 1 / std::sqrt(1 - std::pow(options_.adamw_beta2, t));
  const double decay = moments.piece.decays ? 1 - learning_rate * options_.weight_decay : 1.0;
  adamw_update<Real>(weight.data(), moments.m.data(), moments.v.data(), gradient.data(), moments.m.size(),
                     static_cast<Real>(options_.adamw_beta1), static_cast<Real>(options_.adamw_beta2),
                     static_cast<Real>(step_size), static_cast<Real>(inv_sqrt_correction2),
                     static_cast<Real>(options_.adamw_epsilon), static_cast<Real>(decay), gradient_scale);
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
