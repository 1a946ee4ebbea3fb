#include "optimizers/spec_gd.h"

#include "runtime/numbers.h"
#include "runtime/passes.h"

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
void SpecGd<Real>::form_direction(Index i, const Piece& piece, const Scalar& scale) {
  scale_ = static_cast<double>(on_host<Real>(scale));
  add<Real>(scale, piece.gradient, Real{0}, this->sign().block(i));
}

template <class Real>
void SpecGd<Real>::form_signs(std::span<const Piece> pieces, const StepInfo& /*info*/) {
  this->sign().compute();
  inner_products_.fill(0);
  for (Index i = 0; i < this->size(); ++i) {
    const Piece& piece = pieces[static_cast<std::size_t>(i)];
    if (is_set(piece.skipped)) continue;
    inner_products_[i] = scale_ * inner_product<Real>(piece.gradient, this->sign().block(i));
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
