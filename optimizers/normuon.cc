#include "optimizers/normuon.h"

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
NorMuon<Real>::NorMuon(ProcessMesh& mesh, std::vector<ParameterInfo> matrices,
                       const OptimizerOptions& options, Index rotation)
    : Muon<Real>(mesh, std::move(matrices), options, rotation), mesh_(&mesh), beta2_(options.normuon_beta2) {
  Index rows = 0;
  for (Index i = 0; i < this->size(); ++i) {
    const ParameterInfo& matrix = this->sign().matrix(i);
    v_.emplace_back(this->sign().block(i).rows);
    row_sums_of_.push_back(rows);
    row_shares_.push_back({matrix.name, matrix.rows});
    norm_shares_.push_back({matrix.name, 1});
    rows += matrix.rows;
  }
  row_sums_ = Buffer<double>(rows);
  norms_ = Buffer<double>(this->size());
}

template <class Real>
void NorMuon<Real>::finish_signs(std::span<const Piece> pieces) {
  sum_rows();
  norms_.fill(0);
  for (Index i = 0; i < this->size(); ++i) {
    if (!pieces[at(i)].skipped) average_rows(i);
  }
  if (mesh_->within_replica().size() > 1 && this->size() > 0)
    mesh_->within_replica().all_reduce(norms_.span(), Reduction::kSum, {Purpose::kUpdate, norm_shares_});
  for (Index i = 0; i < this->size(); ++i) {
    if (pieces[at(i)].skipped) continue;
    double squares = 0;
    const Index begin = row_sums_of_[at(i)];
    for (Index row = 0; row < this->sign().matrix(i).rows; ++row) squares += row_sums_[begin + row];
    scale_rows(i, std::sqrt(squares) / std::max(std::sqrt(norms_[i]), std::numeric_limits<double>::min()));
  }
}

// row_sums_ <- sum_j U_ij^2; every process adds what its blocks have.
template <class Real>
void NorMuon<Real>::sum_rows() {
  row_sums_.fill(0);
  for (Index i = 0; i < this->size(); ++i) {
    const MatrixView<const Real> u = this->sign().block(i);
    const Index begin = row_sums_of_[at(i)] + this->sign().first_row(i);
    for (Index row = 0; row < u.rows; ++row) {
      for (Index col = 0; col < u.cols; ++col)
        row_sums_[begin + row] += static_cast<double>(u(row, col)) * static_cast<double>(u(row, col));
    }
  }
  if (mesh_->within_replica().size() > 1 && this->size() > 0)
    mesh_->within_replica().all_reduce(row_sums_.span(), Reduction::kSum, {Purpose::kUpdate, row_shares_});
}

// v <- b2 v + (1 - b2) mean_j U_ij^2. A row's part of |Y|^2 is counted by the process with its first column.
template <class Real>
void NorMuon<Real>::average_rows(Index i) {
  const ParameterInfo& matrix = this->sign().matrix(i);
  const Index begin = row_sums_of_[at(i)] + this->sign().first_row(i);
  const bool counts = this->sign().first_col(i) == 0 && this->sign().block(i).cols > 0;
  for (Index row = 0; row < v_[at(i)].size(); ++row) {
    Real& v = v_[at(i)][row];
    const double sum = row_sums_[begin + row];
    v = static_cast<Real>(beta2_ * static_cast<double>(v) +
                          (1 - beta2_) * sum / static_cast<double>(matrix.cols));
    if (counts) norms_[i] += sum / std::pow(std::sqrt(static_cast<double>(v)) + kRowEpsilon, 2);
  }
}

// U <- factor Y
template <class Real>
void NorMuon<Real>::scale_rows(Index i, double factor) {
  const MatrixView<Real> u = this->sign().block(i);
  for (Index row = 0; row < u.rows; ++row) {
    const auto scale =
        static_cast<Real>(factor / (std::sqrt(static_cast<double>(v_[at(i)][row])) + kRowEpsilon));
    for (Index col = 0; col < u.cols; ++col) u(row, col) *= scale;
  }
}

template <class Real>
std::vector<StateTensor<Real>> NorMuon<Real>::state(Index i) {
  std::vector<StateTensor<Real>> tensors = Muon<Real>::state(i);
  tensors.push_back({this->sign().matrix(i).name + ".row_v", v_[at(i)].matrix(0, v_[at(i)].size(), 1)});
  return tensors;
}

Index update_bytes(const ParameterInfo& matrix, const MeshShape& mesh, const OptimizerOptions& options,
                   Index element_bytes) {
  const Index bytes = sign_bytes(matrix, mesh, options.sign, element_bytes);
  if (options.kind != OptimizerKind::kNorMuon || mesh.shard * mesh.tensor == 1) return bytes;
  return bytes + (matrix.rows + 1) * dtype_bytes(DType::kF64);
}

template class NorMuon<float>;
template class NorMuon<double>;

}  // namespace lowband
