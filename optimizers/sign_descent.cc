#include "optimizers/sign_descent.h"

#include "runtime/numbers.h"
#include "runtime/passes.h"

#include <algorithm>
#include <cmath>

namespace lowband {
namespace {

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

std::vector<CutMatrix> cuts_of(const std::vector<LayerMatrix>& matrices) {
  std::vector<CutMatrix> cuts;
  cuts.reserve(matrices.size());
  for (const LayerMatrix& matrix : matrices) cuts.push_back(matrix.cut);
  return cuts;
}

}  // namespace

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
SignDescent<Real>::SignDescent(ProcessMesh& mesh, std::vector<LayerMatrix> matrices,
                               const OptimizerOptions& options, Index rotation)
    : options_(options),
      matrices_(std::move(matrices)),
      sign_(mesh, cuts_of(matrices_), options.sign, rotation) {}

// A skipped matrix takes part with zeros.
template <class Real>
typename SignDescent<Real>::LaterOutcome SignDescent<Real>::update(std::span<const Piece> pieces,
                                                                   const Scalar& scale, const StepInfo& info,
                                                                   Diagnosis<Real>* /*diagnosis*/) {
  for (Index i = 0; i < size(); ++i) {
    where(pieces[at(i)].skipped, [&] { fill<Real>(Real{0}, sign_.block(i)); });
    unless(pieces[at(i)].skipped, [&] { form_direction(i, pieces[at(i)], scale); });
  }
  form_signs(pieces, info);
  // W <- (1 - eta wd) W - s U
  const auto decay = static_cast<Real>(1 - info.learning_rate * options_.weight_decay);
  for (Index i = 0; i < size(); ++i) {
    const MatrixView<const Real> u = sign_.block(i);
    if (u.elements() == 0) continue;
    unless(pieces[at(i)].skipped,
           [&] { add<Real>(static_cast<Real>(-step_size(i, info)), u, decay, pieces[at(i)].weight); });
  }
  return [] { return Outcome{}; };
}

template <class Real>
double SignDescent<Real>::step_size(Index i, const StepInfo& info) const {
  return info.learning_rate *
         update_scale(options_.update_scale, sign_.matrix(i).rows(), sign_.matrix(i).cols());
}

template class SignDescent<float>;
template class SignDescent<double>;

}  // namespace lowband
