#include "optimizers/factored_matrices.h"

#include "optimizers/keyed_columns.h"
#include "runtime/copy.h"
#include "runtime/numbers.h"
#include "runtime/passes.h"

#include <algorithm>
#include <numeric>

namespace lowband {
namespace {

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

RandomStream random_of_q(const ParameterInfo& info, std::uint64_t seed, Index step) {
  return RandomStream(seed, info.name + ".Q", step);
}

}  // namespace

template <class Real>
FactoredMatrices<Real>::FactoredMatrices(ProcessMesh& mesh, Communicator& alone,
                                         const std::vector<LayerMatrix>& matrices,
                                         const std::vector<DenseTensor>& riders,
                                         const OptimizerOptions& options, std::string_view state_letter)
    : options_(options),
      state_letter_(state_letter),
      replicas_(mesh.shape().replica),
      matrices_(make_matrices(mesh, matrices, options)),
      first_rider_(std::ranges::count_if(matrices_, &Matrix::dense)),
      exchange_({.replica = &mesh.replica(), .within_replica = &mesh.within_replica()},
                factor_shapes(mesh, matrices_, false), dense_tensors(matrices_, riders),
                {.keep_own_right = options.residual == Residual::kLocal, .wire = options.wire}) {
  Index largest_q = 0;
  for (const Matrix& matrix : matrices_) {
    if (matrix.shares_q) largest_q = std::max(largest_q, matrix.b.size() * matrix.q.cols);
  }
  Device* const device = mesh.world().device();
  next_q_ = Buffer<Real>(largest_q, device);
  stays_ = Buffer<std::uint8_t>(size(), device);
  if (first_rider_ == 0) return;
  from_means_.emplace(FactorGroups{.replica = &alone, .within_replica = &mesh.within_replica()},
                      factor_shapes(mesh, matrices_, true), std::vector<DenseTensor>{},
                      FactorExchangeOptions{});
  Index largest = 0;
  for (const Matrix& matrix : matrices_) {
    if (!matrix.dense) continue;
    largest = std::max(largest, matrix.s.elements());
    if (options.residual == Residual::kLocal)
      own_right_.emplace_back(matrix.b.size() * matrix.q.cols, device);
  }
  mean_b_ = Buffer<Real>(largest, device);
}

template <class Real>
std::vector<typename FactoredMatrices<Real>::Matrix> FactoredMatrices<Real>::make_matrices(
    const ProcessMesh& mesh, const std::vector<LayerMatrix>& definitions, const OptimizerOptions& options) {
  std::vector<Matrix> matrices;
  Index places[2] = {0, 0};
  for (const LayerMatrix& definition : definitions) {
    const ParameterInfo& info = definition.info;
    const Index r = definition.factor_rank;
    const Range rows = definition.cut.rows_of(mesh.position()),
                cols = definition.cut.cols_of(mesh.position());
    Matrix matrix;
    matrix.dense = travels_dense(replica_traffic(options, dtype_of<Real>), info.rows, info.cols, r);
    matrix.place = places[matrix.dense]++;
    matrix.tall = definition.tall();
    matrix.b = matrix.tall ? cols : rows;
    matrix.kept = definition.cut.kept_rows(!matrix.tall, mesh.position());
    matrix.shares_q = (matrix.tall ? definition.cut.row_pieces : definition.cut.col_pieces).size() > 1;
    matrix.state = Buffer<Real>(rows.size() * cols.size(), mesh.world().device());
    matrix.right_factor = Buffer<Real>(matrix.kept.size() * r, mesh.world().device());
    matrix.s = matrix.state.matrix(0, rows.size(), cols.size());
    matrix.q = matrix.right_factor.matrix(0, matrix.kept.size(), r);
    matrix.definition = definition;
    const RandomStream stream = random_of_q(info, options.seed, 0);
    Buffer<Real> drawn(matrix.q.elements());
    for (Index k = 0; k < drawn.size(); ++k)
      drawn[k] = static_cast<Real>(stream.normal(matrix.kept.begin * r + k));
    copy<Real>(drawn.matrix(0, matrix.q.rows, r), matrix.q);
    matrices.push_back(std::move(matrix));
  }
  return matrices;
}

template <class Real>
std::vector<FactorShape> FactoredMatrices<Real>::factor_shapes(ProcessMesh& mesh,
                                                               const std::vector<Matrix>& matrices,
                                                               bool dense) {
  std::vector<FactorShape> shapes;
  for (const Matrix& matrix : matrices) {
    if (matrix.dense != dense) continue;
    shapes.push_back(factor_shape(matrix.definition, matrix.definition.factor_rank, !matrix.tall, mesh));
  }
  return shapes;
}

template <class Real>
std::vector<DenseTensor> FactoredMatrices<Real>::dense_tensors(const std::vector<Matrix>& matrices,
                                                               const std::vector<DenseTensor>& riders) {
  std::vector<DenseTensor> tensors;
  for (const Matrix& matrix : matrices) {
    if (matrix.dense) tensors.push_back({matrix.definition.cut.name, matrix.s.elements()});
  }
  tensors.insert(tensors.end(), riders.begin(), riders.end());
  return tensors;
}

template <class Real>
void FactoredMatrices<Real>::exchange(std::span<const Piece> pieces, const Scalar& gradient_scale,
                                      Index /*step*/) {
  if (first_rider_ < size()) gather_q(false);
  left_products(pieces, gradient_scale);
  exchange_.exchange_left();
  if (first_rider_ < size()) {
    for (std::size_t i = 0; i < matrices_.size(); ++i) {
      const Matrix& matrix = matrices_[i];
      if (matrix.dense) continue;
      // right <- B^T P, where S holds B; dead columns of P give zero columns of R
      const MatrixView<Real> right = exchange_.right(matrix.place);
      where(pieces[i].skipped, [&] { fill<Real>(Real{0}, right); });
      unless(pieces[i].skipped, [&] {
        multiply<Real>(matrix.tall ? Op::kTranspose : Op::kNone, matrix.s, exchange_.left(matrix.place),
                       right);
      });
    }
    exchange_.exchange_right();
  }
  if (from_means_) factor_means();
}

template <class Real>
void FactoredMatrices<Real>::gather_q(bool dense) {
  FactorExchange<Real>& exchange = dense ? *from_means_ : exchange_;
  for (const Matrix& matrix : matrices_) {
    if (matrix.dense == dense && matrix.shares_q) copy<Real>(matrix.q, exchange.owned_right(matrix.place));
  }
  exchange.gather_right();
}

template <class Real>
MatrixView<const Real> FactoredMatrices<Real>::q_of_block(const Matrix& matrix) {
  if (!matrix.shares_q) return matrix.q;
  return exchange_of(matrix).right(matrix.place);
}

template <class Real>
void FactoredMatrices<Real>::left_products(std::span<const Piece> pieces, const Scalar& gradient_scale) {
  for (std::size_t i = 0; i < matrices_.size(); ++i) {
    Matrix& matrix = matrices_[i];
    const Piece& piece = pieces[i];
    if (matrix.dense) {
      where(piece.skipped, [&] {
        const MatrixView<Real> nothing = mean_b_.matrix(0, matrix.s.rows, matrix.s.cols);
        fill<Real>(Real{0}, nothing);
        exchange_.put_dense(matrix.place, nothing);
      });
      unless(piece.skipped, [&] {  // S <- B = S + G, which travels itself
        add<Real>(gradient_scale, piece.gradient, Real{1}, matrix.s);
        exchange_.put_dense(matrix.place, matrix.s);
      });
    } else {
      where(piece.skipped, [&] { fill<Real>(Real{0}, exchange_.left(matrix.place)); });
      unless(piece.skipped, [&] {  // S <- B = S + G ; left <- B Q
        accumulate_and_multiply<Real>(gradient_scale, piece.gradient, matrix.s,
                                      matrix.tall ? Op::kNone : Op::kTranspose, q_of_block(matrix),
                                      exchange_.left(matrix.place));
      });
    }
  }
}

// P, R_i and R of the matrices that travel dense. A skipped one has sent zeros, so P and R are zero.
template <class Real>
void FactoredMatrices<Real>::factor_means() {
  gather_q(true);
  for (const Matrix& matrix : matrices_) {
    if (!matrix.dense) continue;
    multiply<Real>(matrix.tall ? Op::kNone : Op::kTranspose, mean_b(matrix), q_of_block(matrix),
                   from_means_->left(matrix.place));
  }
  from_means_->exchange_left();
  if (options_.residual == Residual::kLocal) {
    for (const Matrix& matrix : matrices_) {
      if (!matrix.dense) continue;
      multiply<Real>(matrix.tall ? Op::kTranspose : Op::kNone, matrix.s, from_means_->left(matrix.place),
                     from_means_->right(matrix.place));
    }
    from_means_->exchange_right();
    for (std::size_t k = 0; k < own_right_.size(); ++k)
      copy<Real>(from_means_->right(static_cast<Index>(k)).line(), own_right_[k].line());
  }
  for (const Matrix& matrix : matrices_) {
    if (!matrix.dense) continue;
    multiply<Real>(matrix.tall ? Op::kTranspose : Op::kNone, mean_b(matrix), from_means_->left(matrix.place),
                   from_means_->right(matrix.place));
  }
  from_means_->exchange_right();
}

template <class Real>
MatrixView<const Real> FactoredMatrices<Real>::mean_b(const Matrix& matrix) {
  const MatrixView<Real> mean = mean_b_.matrix(0, matrix.s.rows, matrix.s.cols);
  exchange_.get_dense(matrix.place, mean);
  scale<Real>(Real{1} / static_cast<Real>(replicas_), mean);
  return mean;
}

template <class Real>
void FactoredMatrices<Real>::add_sum_of_squares(MatrixView<double> sum) const {
  for (Index i = 0; i < size(); ++i) add_squares(r_norms(i), sum);
}

template <class Real>
typename FactoredMatrices<Real>::LaterOutcome FactoredMatrices<Real>::update(std::span<const Piece> pieces,
                                                                             const Scalar& update_scale,
                                                                             const StepInfo& info,
                                                                             Diagnosis<Real>* diagnosis) {
  for (Index i = 0; i < size(); ++i) {
    Matrix& matrix = matrices_[at(i)];
    if (diagnosis != nullptr)
      diagnosis->begin(matrix.definition.info.name, matrix.definition.factor_rank, matrix.s);
    const MatrixView<std::uint8_t> stays = stays_.matrix(i, 1, 1);
    find_equal<Real>(static_cast<Real>(Factorisation::kNonFinite), outcome(matrix).block(0, 1, 0, 1),
                     pieces[at(i)].skipped, stays);
    // Weights of what stays take part in products under a condition, as 0 P R^T: P must be finite.
    where(stays, [&] { fill<Real>(Real{0}, exchange_of(matrix).left(matrix.place)); });
    unless(stays, [&] {
      apply(i, pieces[at(i)].weight, update_scale, info);
      keep_q(matrix);
      refill(matrix, info.step);
    });
    if (diagnosis == nullptr) continue;
    const FactorExchange<Real>& exchange = exchange_of(matrix);
    if (is_set(stays)) {
      diagnosis->end_unsent(matrix.s);
    } else {
      diagnosis->end(matrix.s, matrix.pair(p(i), mean_r(i)), removed(), exchange.right_norms(matrix.place),
                     std::ranges::count(exchange.dead(matrix.place), std::uint8_t{1}));
    }
  }
  return later_outcome(info.step);
}

// A matrix that stays was skipped, and then sent zeros, or its outcome is kNonFinite.
template <class Real>
typename FactoredMatrices<Real>::LaterOutcome FactoredMatrices<Real>::later_outcome(Index step) const {
  struct Place {
    std::string name;
    Index begin, columns;  // of its outcome
    bool dense;
  };
  std::vector<Place> places;
  for (const Matrix& matrix : matrices_)
    places.push_back({matrix.definition.info.name, exchange_of(matrix).outcome_begin(matrix.place),
                      matrix.definition.factor_rank, matrix.dense});
  const Arriving<std::uint8_t> stays(stays_.line());
  const Arriving<Real> of_factors = exchange_.outcomes();
  const Arriving<Real> of_means = from_means_ ? from_means_->outcomes() : of_factors;
  return [=, letter = state_letter_] {
    Outcome found;
    for (std::size_t i = 0; i < places.size(); ++i) {
      const auto& [name, begin, columns, dense] = places[i];
      const auto numbers = (dense ? of_means : of_factors).get().subspan(at(begin), at(1 + columns));
      const auto factorisation = static_cast<Factorisation>(numbers[0]);
      if (factorisation == Factorisation::kNonFinite)
        throw Error(cat("optimizer: step ", step, ": ", letter, " of ", name,
                        " is not finite although its gradients are"));
      if (stays.get()[i] != 0) continue;
      found.dead_columns += std::ranges::count(numbers.subspan(1), Real{1});
      found.householder_fallbacks += fell_back(factorisation);
    }
    return found;
  };
}

template <class Real>
MatrixView<Real> FactoredMatrices<Real>::next_q(const Matrix& matrix) {
  return matrix.shares_q ? next_q_.matrix(0, matrix.b.size(), matrix.q.cols) : matrix.q;
}

template <class Real>
void FactoredMatrices<Real>::keep_q(Matrix& matrix) {
  if (!matrix.shares_q) return;
  copy<Real>(next_q(matrix).row_block(matrix.kept.begin - matrix.b.begin, matrix.kept.size()), matrix.q);
}

template <class Real>
void FactoredMatrices<Real>::refill(Matrix& matrix, Index step) {
  const ParameterInfo& info = matrix.definition.info;
  const MatrixView<const Real> dead = outcome(matrix).block(0, 1, 1, matrix.q.cols);
  // Stream 0 gave the first Q.
  redraw_columns<Real>(dead, random_of_q(info, options_.seed, step + 1), std::min(info.rows, info.cols),
                       matrix.kept.begin, matrix.q);
}

template <class Real>
MatrixView<const Real> FactoredMatrices<Real>::outcome(const Matrix& matrix) const {
  return exchange_of(matrix).outcome(matrix.place);
}

template <class Real>
MatrixView<const Real> FactoredMatrices<Real>::p(Index i) {
  return exchange_of(matrix(i)).left(matrix(i).place);
}

template <class Real>
MatrixView<const Real> FactoredMatrices<Real>::mean_r(Index i) {
  return exchange_of(matrix(i)).right(matrix(i).place);
}

template <class Real>
MatrixView<const Real> FactoredMatrices<Real>::residual_r(Index i) {
  if (options_.residual == Residual::kAggregated) return mean_r(i);
  if (!matrix(i).dense) return exchange_.own_right(matrix(i).place);
  return own_right_[at(matrix(i).place)].matrix(0, matrix(i).b.size(), matrix(i).q.cols);
}

template <class Real>
MatrixView<const double> FactoredMatrices<Real>::r_norms(Index i) const {
  return exchange_of(matrix(i)).norms_of_right(matrix(i).place);
}

template <class Real>
std::vector<StateTensor<Real>> FactoredMatrices<Real>::state(Index i) {
  Matrix& matrix = matrices_[at(i)];
  std::vector<StateTensor<Real>> tensors{{matrix.definition.state_name(state_letter_), matrix.s},
                                         {matrix.definition.state_name("Q"), matrix.q}};
  add_state(i, tensors);
  return tensors;
}

template <class Real>
Index FactoredMatrices<Real>::diagnosed_elements() const {
  Index elements = 0;
  for (const Matrix& matrix : matrices_)
    elements += Diagnosis<Real>::kSums * matrix.definition.info.elements();
  return elements;
}

template class FactoredMatrices<float>;
template class FactoredMatrices<double>;

}  // namespace lowband
