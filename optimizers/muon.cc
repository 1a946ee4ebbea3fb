#include "optimizers/muon.h"

namespace lowband {

template <class Real>
Muon<Real>::Muon(ProcessMesh& mesh, std::vector<LayerMatrix> matrices, const OptimizerOptions& options,
                 Index rotation)
    : SignDescent<Real>(mesh, std::move(matrices), options, rotation) {
  for (Index i = 0; i < this->size(); ++i) momenta_.emplace_back(this->sign().block(i).elements());
}

template <class Real>
void Muon<Real>::form_direction(Index i, const Piece& piece, Real scale) {
  const auto mu = static_cast<Real>(this->options().mu);
  const bool nesterov = this->options().nesterov;
  const MatrixView<Real> u = this->sign().block(i);
  const Real* const gradient = piece.gradient.data;
  Real* const m = momenta_[static_cast<std::size_t>(i)].data();
  for (Index e = 0; e < u.elements(); ++e) {
    const Real g = scale * gradient[e];
    m[e] = mu * m[e] + g;
    u.data[e] = nesterov ? g + mu * m[e] : m[e];
  }
}

template <class Real>
std::vector<StateTensor<Real>> Muon<Real>::state(Index i) {
  const MatrixView<Real> block = this->sign().block(i);
  return {{this->matrix(i).state_name("M"),
           momenta_[static_cast<std::size_t>(i)].matrix(0, block.rows, block.cols)}};
}

template class Muon<float>;
template class Muon<double>;

}  // namespace lowband
