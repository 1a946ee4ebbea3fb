#include "optimizers/sign_descent.h"

#include "optimizers/signed_matrices.h"

#include <algorithm>
#include <cmath>

namespace lowband {
namespace {

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

/// Of all parameters, one after the other.
std::vector<CutMatrix> all_cuts(const std::vector<ParameterInfo>& infos, const MeshShape& mesh,
                                const OptimizerOptions& options) {
  std::vector<CutMatrix> cuts;
  for (const ParameterInfo& info : infos) {
    for (SignedMatrix& matrix : signed_matrices(info, mesh, options)) cuts.push_back(std::move(matrix.cut));
  }
  return cuts;
}

/// Calls `visit(begin in held, begin in the concatenation of what is held of `ranges`, count)`.
template <class Visit>
void for_each_held(const std::vector<Range>& ranges, Range held, Visit visit) {
  Index place = 0;
  for (const Range& range : ranges) {
    const Index begin = std::max(range.begin, held.begin), end = std::min(range.end, held.end);
    if (begin >= end) continue;
    visit(begin - held.begin, place, end - begin);
    place += end - begin;
  }
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
SignDescent<Real>::SignDescent(ProcessMesh& mesh, std::vector<ParameterInfo> matrices,
                               const OptimizerOptions& options, Index rotation)
    : options_(options),
      infos_(std::move(matrices)),
      sign_(mesh, all_cuts(infos_, mesh.shape(), options), options.sign, rotation) {
  const MeshPosition& position = mesh.position();
  for (const ParameterInfo& parameter : infos_) {
    const MatrixLayout layout(parameter.rows, parameter.cols, parameter.cut, mesh.shape().tensor,
                              mesh.shape().shard);
    const Range own_rows = block_rows_.emplace_back(layout.owned_rows(position.shard, position.tensor));
    const Range own_cols = block_cols_.emplace_back(layout.owned_cols(position.shard, position.tensor));
    const Index first = std::ssize(tiles_);
    for (const SignedMatrix& matrix : signed_matrices(parameter, mesh.shape(), options)) {
      const MatrixView<Real> block = sign_.block(std::ssize(tiles_));
      std::vector<Tile>& tiles = tiles_.emplace_back();
      for_each_held(matrix.rows, own_rows, [&](Index row, Index block_row, Index rows) {
        for_each_held(matrix.cols, own_cols, [&](Index col, Index block_col, Index cols) {
          tiles.push_back({row, col, block.block(block_row, rows, block_col, cols)});
        });
      });
    }
    signed_of_.push_back({first, std::ssize(tiles_)});
  }
}

// A skipped matrix takes part with zeros.
template <class Real>
typename SignDescent<Real>::Outcome SignDescent<Real>::update(std::span<const Piece> pieces, Real scale,
                                                              const StepInfo& info,
                                                              Diagnosis<Real>* /*diagnosis*/) {
  for (Index i = 0; i < size(); ++i) {
    if (!pieces[at(i)].skipped) {
      form_direction(i, pieces[at(i)], scale);
      continue;
    }
    for (Index j = signed_of(i).begin; j < signed_of(i).end; ++j)
      std::ranges::fill(sign_.block(j).flat(), Real{0});
  }
  form_signs(pieces, info);
  // W <- (1 - eta wd) W - s U
  const auto decay = static_cast<Real>(1 - info.learning_rate * options_.weight_decay);
  for (Index i = 0; i < size(); ++i) {
    if (pieces[at(i)].skipped) continue;
    for (Index j = signed_of(i).begin; j < signed_of(i).end; ++j) {
      if (sign_.block(j).elements() == 0) continue;
      const auto step = static_cast<Real>(step_size(j, info));
      for (const auto& [first_row, first_col, u] : tiles(j)) {
        for (Index row = 0; row < u.rows; ++row) {
          Real* const w = pieces[at(i)].weight.row(first_row + row) + first_col;
          const Real* const direction = u.row(row);
          for (Index col = 0; col < u.cols; ++col) w[col] = decay * w[col] - step * direction[col];
        }
      }
    }
  }
  return {};
}

template <class Real>
double SignDescent<Real>::step_size(Index j, const StepInfo& info) const {
  return info.learning_rate *
         update_scale(options_.update_scale, sign_.matrix(j).rows(), sign_.matrix(j).cols());
}

template class SignDescent<float>;
template class SignDescent<double>;

}  // namespace lowband
