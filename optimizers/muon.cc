#include "optimizers/muon.h"

namespace lowband {

template <class Real>
Muon<Real>::Muon(ProcessMesh& mesh, std::vector<ParameterInfo> matrices, const OptimizerOptions& options,
                 Index rotation)
    : SignDescent<Real>(mesh, std::move(matrices), options, rotation) {
  for (Index i = 0; i < this->size(); ++i)
    momenta_.emplace_back(this->block_rows(i).size() * this->block_cols(i).size());
}

template <class Real>
void Muon<Real>::form_direction(Index i, const Piece& piece, Real scale) {
  const auto mu = static_cast<Real>(this->options().mu);
  const bool nesterov = this->options().nesterov;
  const MatrixView<Real> momentum = this->as_block(i, momenta_[static_cast<std::size_t>(i)]);
  for (Index j = this->signed_of(i).begin; j < this->signed_of(i).end; ++j) {
    for (const auto& [first_row, first_col, u] : this->tiles(j)) {
      for (Index row = 0; row < u.rows; ++row) {
        const Real* const gradient = piece.gradient.row(first_row + row) + first_col;
        Real* const m = momentum.row(first_row + row) + first_col;
        Real* const direction = u.row(row);
        for (Index col = 0; col < u.cols; ++col) {
          const Real g = scale * gradient[col];
          m[col] = mu * m[col] + g;
          direction[col] = nesterov ? g + mu * m[col] : m[col];
        }
      }
    }
  }
}

template <class Real>
std::vector<StateTensor<Real>> Muon<Real>::state(Index i) {
  return {{this->info(i).name + ".M", this->as_block(i, momenta_[static_cast<std::size_t>(i)])}};
}

template class Muon<float>;
template class Muon<double>;

}  // namespace lowband
