#include "optimizers/spectra.h"

#include "optimizers/keyed_columns.h"
#include "runtime/copy.h"
#include "runtime/low_rank.h"
#include "runtime/numbers.h"
#include "runtime/passes.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace lowband {
namespace {

/// Added to RMS(O).
constexpr double kRmsEpsilon = 1e-8;
/// Root mean square of the entries of a step, over the learning rate. Reference: algorithm 2, line 6.
constexpr double kStepRms = 0.2;

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

RandomStream random_of_v(const ParameterInfo& info, std::uint64_t seed, Index step) {
  return RandomStream(seed, info.name + ".V", step);
}

}  // namespace

Index spectra_rank(const ParameterInfo& matrix, double fraction) {
  constexpr Index kMillion = 1'000'000;
  const Index side = std::min(matrix.rows, matrix.cols);
  const auto millionths = static_cast<Index>(std::llround(fraction * static_cast<double>(kMillion)));
  return std::clamp((side * millionths + kMillion / 2) / kMillion, Index{1}, side);
}

template <class Real>
Spectra<Real>::Spectra(ProcessMesh& mesh, Communicator& alone, const std::vector<LayerMatrix>& matrices,
                       const OptimizerOptions& options)
    : mesh_(&mesh),
      options_(options),
      matrices_(make_matrices(mesh, matrices, options)),
      exchange_({.replica = &alone, .within_replica = &mesh.within_replica()}, factor_shapes(mesh, matrices_),
                {}, {}),
      cache_(v_shapes(factor_shapes(mesh, matrices_)), {0}, mesh.world().device()),
      squares_(static_cast<Index>(matrices_.size())) {
  for (Index i = 0; i < size(); ++i) {
    Matrix& matrix = matrices_[at(i)];
    const MatrixView<Real> v = cache_.owned(i);
    const RandomStream stream = random_of_v(matrix.info, options.seed, 0);
    const Index first = (matrix.cols.begin + matrix.owned_begin) * matrix.k;
    Buffer<Real> drawn(v.elements());
    for (Index e = 0; e < drawn.size(); ++e) drawn[e] = static_cast<Real>(stream.normal(first + e));
    copy<Real>(drawn.line(), v.line());
    shares_.push_back({matrix.definition.cut.name, 1});
  }
}

template <class Real>
std::vector<typename Spectra<Real>::Matrix> Spectra<Real>::make_matrices(
    const ProcessMesh& mesh, const std::vector<LayerMatrix>& definitions, const OptimizerOptions& options) {
  const MeshPosition& position = mesh.position();
  std::vector<Matrix> matrices;
  for (const LayerMatrix& definition : definitions) {
    const Range rows = definition.cut.rows_of(position), cols = definition.cut.cols_of(position);
    Matrix matrix{.definition = definition,
                  .info = definition.info,
                  .k = spectra_rank(definition.info, options.spectra_fraction),
                  .cols = cols,
                  .owned_begin = definition.cut.kept_rows(false, position).begin - cols.begin,
                  .momentum = {},
                  .m = {}};
    Device* const device = mesh.world().device();
    matrix.one_pass =
        mesh.shape().tensor * mesh.shape().shard == 1 && matrix.k <= kOnePassColumns && device == nullptr;
    matrix.momentum = Buffer<Real>(rows.size() * cols.size(), device);
    matrix.m = matrix.momentum.matrix(0, rows.size(), cols.size());
    matrices.push_back(std::move(matrix));
  }
  return matrices;
}

template <class Real>
std::vector<FactorShape> Spectra<Real>::factor_shapes(ProcessMesh& mesh,
                                                      const std::vector<Matrix>& matrices) {
  std::vector<FactorShape> shapes;
  shapes.reserve(matrices.size());
  for (const Matrix& matrix : matrices) {
    shapes.push_back(factor_shape(matrix.definition, matrix.k, false, mesh));
    shapes.back().right_follows = matrix.one_pass;
  }
  return shapes;
}

template <class Real>
std::vector<typename FactorRows<Real>::Shape> Spectra<Real>::v_shapes(
    const std::vector<FactorShape>& shapes) {
  std::vector<typename FactorRows<Real>::Shape> rows;
  rows.reserve(shapes.size());
  for (const FactorShape& shape : shapes) rows.push_back(right_rows<Real>(shape));
  return rows;
}

template <class Real>
typename Spectra<Real>::LaterOutcome Spectra<Real>::update(std::span<const Piece> pieces, const Scalar& scale,
                                                           const StepInfo& info,
                                                           Diagnosis<Real>* /*diagnosis*/) {
  Outcome outcome;
  if (matrices_.empty()) return [outcome] { return outcome; };
  const Real gradient_scale = on_host<Real>(scale);
  accumulate(pieces, gradient_scale);
  cache_.all_gather();
  const Index iterations = options_.spectra_iterations + (info.step == 0 ? kFirstIterations : 0);
  for (Index iteration = 0; iteration < iterations; ++iteration) {
    iterate(pieces, gradient_scale, iteration == 0);
    for (Index i = 0; i < size(); ++i) {
      if (is_set(pieces[at(i)].skipped)) continue;
      if (exchange_.factorisation(i) == Factorisation::kNonFinite)
        throw Error(cat("optimizer: step ", info.step, ": M of ", matrices_[at(i)].info.name,
                        " is not finite although its gradients are"));
      normalise(i, info.step);
      outcome.householder_fallbacks += fell_back(exchange_.factorisation(i));
    }
  }
  for (Index i = 0; i < size(); ++i) {
    if (is_set(pieces[at(i)].skipped)) continue;
    const MatrixView<Real> cached = cache_.owned(i);
    copy<Real>(exchange_.right(i).row_block(matrices_[at(i)].owned_begin, cached.rows), cached);
    outcome.dead_columns += std::ranges::count(exchange_.dead(i), std::uint8_t{1});
    apply(i, pieces[at(i)].weight, info);
  }
  return [outcome] { return outcome; };
}

// M <- mu M + G, and its square. A skipped matrix takes part with zeros.
template <class Real>
void Spectra<Real>::accumulate(std::span<const Piece> pieces, Real scale) {
  for (Index i = 0; i < size(); ++i) {
    squares_[i] = 0;
    if (is_set(pieces[at(i)].skipped) || matrices_[at(i)].one_pass) continue;
    squares_[i] = lowband::accumulate<Real>(scale, pieces[at(i)].gradient, static_cast<Real>(options_.mu),
                                            matrices_[at(i)].m);
  }
  if (mesh_->within_replica().size() > 1)
    mesh_->within_replica().all_reduce(squares_.span(), Reduction::kSum, {Purpose::kUpdate, shares_});
}

template <class Real>
void Spectra<Real>::iterate(std::span<const Piece> pieces, Real scale, bool first) {
  for (Index i = 0; i < size(); ++i) {
    const MatrixView<Real> u = exchange_.left(i);
    if (is_set(pieces[at(i)].skipped)) {
      fill<Real>(Real{0}, u);
      fill<Real>(Real{0}, exchange_.right(i));
      continue;
    }
    const MatrixView<Real> m = matrices_[at(i)].m;
    const MatrixView<const Real> v = first ? cache_.piece(i) : exchange_.right(i);
    if (matrices_[at(i)].one_pass && first) {  // M <- mu M + G ; U <- M V ; Z <- M^T (M V)
      squares_[i] = accumulate_and_multiply_there_and_back<Real>(
          scale, pieces[at(i)].gradient, static_cast<Real>(options_.mu), m, v, u, exchange_.right(i));
    } else if (matrices_[at(i)].one_pass) {  // U <- M V ; Z <- M^T (M V)
      multiply_there_and_back<Real>(m, v, u, exchange_.right(i));
    } else {  // U <- M V
      multiply<Real>(Op::kNone, m, v, u);
    }
  }
  exchange_.exchange_left();
  for (Index i = 0; i < size(); ++i) {
    if (is_set(pieces[at(i)].skipped) || exchange_.right_followed(i)) continue;
    // Z <- M^T U; dead columns of U give zero columns
    multiply<Real>(Op::kTranspose, matrices_[at(i)].m, exchange_.left(i), exchange_.right(i));
  }
  exchange_.exchange_right();
}

template <class Real>
void Spectra<Real>::normalise(Index i, Index step) {
  const Matrix& matrix = matrices_[at(i)];
  const MatrixView<Real> v = exchange_.right(i);
  const std::span<const double> s = exchange_.right_norms(i);
  constexpr auto kLargest = static_cast<double>(std::numeric_limits<Real>::max());
  std::vector<Real> to_unit;
  for (const double norm : s)
    to_unit.push_back(norm > 0 ? static_cast<Real>(std::min(1 / norm, kLargest)) : Real{1});
  scale_columns<Real>(to_unit, v);
  for (Index j = 0; j < v.cols; ++j) {
    if (s[at(j)] > 0) continue;
    const RandomStream stream = random_of_v(matrix.info, options_.seed, step + 1);  // stream 0 gave the first
    const std::vector<double> column = keyed_unit_column(stream, matrix.info.cols, matrix.k, j);
    copy_column(column, matrix.cols.begin, v.block(0, v.rows, j, 1));
  }
}

// |M|^2 - sum s^2 is formed in double of numbers with the rounding of Real; a tail below that is none.
// Columns with s_j = 0 leave nothing to bring down, and are not counted in k.
template <class Real>
void Spectra<Real>::apply(Index i, MatrixView<Real> weight, const StepInfo& info) {
  const Matrix& matrix = matrices_[at(i)];
  const MatrixView<const Real> m = matrix.m;
  const MatrixView<Real> v = exchange_.right(i);
  const std::span<const double> s = exchange_.right_norms(i);
  const double elements = static_cast<double>(matrix.info.elements());
  const Index side = std::min(matrix.info.rows, matrix.info.cols);

  double tail = squares_[i];
  for (const double x : s) tail -= x * x;
  const Index live = std::ranges::count_if(s, [](double x) { return x > 0; });
  const bool has_tail =
      live < side && tail > 64 * static_cast<double>(std::numeric_limits<Real>::epsilon()) * squares_[i];
  const double sigma = has_tail ? std::sqrt(tail / static_cast<double>(side - live)) : 0;
  const double rms =
      has_tail ? sigma * std::sqrt(static_cast<double>(side) / elements) : std::sqrt(squares_[i] / elements);

  // W <- (1 - eta wd) W - c O
  const double eta = info.learning_rate;
  const auto decay = static_cast<Real>(1 - eta * options_.weight_decay);
  const auto step = static_cast<Real>(kStepRms * eta / (rms + kRmsEpsilon));
  add<Real>(-step, m, decay, weight);
  if (!has_tail) return;
  std::vector<Real> down;
  for (const double x : s) down.push_back(static_cast<Real>(x - sigma));
  scale_columns<Real>(down, v);
  add_product<Real>(step, {exchange_.left(i), v}, Real{1}, weight);
}

template <class Real>
std::vector<StateTensor<Real>> Spectra<Real>::state(Index i) {
  const Matrix& matrix = matrices_[at(i)];
  return {{matrix.definition.state_name("M"), matrix.m},
          {matrix.definition.state_name("V"), cache_.owned(i)}};
}

template class Spectra<float>;
template class Spectra<double>;

}  // namespace lowband
