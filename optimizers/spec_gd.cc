#include "optimizers/spec_gd.h"

namespace lowband {

template <class Real>
SpecGd<Real>::SpecGd(ProcessMesh& mesh, std::vector<ParameterInfo> matrices, const OptimizerOptions& options,
                     Index rotation)
    : SignDescent<Real>(mesh, std::move(matrices), options, rotation),
      group_(&mesh.within_replica()),
      inner_products_(this->sign().size()) {
  for (Index j = 0; j < this->sign().size(); ++j) shares_.push_back({this->sign().matrix(j).name, 1});
}

template <class Real>
void SpecGd<Real>::form_direction(Index i, const Piece& piece, Real scale) {
  scale_ = static_cast<double>(scale);
  for (Index j = this->signed_of(i).begin; j < this->signed_of(i).end; ++j) {
    for (const auto& [first_row, first_col, u] : this->tiles(j)) {
      for (Index row = 0; row < u.rows; ++row) {
        const Real* const gradient = piece.gradient.row(first_row + row) + first_col;
        for (Index col = 0; col < u.cols; ++col) u(row, col) = scale * gradient[col];
      }
    }
  }
}

template <class Real>
void SpecGd<Real>::form_signs(std::span<const Piece> pieces, const StepInfo& /*info*/) {
  this->sign().compute();
  inner_products_.fill(0);
  for (Index i = 0; i < this->size(); ++i) {
    const Piece& piece = pieces[static_cast<std::size_t>(i)];
    if (piece.skipped) continue;
    for (Index j = this->signed_of(i).begin; j < this->signed_of(i).end; ++j) {
      for (const auto& [first_row, first_col, u] : this->tiles(j)) {
        for (Index row = 0; row < u.rows; ++row) {
          const Real* const gradient = piece.gradient.row(first_row + row) + first_col;
          for (Index col = 0; col < u.cols; ++col)
            inner_products_[j] +=
                scale_ * static_cast<double>(gradient[col]) * static_cast<double>(u(row, col));
        }
      }
    }
  }
  if (group_->size() > 1 && this->size() > 0)
    group_->all_reduce(inner_products_.span(), Reduction::kSum, {Purpose::kUpdate, shares_});
}

template <class Real>
double SpecGd<Real>::step_size(Index j, const StepInfo& info) const {
  return info.learning_rate * inner_products_[j];
}

Index inner_product_bytes(const CutMatrix& matrix) {
  return matrix.processes() == 1 ? 0 : dtype_bytes(DType::kF64);
}

template class SpecGd<float>;
template class SpecGd<double>;

}  // namespace lowband
