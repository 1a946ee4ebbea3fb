#include "optimizers/spec_gd.h"

#include <algorithm>

namespace lowband {

template <class Real>
SpecGd<Real>::SpecGd(ProcessMesh& mesh, std::vector<LayerMatrix> matrices, const OptimizerOptions& options,
                     Index rotation)
    : SignDescent<Real>(mesh, std::move(matrices), options, rotation),
      group_(&mesh.within_replica()),
      inner_products_(this->sign().size()) {
  for (Index i = 0; i < this->size(); ++i) shares_.push_back({this->matrix(i).cut.name, 1});
}

template <class Real>
void SpecGd<Real>::form_direction(Index i, const Piece& piece, Real scale) {
  scale_ = static_cast<double>(scale);
  const std::span<const Real> gradient = piece.gradient.flat();
  std::ranges::transform(gradient, this->sign().block(i).data, [=](Real g) { return scale * g; });
}

template <class Real>
void SpecGd<Real>::form_signs(std::span<const Piece> pieces, const StepInfo& /*info*/) {
  this->sign().compute();
  inner_products_.fill(0);
  for (Index i = 0; i < this->size(); ++i) {
    const Piece& piece = pieces[static_cast<std::size_t>(i)];
    if (piece.skipped) continue;
    const MatrixView<const Real> u = this->sign().block(i);
    for (Index e = 0; e < u.elements(); ++e)
      inner_products_[i] +=
          scale_ * static_cast<double>(piece.gradient.data[e]) * static_cast<double>(u.data[e]);
  }
  if (group_->size() > 1 && this->size() > 0)
    group_->all_reduce(inner_products_.span(), Reduction::kSum, {Purpose::kUpdate, shares_});
}

template <class Real>
double SpecGd<Real>::step_size(Index i, const StepInfo& info) const {
  return info.learning_rate * inner_products_[i];
}

Index inner_product_bytes(const CutMatrix& matrix) {
  return matrix.processes() == 1 ? 0 : dtype_bytes(DType::kF64);
}

template class SpecGd<float>;
template class SpecGd<double>;

}  // namespace lowband
