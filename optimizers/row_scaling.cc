#include "optimizers/row_scaling.h"

#include "runtime/passes.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

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
    rows_of_.push_back(rows);
    row_shares_.push_back({matrix.name, matrix.rows()});
    norm_shares_.push_back({matrix.name, 2});
    rows += matrix.rows();
  }
  v_ = Buffer<double>(rows);
  own_sums_ = Buffer<double>(rows);
  norms_ = Buffer<double>(2 * sign.size());
}

template <class Real>
void RowScaling<Real>::apply(std::span<const Rows> rows) {
  const bool sends = group_->size() > 1 && sign_->size() > 0;
  v_.fill(0);
  norms_.fill(0);
  for (Index i = 0; i < sign_->size(); ++i) {
    if (!rows[at(i)].skipped) average(i, rows[at(i)]);
  }
  if (sends) group_->all_reduce(v_.span(), Reduction::kSum, {Purpose::kUpdate, row_shares_});
  for (Index i = 0; i < sign_->size(); ++i) {
    if (!rows[at(i)].skipped) keep(i, rows[at(i)]);
  }
  if (sends) group_->all_reduce(norms_.span(), Reduction::kSum, {Purpose::kUpdate, norm_shares_});
  for (Index i = 0; i < sign_->size(); ++i) {
    if (!rows[at(i)].skipped) scale(i);
  }
}

// This process's part of b2 v + (1 - b2) mean_j U_ij^2: v where it is kept here, and its own columns.
template <class Real>
void RowScaling<Real>::average(Index i, const Rows& rows) {
  const MatrixView<const Real> u = sign_->block(i);
  const Index begin = rows_of_[at(i)] + sign_->first_row(i);
  sums_of_squares_of_rows<Real>(u, own_sums_.span(begin, u.rows));
  for (Index row = 0; row < u.rows; ++row) {
    const double sum = own_sums_[begin + row];
    const Real* const v = rows.kept(at(row));
    v_[begin + row] = (v != nullptr ? beta2_ * static_cast<double>(*v) : 0) +
                      (1 - beta2_) * sum / static_cast<double>(sign_->matrix(i).cols());
    norms_[2 * i] += sum;
  }
}

// v as it is kept, to Real, on all processes with these rows; own part of |Y|^2.
template <class Real>
void RowScaling<Real>::keep(Index i, const Rows& rows) {
  const Index begin = rows_of_[at(i)] + sign_->first_row(i);
  for (Index row = 0; row < sign_->block(i).rows; ++row) {
    const auto rounded = static_cast<Real>(v_[begin + row]);
    if (Real* const v = rows.kept(at(row)); v != nullptr) *v = rounded;
    v_[begin + row] = static_cast<double>(rounded);
    norms_[2 * i + 1] += own_sums_[begin + row] / std::pow(std::sqrt(v_[begin + row]) + kRowEpsilon, 2);
  }
}

// U <- |U| / |Y| Y
template <class Real>
void RowScaling<Real>::scale(Index i) {
  const MatrixView<Real> u = sign_->block(i);
  const Index begin = rows_of_[at(i)] + sign_->first_row(i);
  const double factor =
      std::sqrt(norms_[2 * i]) / std::max(std::sqrt(norms_[2 * i + 1]), std::numeric_limits<double>::min());
  std::vector<Real> of_rows;
  for (const double v : v_.span(begin, u.rows))
    of_rows.push_back(static_cast<Real>(factor / (std::sqrt(v) + kRowEpsilon)));
  scale_rows<Real>(of_rows, u);
}

Index row_scaling_bytes(const CutMatrix& matrix) {
  return matrix.processes() == 1 ? 0 : (matrix.rows() + 2) * dtype_bytes(DType::kF64);
}

template class RowScaling<float>;
template class RowScaling<double>;

}  // namespace lowband
