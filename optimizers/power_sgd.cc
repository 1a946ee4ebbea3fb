#include "optimizers/power_sgd.h"

#include "runtime/passes.h"

namespace lowband {

template <class Real>
PowerSgd<Real>::PowerSgd(ProcessMesh& mesh, Communicator& alone, const std::vector<LayerMatrix>& matrices,
                         const std::vector<DenseTensor>& riders, const OptimizerOptions& options)
    : FactoredMatrices<Real>(mesh, alone, matrices, riders, options, "e") {
  for (Index i = 0; i < this->size(); ++i)
    momentum_.emplace_back(this->matrix(i).s.elements(), this->matrix(i).s.device);
}

template <class Real>
void PowerSgd<Real>::apply(Index i, MatrixView<Real> weight, const Scalar& update_scale,
                           const StepInfo& info) {
  const auto& matrix = this->matrix(i);
  const MatrixView<const Real> p = this->p(i);
  const MatrixView<const Real> r = this->mean_r(i);
  const MatrixView<Real> q = this->next_q(matrix);
  const double eta = info.learning_rate;

  // Q <- c R
  add<Real>(update_scale, r, Real{0}, q);
  decompress_and_update<Real>(
      matrix.pair(p, q), matrix.pair(p, this->residual_r(i)), static_cast<Real>(this->options().lambda),
      static_cast<Real>(eta), static_cast<Real>(1 - eta * this->options().weight_decay), matrix.s,
      momentum_[static_cast<std::size_t>(i)].matrix(0, matrix.s.rows, matrix.s.cols), weight);
}

template <class Real>
void PowerSgd<Real>::add_state(Index i, std::vector<StateTensor<Real>>& tensors) {
  const auto& matrix = this->matrix(i);
  tensors.push_back({matrix.definition.state_name("u"),
                     momentum_[static_cast<std::size_t>(i)].matrix(0, matrix.s.rows, matrix.s.cols)});
}

template class PowerSgd<float>;
template class PowerSgd<double>;

}  // namespace lowband
