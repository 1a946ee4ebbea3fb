#include "optimizers/dion.h"

#include "runtime/linalg.h"
#include "runtime/vector_kernels.h"

#include <algorithm>
#include <cmath>

namespace lowband {
namespace {

/// Added to the norm of a column of R. Reference: public Dion code.
constexpr double kColumnNormEpsilon = 1e-8;

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

template <class Real>
void fill(MatrixView<Real> view, Real value) {
  std::ranges::fill(view.flat(), value);
}

}  // namespace

template <class Real>
Dion<Real>::Dion(ProcessMesh& mesh, const std::vector<DionMatrix>& matrices, const OptimizerOptions& options)
    : options_(options),
      matrices_(make_matrices(mesh, matrices, options.seed)),
      exchange_({.replica = &mesh.replica(), .within_replica = &mesh.within_replica()},
                factor_shapes(mesh, matrices_), {},
                {.keep_own_right = options.residual == Residual::kLocal}) {}

template <class Real>
RandomStream Dion<Real>::Matrix::random(std::uint64_t seed, Index step) const {
  return RandomStream(seed, definition.info.name + ".Q", step);
}

template <class Real>
std::vector<typename Dion<Real>::Matrix> Dion<Real>::make_matrices(const ProcessMesh& mesh,
                                                                   const std::vector<DionMatrix>& definitions,
                                                                   std::uint64_t seed) {
  std::vector<Matrix> matrices;
  for (const DionMatrix& definition : definitions) {
    const ParameterInfo& info = definition.info;
    const Index r = definition.factor_rank;
    LB_EXPECTS(r >= 1 && r <= std::min(info.rows, info.cols), "factor rank of ", info.name, ": found ", r,
               ", expected 1 .. min(", info.rows, ", ", info.cols, ")");
    LB_EXPECTS(info.cut != TensorCut::kNone || mesh.shape().tensor == 1, "dion: ", info.name,
               " is not cut along the tensor axis, expected rows or columns cut with mesh.tensor = ",
               mesh.shape().tensor);
    const MatrixLayout layout(info.rows, info.cols, info.cut, mesh.shape().tensor, mesh.shape().shard);
    const Range rows = layout.owned_rows(mesh.position().shard, mesh.position().tensor);
    const Range cols = layout.owned_cols(mesh.position().shard, mesh.position().tensor);
    Matrix matrix;
    matrix.tall = info.rows >= info.cols;
    const Range b = matrix.tall ? cols : rows;
    matrix.b_begin = b.begin;
    matrix.momentum = Buffer<Real>(rows.size() * cols.size());
    matrix.right_factor = Buffer<Real>(b.size() * r);
    matrix.m = matrix.momentum.matrix(0, rows.size(), cols.size());
    matrix.q = matrix.right_factor.matrix(0, b.size(), r);
    matrix.definition = definition;
    const RandomStream stream = matrix.random(seed, 0);
    for (Index k = 0; k < matrix.q.elements(); ++k)
      matrix.q.data[k] = static_cast<Real>(stream.normal(b.begin * r + k));
    matrices.push_back(std::move(matrix));
  }
  return matrices;
}

template <class Real>
std::vector<FactorShape> Dion<Real>::factor_shapes(ProcessMesh& mesh, const std::vector<Matrix>& matrices) {
  std::vector<FactorShape> shapes;
  for (const Matrix& matrix : matrices) {
    const ParameterInfo& info = matrix.definition.info;
    // The tensor axis cuts one dimension, the shard axis the other.
    const bool shard_cuts_rows = info.cut == TensorCut::kCols;
    Communicator& across_rows = shard_cuts_rows ? mesh.shard() : mesh.tensor();
    Communicator& across_cols = shard_cuts_rows ? mesh.tensor() : mesh.shard();
    shapes.push_back({.name = info.name,
                      .factor_rank = matrix.definition.factor_rank,
                      .left_rows = matrix.tall ? matrix.m.rows : matrix.m.cols,
                      .right_rows = matrix.q.rows,
                      .across_b = matrix.tall ? &across_cols : &across_rows,
                      .across_a = matrix.tall ? &across_rows : &across_cols});
  }
  return shapes;
}

template <class Real>
void Dion<Real>::step(std::span<const Piece> pieces, Real gradient_scale, const StepInfo& info,
                      StepReport& report) {
  const Index matrices = static_cast<Index>(matrices_.size());
  for (Index i = 0; i < matrices; ++i) left_product(i, pieces[at(i)], gradient_scale);
  exchange_.exchange_left();
  for (Index i = 0; i < matrices; ++i) {
    if (exchange_.factorisation(i) == Factorisation::kNonFinite)
      throw Error(cat("dion: step ", info.step, ": the momentum of ", matrices_[at(i)].definition.info.name,
                      " is not finite although its gradients are"));
    right_product(i, pieces[at(i)]);
  }
  exchange_.exchange_right();
  for (Index i = 0; i < matrices; ++i) {
    if (pieces[at(i)].skipped) continue;
    apply(i, pieces[at(i)], info);
    report.dead_columns += std::ranges::count(exchange_.dead(i), std::uint8_t{1});
    report.householder_fallbacks += exchange_.factorisation(i) == Factorisation::kHouseholder;
  }
}

template <class Real>
void Dion<Real>::left_product(Index i, const Piece& piece, Real gradient_scale) {
  const MatrixView<Real> left = exchange_.left(i);
  if (piece.skipped) return fill(left, Real{0});
  Matrix& matrix = matrices_[at(i)];
  // M <- B = M + G ; left <- B Q
  vector_kernels<Real>().axpy(gradient_scale, piece.gradient.data, matrix.m.data, matrix.m.elements());
  gemm<Real>(matrix.tall ? Op::kNone : Op::kTranspose, Op::kNone, Real{1}, matrix.m, matrix.q, Real{0}, left);
}

template <class Real>
void Dion<Real>::right_product(Index i, const Piece& piece) {
  const MatrixView<Real> right = exchange_.right(i);
  if (piece.skipped) return fill(right, Real{0});
  Matrix& matrix = matrices_[at(i)];
  // right <- B^T P, where M holds B; dead columns of P give zero columns of R
  gemm<Real>(matrix.tall ? Op::kTranspose : Op::kNone, Op::kNone, Real{1}, matrix.m, exchange_.left(i),
             Real{0}, right);
}

template <class Real>
void Dion<Real>::apply(Index i, const Piece& piece, const StepInfo& info) {
  Matrix& matrix = matrices_[at(i)];
  const MatrixView<const Real> p = exchange_.left(i);
  const MatrixView<const Real> r = exchange_.right(i);
  const MatrixView<const Real> sent = options_.residual == Residual::kLocal ? exchange_.own_right(i) : r;

  // M <- B - (1 - mu) P R^T, or its transpose
  const Real removed = static_cast<Real>(options_.mu - 1);
  if (matrix.tall) {
    gemm<Real>(Op::kNone, Op::kTranspose, removed, p, sent, Real{1}, matrix.m);
  } else {
    gemm<Real>(Op::kNone, Op::kTranspose, removed, sent, p, Real{1}, matrix.m);
  }

  // Q_j <- R_j / (|R_j| + eps); 0 for a dead column
  const std::span<const double> norms = exchange_.right_norms(i);
  for (Index row = 0; row < r.rows; ++row) {
    for (Index j = 0; j < r.cols; ++j)
      matrix.q(row, j) =
          r(row, j) / (static_cast<Real>(norms[at(j)]) + static_cast<Real>(kColumnNormEpsilon));
  }

  // W <- (1 - eta wd) W - eta sqrt(m/n) P Q^T, or its transpose
  const ParameterInfo& shape = matrix.definition.info;
  const double eta = info.learning_rate;
  const Real scale =
      static_cast<Real>(-eta * std::sqrt(static_cast<double>(shape.rows) / static_cast<double>(shape.cols)));
  const Real decay = static_cast<Real>(1 - eta * options_.weight_decay);
  if (matrix.tall) {
    gemm<Real>(Op::kNone, Op::kTranspose, scale, p, matrix.q, decay, piece.weight);
  } else {
    gemm<Real>(Op::kNone, Op::kTranspose, scale, matrix.q, p, decay, piece.weight);
  }
  refill(matrix, exchange_.dead(i), info.step);
}

// Every process draws the whole column, since its norm needs all of it.
template <class Real>
void Dion<Real>::refill(Matrix& matrix, std::span<const std::uint8_t> dead, Index step) {
  if (std::ranges::find(dead, std::uint8_t{1}) == dead.end()) return;
  const Index b = std::min(matrix.definition.info.rows, matrix.definition.info.cols);
  const Index r = matrix.q.cols;
  const RandomStream stream = matrix.random(options_.seed, step + 1);  // stream 0 gave the first Q
  std::vector<double> column(at(b));
  for (Index j = 0; j < r; ++j) {
    if (!dead[at(j)]) continue;
    double squares = 0;
    for (Index row = 0; row < b; ++row) {
      column[at(row)] = stream.normal(row * r + j);
      squares += column[at(row)] * column[at(row)];
    }
    const double norm = std::sqrt(squares);
    for (Index row = 0; row < matrix.q.rows; ++row)
      matrix.q(row, j) = static_cast<Real>(column[at(matrix.b_begin + row)] / norm);
  }
}

template <class Real>
std::vector<StateTensor<Real>> Dion<Real>::state() {
  std::vector<StateTensor<Real>> tensors;
  for (Matrix& matrix : matrices_) {
    tensors.push_back({matrix.definition.info.name + ".M", matrix.m});
    tensors.push_back({matrix.definition.info.name + ".Q", matrix.q});
  }
  return tensors;
}

template <class Real>
Index Dion<Real>::factor_elements() const {
  Index elements = 0;
  for (const Matrix& matrix : matrices_)
    elements += matrix.definition.factor_rank * (matrix.definition.info.rows + matrix.definition.info.cols);
  return elements;
}

template class Dion<float>;
template class Dion<double>;

}  // namespace lowband
