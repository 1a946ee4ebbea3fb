#include "collectives/factors/factor_exchange.h"

#include <algorithm>
#include <cmath>

namespace lowband {
namespace {

template <class Real>
std::vector<typename FactorRows<Real>::Shape> left_shapes(const std::vector<FactorShape>& shapes) {
  std::vector<typename FactorRows<Real>::Shape> rows;
  rows.reserve(shapes.size());
  for (const FactorShape& shape : shapes)
    rows.push_back({shape.name, shape.left_rows, shape.factor_rank, shape.across_b});
  return rows;
}

template <class Real>
std::vector<typename FactorRows<Real>::Shape> right_shapes(const std::vector<FactorShape>& shapes) {
  std::vector<typename FactorRows<Real>::Shape> rows;
  rows.reserve(shapes.size());
  for (const FactorShape& shape : shapes)
    rows.push_back({shape.name, shape.right_rows, shape.factor_rank, shape.across_a});
  return rows;
}

template <class Real>
std::vector<MatrixView<Real>> owned_rows(FactorRows<Real>& factor, std::size_t matrices) {
  std::vector<MatrixView<Real>> blocks;
  for (std::size_t i = 0; i < matrices; ++i) blocks.push_back(factor.owned(static_cast<Index>(i)));
  return blocks;
}

}  // namespace

template <class Real>
FactorExchange<Real>::FactorExchange(const FactorGroups& groups, std::vector<FactorShape> shapes,
                                     std::vector<DenseTensor> dense, const FactorExchangeOptions& options)
    : groups_(groups),
      left_(left_shapes<Real>(shapes)),
      right_(right_shapes<Real>(shapes)),
      orthonormaliser_(*groups.within_replica, owned_rows(left_, shapes.size())) {
  LB_EXPECTS(options.wire == FactorWire::kAsComputed, "factor exchange: bf16 on the wire is not there yet");
  dense_offsets_.push_back(0);
  for (const DenseTensor& tensor : dense) {
    dense_shares_.push_back({tensor.name, tensor.elements});
    dense_offsets_.push_back(dense_offsets_.back() + tensor.elements);
  }
  dense_ = Buffer<Real>(dense_offsets_.back());
  if (options.keep_own_right && groups.replica->size() > 1) own_right_.emplace(right_shapes<Real>(shapes));
  Index columns = 0;
  for (const FactorShape& shape : shapes) {
    norm_offsets_.push_back(columns);
    columns += shape.factor_rank;
  }
  norm_offsets_.push_back(columns);
  norms_ = Buffer<double>(columns);
}

template <class Real>
void FactorExchange<Real>::put_dense(Index k, std::span<const Real> values) {
  std::ranges::copy(values, dense_.data() + dense_offsets_[static_cast<std::size_t>(k)]);
}

template <class Real>
void FactorExchange<Real>::get_dense(Index k, std::span<Real> values) const {
  std::copy_n(dense_.data() + dense_offsets_[static_cast<std::size_t>(k)], values.size(), values.begin());
}

template <class Real>
void FactorExchange<Real>::exchange_left() {
  if (dense_.size() > 0)
    groups_.replica->all_reduce(dense_.span(), Reduction::kSum, {Purpose::kDense, dense_shares_});
  left_.reduce_scatter();
  average_over_replicas(left_);
  orthonormaliser_.run();
  left_.all_gather();
}

template <class Real>
void FactorExchange<Real>::exchange_right() {
  right_.reduce_scatter();
  if (own_right_) {
    std::ranges::copy(right_.all_owned(), own_right_->all_owned().begin());
    own_right_->all_gather();
  }
  average_over_replicas(right_);
  sum_column_norms();
  right_.all_gather();
}

template <class Real>
void FactorExchange<Real>::average_over_replicas(FactorRows<Real>& factor) {
  const std::span<Real> rows = factor.all_owned();
  groups_.replica->all_reduce(rows, Reduction::kSum, {Purpose::kFactor, factor.owned_shares()});
  if (groups_.replica->size() == 1) return;
  const Real replicas = static_cast<Real>(groups_.replica->size());
  for (Real& x : rows) x /= replicas;
}

template <class Real>
void FactorExchange<Real>::sum_column_norms() {
  norms_.fill(0);
  for (std::size_t i = 0; i + 1 < norm_offsets_.size(); ++i) {
    const MatrixView<const Real> r = right_.owned(static_cast<Index>(i));
    double* sums = norms_.data() + norm_offsets_[i];
    for (Index row = 0; row < r.rows; ++row) {
      for (Index j = 0; j < r.cols; ++j) {
        const double x = static_cast<double>(r(row, j));
        sums[j] += x * x;
      }
    }
  }
  if (groups_.within_replica->size() > 1)
    groups_.within_replica->all_reduce(norms_.span(), Reduction::kSum, {Purpose::kControl});
  for (double& x : norms_.span()) x = std::sqrt(x);
}

template <class Real>
std::span<const double> FactorExchange<Real>::right_norms(Index i) const {
  const Index begin = norm_offsets_[static_cast<std::size_t>(i)];
  return norms_.span(begin, norm_offsets_[static_cast<std::size_t>(i) + 1] - begin);
}

template class FactorExchange<float>;
template class FactorExchange<double>;

}  // namespace lowband
