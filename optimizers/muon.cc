#include "optimizers/muon.h"

#include "runtime/copy.h"
#include "runtime/passes.h"

namespace lowband {

template <class Real>
Muon<Real>::Muon(ProcessMesh& mesh, std::vector<LayerMatrix> matrices, const OptimizerOptions& options,
                 Index rotation)
    : SignDescent<Real>(mesh, std::move(matrices), options, rotation) {
  for (Index i = 0; i < this->size(); ++i)
    momenta_.emplace_back(this->sign().block(i).elements(), mesh.world().device());
}

template <class Real>
void Muon<Real>::form_direction(Index i, const Piece& piece, const Scalar& scale) {
  const auto mu = static_cast<Real>(this->options().mu);
  const MatrixView<Real> u = this->sign().block(i);
  const MatrixView<Real> m = momenta_[static_cast<std::size_t>(i)].matrix(0, u.rows, u.cols);
  add<Real>(scale, piece.gradient, mu, m);  // M <- mu M + G
  if (!this->options().nesterov) return copy<Real>(m, u);
  add<Real>(scale, piece.gradient, Real{0}, u);  // U <- G + mu M
  add<Real>(mu, m, Real{1}, u);
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
