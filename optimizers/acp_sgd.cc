#include "optimizers/acp_sgd.h"

#include "optimizers/keyed_columns.h"
#include "runtime/low_rank.h"

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
  scaled_ = Buffer<Real>(largest);
}

template <class Real>
std::vector<typename AcpSgd<Real>::Matrix> AcpSgd<Real>::make_matrices(
    const ProcessMesh& mesh, const std::vector<LayerMatrix>& definitions) {
  std::vector<Matrix> matrices;
  for (const LayerMatrix& definition : definitions) {
    const auto& [info, r] = definition;
    LB_EXPECTS(r >= 1 && r <= std::min(info.rows, info.cols), "factor rank of ", info.name, ": found ", r,
               ", expected 1 .. min(", info.rows, ", ", info.cols, ")");
    LB_EXPECTS(info.cut != TensorCut::kNone || mesh.shape().tensor == 1, "optimizer: ", info.name,
               " is not cut along the tensor axis, expected rows or columns cut with mesh.tensor = ",
               mesh.shape().tensor);
    const MatrixLayout layout(info.rows, info.cols, info.cut, mesh.shape().tensor, mesh.shape().shard);
    Matrix matrix;
    matrix.definition = definition;
    matrix.rows = layout.owned_rows(mesh.position().shard, mesh.position().tensor);
    matrix.cols = layout.owned_cols(mesh.position().shard, mesh.position().tensor);
    matrix.error = Buffer<Real>(matrix.rows.size() * matrix.cols.size());
    matrix.momentum = Buffer<Real>(matrix.error.size());
    matrix.e = matrix.error.matrix(0, matrix.rows.size(), matrix.cols.size());
    matrix.u = matrix.momentum.matrix(0, matrix.rows.size(), matrix.cols.size());
    matrices.push_back(std::move(matrix));
  }
  return matrices;
}

// Of an exchange whose right factor is the one with the rows of the matrix (left), or with its columns.
template <class Real>
std::vector<FactorShape> AcpSgd<Real>::factor_shapes(ProcessMesh& mesh, const std::vector<Matrix>& matrices,
                                                     bool left) {
  std::vector<FactorShape> shapes;
  for (const Matrix& matrix : matrices) {
    // The tensor axis cuts one dimension, the shard axis the other.
    const bool shard_cuts_rows = matrix.definition.info.cut == TensorCut::kCols;
    Communicator& across_rows = shard_cuts_rows ? mesh.shard() : mesh.tensor();
    Communicator& across_cols = shard_cuts_rows ? mesh.tensor() : mesh.shard();
    shapes.push_back({.name = matrix.definition.info.name,
                      .factor_rank = matrix.definition.factor_rank,
                      .left_rows = left ? matrix.e.cols : matrix.e.rows,
                      .right_rows = left ? matrix.e.rows : matrix.e.cols,
                      .across_b = left ? &across_rows : &across_cols,
                      .across_a = left ? &across_cols : &across_rows});
  }
  return shapes;
}

namespace {

template <class Real>
FactorRows<Real> right_rows(const std::vector<FactorShape>& shapes) {
  std::vector<typename FactorRows<Real>::Shape> rows;
  rows.reserve(shapes.size());
  for (const FactorShape& shape : shapes)
    rows.push_back({shape.name, shape.right_rows, shape.factor_rank, shape.across_a});
  return FactorRows<Real>(std::move(rows));
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
      rows(right_rows<Real>(factor_shapes(mesh, matrices, is_left))),
      orthonormaliser(mesh.within_replica(), owned_of(rows, matrices.size())),
      exchange({.replica = &mesh.replica(), .within_replica = &mesh.within_replica()},
               factor_shapes(mesh, matrices, is_left), {}, {.keep_own_right = true, .wire = options.wire}) {
  const std::vector<FactorShape> shapes = factor_shapes(mesh, matrices, is_left);
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    const Communicator& axis = *shapes[i].across_a;
    kept_begin.push_back(first_owned_row(shapes[i].right_rows, axis.size(), axis.process()));
    kept.emplace_back(rows.owned(static_cast<Index>(i)).elements());
    const RandomStream stream = random(matrices[i].definition.info, options.seed, 0);
    const Index first = (is_left ? matrices[i].rows : matrices[i].cols).begin + kept_begin.back();
    for (Index e = 0; e < kept.back().size(); ++e)
      kept.back()[e] = static_cast<Real>(stream.normal(first * shapes[i].factor_rank + e));
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
    std::ranges::copy(kept[i].span(), rows.owned(static_cast<Index>(i)).data);
  orthonormaliser.run();
  rows.all_gather();
}

template <class Real>
void AcpSgd<Real>::exchange(std::span<const Piece> pieces, Real gradient_scale, Index step) {
  if (matrices_.empty()) return;
  orthonormal(step).orthonormalise();
  Factor& factor = sent(step);
  for (Index i = 0; i < size(); ++i) {
    const MatrixView<Real> sum = factor.exchange.right(i);
    if (pieces[at(i)].skipped) {
      std::ranges::fill(sum.flat(), Real{0});
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
double AcpSgd<Real>::sum_of_squares() const {
  double squares = 0;
  for (Index i = 0; i < size(); ++i) {
    for (const double norm : last_sent_->exchange.right_norms(i)) squares += norm * norm;
  }
  return squares;
}

template <class Real>
typename AcpSgd<Real>::Outcome AcpSgd<Real>::update(std::span<const Piece> pieces, Real update_scale,
                                                    const StepInfo& info, Diagnosis<Real>* diagnosis) {
  Outcome outcome;
  Factor& received = sent(info.step);
  Factor& basis = orthonormal(info.step);
  for (Index i = 0; i < size(); ++i) {
    Matrix& matrix = matrices_[at(i)];
    const auto& [parameter, factor_rank] = matrix.definition;
    if (diagnosis != nullptr) diagnosis->begin(parameter.name, factor_rank, matrix.e);
    if (pieces[at(i)].skipped) {
      if (diagnosis != nullptr) diagnosis->end_unsent(matrix.e);
      continue;
    }
    const std::span<const double> norms = received.exchange.right_norms(i);
    const bool finite = std::ranges::all_of(norms, [](double norm) { return std::isfinite(norm); });
    if (!finite || basis.orthonormaliser.factorisation(i) == Factorisation::kNonFinite)
      throw Error(cat("optimizer: step ", info.step, ": e of ", parameter.name,
                      " is not finite although its gradients are"));
    apply(i, pieces[at(i)].weight, update_scale, info);
    const Index dead_columns = std::ranges::count(basis.orthonormaliser.dead(i), std::uint8_t{1});
    if (diagnosis != nullptr) {
      const MatrixView<const Real> a = received.exchange.right(i), b = basis.rows.piece(i);
      diagnosis->end(matrix.e, received.left ? FactorPair<Real>{a, b} : FactorPair<Real>{b, a}, 1, norms,
                     dead_columns);
    }
    keep(i, info.step);
    outcome.dead_columns += dead_columns;
    outcome.householder_fallbacks += basis.orthonormaliser.factorisation(i) == Factorisation::kHouseholder;
  }
  return outcome;
}

template <class Real>
void AcpSgd<Real>::apply(Index i, MatrixView<Real> weight, Real update_scale, const StepInfo& info) {
  Matrix& matrix = matrices_[at(i)];
  Factor& received = sent(info.step);
  const MatrixView<const Real> mean = received.exchange.right(i), own = received.exchange.own_right(i);
  const MatrixView<const Real> basis = orthonormal(info.step).rows.piece(i);
  const auto pair = [&](MatrixView<const Real> factor) {
    return received.left ? FactorPair<Real>{factor, basis} : FactorPair<Real>{basis, factor};
  };
  const MatrixView<Real> scaled = scaled_.matrix(0, mean.rows, mean.cols);
  std::ranges::transform(mean.flat(), scaled.data, [=](Real x) { return update_scale * x; });
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
  const Index r = mean.cols, begin = received.kept_begin[at(i)];
  std::copy_n(mean.data + begin * r, kept.size(), kept.data());
  const std::span<const std::uint8_t> dead = orthonormal(step).orthonormaliser.dead(i);
  const Matrix& matrix = matrices_[at(i)];
  const Index first = (received.left ? matrix.rows : matrix.cols).begin + begin;
  for (Index j = 0; j < r; ++j) {
    if (!dead[at(j)]) continue;
    const std::vector<double> column =
        keyed_unit_column(received.random(info, options_.seed, step + 1),  // stream 0 gave the first factor
                          received.left ? info.rows : info.cols, r, j);
    for (Index row = 0; row < kept.size() / r; ++row)
      kept[row * r + j] = static_cast<Real>(column[at(first + row)]);
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
  const auto& [info, r] = matrix.definition;
  const auto kept = [&, r = r](Factor& factor) {
    return factor.kept[at(i)].matrix(0, factor.kept[at(i)].size() / r, r);
  };
  return {{info.name + ".e", matrix.e},
          {info.name + ".u", matrix.u},
          {info.name + ".left", kept(left_)},
          {info.name + ".right", kept(right_)}};
}

template class AcpSgd<float>;
template class AcpSgd<double>;

}  // namespace lowband
