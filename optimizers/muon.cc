#include "optimizers/muon.h"

#include <algorithm>
#include <cmath>

namespace lowband {

double update_scale(UpdateScale scale, Index rows, Index cols) {
  const auto m = static_cast<double>(rows), n = static_cast<double>(cols);
  switch (scale) {
    case UpdateScale::kRmsToRms:
      return std::sqrt(m / n);
    case UpdateScale::kAdamRms:
      return 0.2 * std::sqrt(std::max(m, n));
    case UpdateScale::kShape:
      return std::sqrt(std::max(1.0, m / n));
    case UpdateScale::kNone:
      return 1;
  }
  throw InvalidArgument(cat("optimizer.update_scale: found ", static_cast<int>(scale)));
}

template <class Real>
Muon<Real>::Muon(ProcessMesh& mesh, std::vector<ParameterInfo> matrices, const OptimizerOptions& options,
                 Index rotation)
    : options_(options), sign_(mesh, std::move(matrices), options.sign, rotation) {
  for (Index i = 0; i < size(); ++i) momenta_.emplace_back(sign_.block(i).elements());
}

template <class Real>
typename Muon<Real>::Outcome Muon<Real>::update(std::span<const Piece> pieces, Real scale,
                                                const StepInfo& info, Diagnosis<Real>* /*diagnosis*/) {
  for (Index i = 0; i < size(); ++i) accumulate(i, pieces[static_cast<std::size_t>(i)], scale);
  sign_.compute();
  finish_signs(pieces);
  const double eta = info.learning_rate;
  const auto decay = static_cast<Real>(1 - eta * options_.weight_decay);
  for (Index i = 0; i < size(); ++i) {
    const Piece& piece = pieces[static_cast<std::size_t>(i)];
    if (piece.skipped) continue;
    // W <- (1 - eta wd) W - eta c U
    const ParameterInfo& matrix = sign_.matrix(i);
    const auto step = static_cast<Real>(eta * update_scale(options_.update_scale, matrix.rows, matrix.cols));
    const MatrixView<const Real> u = sign_.block(i);
    for (Index row = 0; row < u.rows; ++row) {
      Real* const w = piece.weight.row(row);
      for (Index col = 0; col < u.cols; ++col) w[col] = decay * w[col] - step * u(row, col);
    }
  }
  return {};
}

// A skipped matrix takes part with zeros.
template <class Real>
void Muon<Real>::accumulate(Index i, const Piece& piece, Real scale) {
  const std::span<Real> u = sign_.block(i).flat();
  if (piece.skipped) {
    std::ranges::fill(u, Real{0});
    return;
  }
  const auto mu = static_cast<Real>(options_.mu);
  Real* const m = momenta_[static_cast<std::size_t>(i)].data();
  const Real* const gradient = piece.gradient.data;
  for (std::size_t k = 0; k < u.size(); ++k) {
    const Real g = scale * gradient[k];
    m[k] = mu * m[k] + g;
    u[k] = options_.nesterov ? g + mu * m[k] : m[k];
  }
}

template <class Real>
std::vector<StateTensor<Real>> Muon<Real>::state(Index i) {
  const MatrixView<Real> block = sign_.block(i);
  return {
      {sign_.matrix(i).name + ".M", momenta_[static_cast<std::size_t>(i)].matrix(0, block.rows, block.cols)}};
}

template class Muon<float>;
template class Muon<double>;

}  // namespace lowband
