#include "optimizers/muonbp.h"

namespace lowband {

StepPhase whole_sign_steps(const OptimizerOptions& options) { return {.period = options.muonbp_period}; }

template <class Real>
bool MuonBp<Real>::signs_whole(const StepInfo& info) const {
  return whole_sign_steps(this->options()).contains(info.step);
}

template <class Real>
void MuonBp<Real>::form_signs(std::span<const Piece> /*pieces*/, const StepInfo& info) {
  signs_whole(info) ? this->sign().compute() : this->sign().compute_blocks();
}

template <class Real>
double MuonBp<Real>::step_size(Index i, const StepInfo& info) const {
  if (signs_whole(info)) return SignDescent<Real>::step_size(i, info);
  const OptimizerOptions& options = this->options();
  const MatrixView<const Real> block = this->sign().block(i);
  const double eta_block = options.muonbp_block_rate * info.learning_rate;
  return eta_block * update_scale(options.update_scale, block.rows, block.cols);
}

template class MuonBp<float>;
template class MuonBp<double>;

}  // namespace lowband
