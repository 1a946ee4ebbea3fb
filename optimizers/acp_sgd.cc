#include "optimizers/acp_sgd.h"

#include "optimizers/keyed_columns.h"
#include "runtime/copy.h"
#include "runtime/low_rank.h"
#include "runtime/numbers.h"
#include "runtime/passes.h"

#include <algorithm>
#include <cmath>

namespace lowband {
namespace {

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

}  // namespace

template <class Real>
AcpSgd<Real>::AcpSgd(ProcessMesh& mesh, const std::vector<LayerMatrix>& matrices,
                     const OptimizerOptions& options)
    : options_(options),
      matrices_(make_matrices(mesh, matrices)),
      left_(mesh, matrices_, true, options),
      right_(mesh, matrices_, false, options) {
  Index largest = 0;
  for (const Matrix& matrix : matrices_)
    largest = std::max(largest, std::max(matrix.e.rows, matrix.e.cols) * matrix.definition.factor_rank);
  scaled_ = Buffer<Real>(largest, mesh.world().device());
}

template <class Real>
std::vector<typename AcpSgd<Real>::Matrix> AcpSgd<Real>::make_matrices(
    const ProcessMesh& mesh, const std::vector<LayerMatrix>& definitions) {
  std::vector<Matrix> matrices;
  for (const LayerMatrix& definition : definitions) {
    const Index rows = definition.cut.rows_of(mesh.position()).size();
    const Index cols = definition.cut.cols_of(mesh.position()).size();
    Matrix matrix;
    matrix.definition = definition;
    matrix.error = Buffer<Real>(rows * cols, mesh.world().device());
    matrix.momentum = Buffer<Real>(rows * cols, mesh.world().device());
    matrix.e = matrix.error.matrix(0, rows, cols);
    matrix.u = matrix.momentum.matrix(0, rows, cols);
    matrices.push_back(std::move(matrix));
  }
  return matrices;
}

// Of an exchange whose right factor is the one with the rows of the matrix (left), or with its columns.
template <class Real>
std::vector<FactorShape> AcpSgd<Real>::factor_shapes(ProcessMesh& mesh, const std::vector<Matrix>& matrices,
                                                     bool left) {
  std::vector<FactorShape> shapes;
  shapes.reserve(matrices.size());
  for (const Matrix& matrix : matrices)
    shapes.push_back(factor_shape(matrix.definition, matrix.definition.factor_rank, left, mesh));
  return shapes;
}

namespace {

template <class Real>
FactorRows<Real> factor_rows(const std::vector<FactorShape>& shapes, Device* device) {
  std::vector<typename FactorRows<Real>::Shape> rows;
  rows.reserve(shapes.size());
  for (const FactorShape& shape : shapes) rows.push_back(right_rows<Real>(shape));
  return FactorRows<Real>(std::move(rows), {0}, device);
}

template <class Real>
std::vector<MatrixView<Real>> owned_of(FactorRows<Real>& rows, std::size_t matrices) {
  std::vector<MatrixView<Real>> owned;
  for (std::size_t i = 0; i < matrices; ++i) owned.push_back(rows.owned(static_cast<Index>(i)));
  return owned;
}

}  // namespace

template <class Real>
AcpSgd<Real>::Factor::Factor(ProcessMesh& mesh, const std::vector<Matrix>& matrices, bool is_left,
                             const OptimizerOptions& options)
    : left(is_left),
      rows(factor_rows<Real>(factor_shapes(mesh, matrices, is_left), mesh.world().device())),
      orthonormaliser(mesh.within_replica(), owned_of(rows, matrices.size())),
      exchange({.replica = &mesh.replica(), .within_replica = &mesh.within_replica()},
               factor_shapes(mesh, matrices, is_left), {},
               {.keep_own_right = true, .right_only = true, .wire = options.wire}) {
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    const LayerMatrix& matrix = matrices[i].definition;
    const MeshPosition& position = mesh.position();
    first_rows.push_back((is_left ? matrix.cut.rows_of(position) : matrix.cut.cols_of(position)).begin);
    kept_rows.push_back(matrix.cut.kept_rows(is_left, position));
    kept.emplace_back(kept_rows.back().size() * matrix.factor_rank, mesh.world().device());
    const RandomStream stream = random(matrix.info, options.seed, 0);
    const Index first = kept_rows.back().begin * matrix.factor_rank;
    Buffer<Real> drawn(kept.back().size());
    for (Index e = 0; e < drawn.size(); ++e) drawn[e] = static_cast<Real>(stream.normal(first + e));
    copy<Real>(drawn.line(), kept.back().line());
  }
}

template <class Real>
RandomStream AcpSgd<Real>::Factor::random(const ParameterInfo& info, std::uint64_t seed, Index step) const {
  return RandomStream(seed, info.name + (left ? ".P" : ".Q"), step);
}

// What is kept stays as it was received, since a matrix that is skipped may need it again.
template <class Real>
void AcpSgd<Real>::Factor::orthonormalise() {
  for (std::size_t i = 0; i < kept.size(); ++i)
    copy<Real>(kept[i].line(), rows.owned(static_cast<Index>(i)).line());
  orthonormaliser.run();
  rows.all_gather();
}

template <class Real>
void AcpSgd<Real>::exchange(std::span<const Piece> pieces, const Scalar& gradient_scale, Index step) {
  if (matrices_.empty()) return;
  orthonormal(step).orthonormalise();
  Factor& factor = sent(step);
  for (Index i = 0; i < size(); ++i) {
    const MatrixView<Real> sum = factor.exchange.right(i);
    if (is_set(pieces[at(i)].skipped)) {
      fill<Real>(Real{0}, sum);
      continue;
    }
    // e <- e + G ; P <- e Q, or Q <- e^T P
    accumulate_and_multiply<Real>(gradient_scale, pieces[at(i)].gradient, matrices_[at(i)].e,
                                  factor.left ? Op::kNone : Op::kTranspose, orthonormal(step).rows.piece(i),
                                  sum);
  }
  factor.exchange.exchange_right();
  last_sent_ = &factor;
}

// |P Q^T| is the norm of the one that is not orthonormal.
template <class Real>
void AcpSgd<Real>::add_sum_of_squares(MatrixView<double> sum) const {
  if (last_sent_ != nullptr) add_squares(last_sent_->exchange.norms_of_right(), sum);
}

template <class Real>
typename AcpSgd<Real>::LaterOutcome AcpSgd<Real>::update(std::span<const Piece> pieces,
                                                         const Scalar& update_scale, const StepInfo& info,
                                                         Diagnosis<Real>* diagnosis) {
  Outcome outcome;
  Factor& received = sent(info.step);
  Factor& basis = orthonormal(info.step);
  for (Index i = 0; i < size(); ++i) {
    Matrix& matrix = matrices_[at(i)];
    const std::string& name = matrix.definition.info.name;
    if (diagnosis != nullptr) diagnosis->begin(name, matrix.definition.factor_rank, matrix.e);
    if (is_set(pieces[at(i)].skipped)) {
      if (diagnosis != nullptr) diagnosis->end_unsent(matrix.e);
      continue;
    }
    const std::span<const double> norms = received.exchange.right_norms(i);
    const bool finite = std::ranges::all_of(norms, [](double norm) { return std::isfinite(norm); });
    if (!finite || basis.orthonormaliser.factorisation(i) == Factorisation::kNonFinite)
      throw Error(
          cat("optimizer: step ", info.step, ": e of ", name, " is not finite although its gradients are"));
    apply(i, pieces[at(i)].weight, update_scale, info);
    const Index dead_columns = std::ranges::count(basis.orthonormaliser.dead(i), std::uint8_t{1});
    if (diagnosis != nullptr) {
      const MatrixView<const Real> a = received.exchange.right(i), b = basis.rows.piece(i);
      diagnosis->end(matrix.e, received.left ? FactorPair<Real>{a, b} : FactorPair<Real>{b, a}, 1, norms,
                     dead_columns);
    }
    keep(i, info.step);
    outcome.dead_columns += dead_columns;
    outcome.householder_fallbacks += fell_back(basis.orthonormaliser.factorisation(i));
  }
  return [outcome] { return outcome; };
}

template <class Real>
void AcpSgd<Real>::apply(Index i, MatrixView<Real> weight, const Scalar& update_scale, const StepInfo& info) {
  Matrix& matrix = matrices_[at(i)];
  Factor& received = sent(info.step);
  const MatrixView<const Real> mean = received.exchange.right(i), own = received.exchange.own_right(i);
  const MatrixView<const Real> basis = orthonormal(info.step).rows.piece(i);
  const auto pair = [&](MatrixView<const Real> factor) {
    return received.left ? FactorPair<Real>{factor, basis} : FactorPair<Real>{basis, factor};
  };
  const MatrixView<Real> scaled = scaled_.matrix(0, mean.rows, mean.cols);
  add<Real>(update_scale, mean, Real{0}, scaled);
  const double eta = info.learning_rate;
  decompress_and_update<Real>(pair(scaled), pair(own), static_cast<Real>(options_.lambda),
                              static_cast<Real>(eta), static_cast<Real>(1 - eta * options_.weight_decay),
                              matrix.e, matrix.u, weight);
}

template <class Real>
void AcpSgd<Real>::keep(Index i, Index step) {
  Factor& received = sent(step);
  const ParameterInfo& info = matrices_[at(i)].definition.info;
  const MatrixView<const Real> mean = received.exchange.right(i);
  Buffer<Real>& kept = received.kept[at(i)];
  const Index r = mean.cols, first = received.kept_rows[at(i)].begin;
  const MatrixView<Real> rows = kept.matrix(0, kept.size() / r, r);
  copy<Real>(mean.row_block(first - received.first_rows[at(i)], rows.rows), rows);
  const std::span<const std::uint8_t> dead = orthonormal(step).orthonormaliser.dead(i);
  for (Index j = 0; j < r; ++j) {
    if (!dead[at(j)]) continue;
    const std::vector<double> column =
        keyed_unit_column(received.random(info, options_.seed, step + 1),  // stream 0 gave the first factor
                          received.left ? info.rows : info.cols, r, j);
    copy_column(column, first, rows.block(0, rows.rows, j, 1));
  }
}

template <class Real>
Index AcpSgd<Real>::diagnosed_elements() const {
  Index elements = 0;
  for (const Matrix& matrix : matrices_)
    elements += Diagnosis<Real>::kSums * matrix.definition.info.elements();
  return elements;
}

template <class Real>
std::vector<StateTensor<Real>> AcpSgd<Real>::state(Index i) {
  Matrix& matrix = matrices_[at(i)];
  const LayerMatrix& definition = matrix.definition;
  const auto kept = [&](Factor& factor) {
    return factor.kept[at(i)].matrix(0, factor.kept_rows[at(i)].size(), definition.factor_rank);
  };
  return {{definition.state_name("e"), matrix.e},
          {definition.state_name("u"), matrix.u},
          {definition.state_name("left"), kept(left_)},
          {definition.state_name("right"), kept(right_)}};
}

template class AcpSgd<float>;
template class AcpSgd<double>;

}  // namespace lowband
