#include "optimizers/normuon.h"

#include "runtime/numbers.h"

#include <numeric>

namespace lowband {

template <class Real>
NorMuon<Real>::NorMuon(ProcessMesh& mesh, std::vector<LayerMatrix> matrices, const OptimizerOptions& options,
                       Index rotation)
    : Muon<Real>(mesh, std::move(matrices), options, rotation),
      row_scaling_(mesh, this->sign(), options.normuon_beta2) {
  for (Index i = 0; i < this->size(); ++i) {
    const CutMatrix& cut = this->matrix(i).cut;
    const Range rows = cut.rows_of(mesh.position()), kept = cut.kept_rows(true, mesh.position());
    v_.emplace_back(kept.size());
    first_kept_.push_back(kept.begin - rows.begin);
    std::vector<Index>& places = places_.emplace_back(rows.size());
    std::iota(places.begin(), places.end(), Index{0});
  }
}

template <class Real>
void NorMuon<Real>::form_signs(std::span<const Piece> pieces, const StepInfo& /*info*/) {
  this->sign().compute();
  std::vector<typename RowScaling<Real>::Rows> rows;
  for (std::size_t i = 0; i < v_.size(); ++i)
    rows.push_back({is_set(pieces[i].skipped), v_[i].span(), first_kept_[i], places_[i]});
  row_scaling_.apply(rows);
}

template <class Real>
std::vector<StateTensor<Real>> NorMuon<Real>::state(Index i) {
  std::vector<StateTensor<Real>> tensors = Muon<Real>::state(i);
  Buffer<Real>& v = v_[static_cast<std::size_t>(i)];
  tensors.push_back({this->matrix(i).state_name("row_v"), v.matrix(0, v.size(), 1)});
  return tensors;
}

template class NorMuon<float>;
template class NorMuon<double>;

}  // namespace lowband
