#include "optimizers/dion2.h"

#include "optimizers/sign_descent.h"
#include "runtime/numbers.h"
#include "runtime/passes.h"
#include "runtime/random.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace lowband {
namespace {

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

std::vector<CutMatrix> selected_parts(const std::vector<LayerMatrix>& matrices,
                                      const OptimizerOptions& options) {
  std::vector<CutMatrix> parts;
  parts.reserve(matrices.size());
  for (const LayerMatrix& matrix : matrices) parts.push_back(selected_part(matrix, options));
  return parts;
}

/// The positions of the `count` largest values, ties to the lower position; in increasing order.
std::vector<Index> largest(std::span<const double> values, Index count) {
  std::vector<Index> positions(values.size());
  std::iota(positions.begin(), positions.end(), Index{0});
  const auto last = positions.begin() + count;
  std::partial_sort(positions.begin(), last, positions.end(), [&](Index i, Index j) {
    return values[at(i)] != values[at(j)] ? values[at(i)] > values[at(j)] : i < j;
  });
  positions.erase(last, positions.end());
  std::ranges::sort(positions);
  return positions;
}

/// How many of increasing `indices` lie in each piece.
std::vector<Index> counts_in(const std::vector<Range>& pieces, const std::vector<Index>& indices) {
  std::vector<Index> counts;
  counts.reserve(pieces.size());
  for (const Range& piece : pieces)
    counts.push_back(std::ranges::lower_bound(indices, piece.end) -
                     std::ranges::lower_bound(indices, piece.begin));
  return counts;
}

}  // namespace

bool slices_are_rows(const ParameterInfo& matrix, const OptimizerOptions& options) {
  return options.kind == OptimizerKind::kNorDion2 || matrix.rows <= matrix.cols;
}

Index selected_slices(Index slices, const OptimizerOptions& options) {
  return (options.dion2_numerator * slices + options.dion2_denominator - 1) / options.dion2_denominator;
}

// Which pieces may have slices is known beforehand, how many is not: the first ones here.
CutMatrix selected_part(const LayerMatrix& matrix, const OptimizerOptions& options) {
  CutMatrix part = matrix.cut;
  std::vector<Range>& pieces = slices_are_rows(matrix.info, options) ? part.row_pieces : part.col_pieces;
  Index left = selected_slices(pieces.back().end, options);
  std::vector<Index> counts;
  for (const Range& piece : pieces) {
    counts.push_back(std::min(left, piece.size()));
    left -= counts.back();
  }
  pieces = consecutive_pieces(counts);
  return part;
}

Index slice_norm_bytes(const ParameterInfo& matrix, const MeshShape& mesh, const OptimizerOptions& options) {
  if (mesh.shard * mesh.tensor == 1 || options.dion2_selection == SliceSelection::kRandom) return 0;
  return (slices_are_rows(matrix, options) ? matrix.rows : matrix.cols) * dtype_bytes(DType::kF64);
}

template <class Real>
Dion2<Real>::Dion2(ProcessMesh& mesh, std::vector<LayerMatrix> matrices, const OptimizerOptions& options,
                   Index rotation)
    : options_(options),
      group_(&mesh.within_replica()),
      sign_(mesh, selected_parts(matrices, options), options.sign, rotation) {
  Index norms = 0;
  for (LayerMatrix& definition : matrices) {
    Matrix& matrix = matrices_.emplace_back();
    matrix.of_rows = slices_are_rows(definition.info, options);
    const Range rows = definition.cut.rows_of(mesh.position()),
                cols = definition.cut.cols_of(mesh.position());
    matrix.own = matrix.of_rows ? rows : cols;
    matrix.momentum = Buffer<Real>(rows.size() * cols.size(), mesh.world().device());
    matrix.m = matrix.momentum.matrix(0, rows.size(), cols.size());
    if (options.kind == OptimizerKind::kNorDion2) {
      const Range kept = definition.cut.kept_rows(true, mesh.position());
      matrix.v = Buffer<Real>(kept.size());
      matrix.first_kept = kept.begin - rows.begin;
    }
    matrix.definition = std::move(definition);
    matrix.norms_begin = norms;
    norms += matrix.slices();
  }
  for (const Matrix& matrix : matrices_)
    norm_shares_.push_back({matrix.definition.cut.name, matrix.slices()});
  norms_ = Buffer<double>(norms);
  if (options.kind == OptimizerKind::kNorDion2) row_scaling_.emplace(mesh, sign_, options.normuon_beta2);
}

template <class Real>
typename Dion2<Real>::LaterOutcome Dion2<Real>::update(std::span<const Piece> pieces, const Scalar& scale,
                                                       const StepInfo& info, Diagnosis<Real>* /*diagnosis*/) {
  // M <- M + G
  for (std::size_t i = 0; i < matrices_.size(); ++i) {
    if (is_set(pieces[i].skipped)) continue;
    add<Real>(scale, pieces[i].gradient, Real{1}, matrices_[i].m);
  }
  select(info.step);
  // U <- M_K ; M_K <- mu M_K. A skipped matrix takes part with zeros.
  for (Index i = 0; i < size(); ++i) {
    if (is_set(pieces[at(i)].skipped)) {
      fill<Real>(Real{0}, sign_.block(i));
    } else {
      take(matrices_[at(i)], sign_.block(i));
    }
  }
  sign_.compute();
  if (row_scaling_) scale_rows(pieces);
  for (Index i = 0; i < size(); ++i) {
    if (!is_set(pieces[at(i)].skipped))
      move_weight(matrices_[at(i)], sign_.block(i), pieces[at(i)].weight, info.learning_rate);
  }
  return [] { return Outcome{}; };
}

// |M_s|_1 of every slice s; a sum that is no number counts as the largest, so that there is an order.
template <class Real>
void Dion2<Real>::sum_norms() {
  norms_.fill(0);
  for (const Matrix& matrix : matrices_) {
    sums_of_magnitudes<Real>(matrix.of_rows, matrix.m,
                             norms_.span(matrix.norms_begin + matrix.own.begin, matrix.own.size()));
  }
  if (group_->size() > 1 && size() > 0)
    group_->all_reduce(norms_.span(), Reduction::kSum, {Purpose::kUpdate, norm_shares_});
  for (double& norm : norms_.span()) {
    if (std::isnan(norm)) norm = std::numeric_limits<double>::infinity();
  }
}

template <class Real>
void Dion2<Real>::select(Index step) {
  const bool random = options_.dion2_selection == SliceSelection::kRandom;
  if (!random) sum_norms();
  for (Index i = 0; i < size(); ++i) {
    Matrix& matrix = matrices_[at(i)];
    const std::span<double> values = norms_.span(matrix.norms_begin, matrix.slices());
    if (random) {
      // The k largest of numbers drawn for all slices are k slices drawn without replacement.
      const RandomStream stream(options_.seed, matrix.definition.info.name + ".slices", step);
      for (Index s = 0; s < matrix.slices(); ++s) values[at(s)] = stream.uniform(s);
    }
    matrix.selected = largest(values, selected_slices(matrix.slices(), options_));
    matrix.own_places.clear();
    for (const Index s : matrix.selected) {
      if (s >= matrix.own.begin && s < matrix.own.end) matrix.own_places.push_back(s - matrix.own.begin);
    }
    const CutMatrix& cut = matrix.definition.cut;
    std::vector<Range> pieces =
        consecutive_pieces(counts_in(matrix.of_rows ? cut.row_pieces : cut.col_pieces, matrix.selected));
    matrix.of_rows ? sign_.set_row_pieces(i, std::move(pieces)) : sign_.set_col_pieces(i, std::move(pieces));
  }
  sign_.arrange();
}

template <class Real>
void Dion2<Real>::take(const Matrix& matrix, MatrixView<Real> u) {
  take_slices<Real>(matrix.of_rows, matrix.own_places, matrix.m, u);
  add_to_slices<Real>(static_cast<Real>(options_.mu - 1), u, matrix.of_rows, matrix.own_places, matrix.m);
}

template <class Real>
void Dion2<Real>::scale_rows(std::span<const Piece> pieces) {
  std::vector<typename RowScaling<Real>::Rows> rows;
  for (std::size_t i = 0; i < matrices_.size(); ++i)
    rows.push_back(
        {is_set(pieces[i].skipped), matrices_[i].v.span(), matrices_[i].first_kept, matrices_[i].own_places});
  row_scaling_->apply(rows);
}

// W <- (1 - eta wd) W ; W_K <- W_K - eta c U
template <class Real>
void Dion2<Real>::move_weight(const Matrix& matrix, MatrixView<const Real> u, MatrixView<Real> weight,
                              double eta) const {
  scale<Real>(static_cast<Real>(1 - eta * options_.weight_decay), weight);
  const double c =
      update_scale(options_.update_scale, matrix.definition.info.rows, matrix.definition.info.cols);
  add_to_slices<Real>(static_cast<Real>(-eta * c), u, matrix.of_rows, matrix.own_places, weight);
}

template <class Real>
std::vector<StateTensor<Real>> Dion2<Real>::state(Index i) {
  Matrix& matrix = matrices_[at(i)];
  std::vector<StateTensor<Real>> tensors{{matrix.definition.state_name("M"), matrix.m}};
  if (row_scaling_)
    tensors.push_back({matrix.definition.state_name("row_v"), matrix.v.matrix(0, matrix.v.size(), 1)});
  return tensors;
}

template class Dion2<float>;
template class Dion2<double>;

}  // namespace lowband
