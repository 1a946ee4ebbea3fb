#include "optimizers/row_scaling.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace lowband {
namespace {

/// Added to the root of v. Reference: public Dion code.
constexpr double kRowEpsilon = 1e-8;

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

}  // namespace

template <class Real>
RowScaling<Real>::RowScaling(ProcessMesh& mesh, DistributedSign<Real>& sign, double beta2)
    : group_(&mesh.within_replica()), sign_(&sign), beta2_(beta2) {
  Index rows = 0;
  for (Index i = 0; i < sign.size(); ++i) {
    const CutMatrix& matrix = sign.matrix(i);
    row_sums_of_.push_back(rows);
    row_shares_.push_back({matrix.name, matrix.rows()});
    norm_shares_.push_back({matrix.name, 1});
    rows += matrix.rows();
  }
  row_sums_ = Buffer<double>(rows);
  norms_ = Buffer<double>(sign.size());
}

template <class Real>
void RowScaling<Real>::apply(std::span<const Rows> rows) {
  const bool sends = group_->size() > 1 && sign_->size() > 0;
  sum_rows();
  if (sends) group_->all_reduce(row_sums_.span(), Reduction::kSum, {Purpose::kUpdate, row_shares_});
  norms_.fill(0);
  for (Index i = 0; i < sign_->size(); ++i) {
    if (!rows[at(i)].skipped) average(i, rows[at(i)]);
  }
  if (sends) group_->all_reduce(norms_.span(), Reduction::kSum, {Purpose::kUpdate, norm_shares_});
  for (Index i = 0; i < sign_->size(); ++i) {
    if (rows[at(i)].skipped) continue;
    double squares = 0;
    const Index begin = row_sums_of_[at(i)];
    for (Index row = 0; row < sign_->matrix(i).rows(); ++row) squares += row_sums_[begin + row];
    scale(i, rows[at(i)],
          std::sqrt(squares) / std::max(std::sqrt(norms_[i]), std::numeric_limits<double>::min()));
  }
}

// row_sums_ <- sum_j U_ij^2, of this process's columns.
template <class Real>
void RowScaling<Real>::sum_rows() {
  row_sums_.fill(0);
  for (Index i = 0; i < sign_->size(); ++i) {
    const MatrixView<const Real> u = sign_->block(i);
    const Index begin = row_sums_of_[at(i)] + sign_->first_row(i);
    for (Index row = 0; row < u.rows; ++row) {
      for (Index col = 0; col < u.cols; ++col)
        row_sums_[begin + row] += static_cast<double>(u(row, col)) * static_cast<double>(u(row, col));
    }
  }
}

// v <- b2 v + (1 - b2) mean_j U_ij^2. A row's part of |Y|^2 is counted by the process with its first column.
template <class Real>
void RowScaling<Real>::average(Index i, const Rows& rows) {
  const Index begin = row_sums_of_[at(i)] + sign_->first_row(i);
  const bool counts = sign_->first_col(i) == 0 && sign_->block(i).cols > 0;
  for (std::size_t row = 0; row < rows.places.size(); ++row) {
    Real& v = rows.v[at(rows.places[row])];
    const double sum = row_sums_[begin + static_cast<Index>(row)];
    v = static_cast<Real>(beta2_ * static_cast<double>(v) +
                          (1 - beta2_) * sum / static_cast<double>(sign_->matrix(i).cols()));
    if (counts) norms_[i] += sum / std::pow(std::sqrt(static_cast<double>(v)) + kRowEpsilon, 2);
  }
}

// U <- factor Y
template <class Real>
void RowScaling<Real>::scale(Index i, const Rows& rows, double factor) {
  const MatrixView<Real> u = sign_->block(i);
  for (Index row = 0; row < u.rows; ++row) {
    const auto v = static_cast<double>(rows.v[at(rows.places[at(row)])]);
    const auto row_scale = static_cast<Real>(factor / (std::sqrt(v) + kRowEpsilon));
    for (Index col = 0; col < u.cols; ++col) u(row, col) *= row_scale;
  }
}

Index row_scaling_bytes(const CutMatrix& matrix) {
  return matrix.processes() == 1 ? 0 : (matrix.rows() + 1) * dtype_bytes(DType::kF64);
}

template class RowScaling<float>;
template class RowScaling<double>;

}  // namespace lowband
