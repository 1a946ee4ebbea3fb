#include "optimizers/diagnosis.h"

#include "runtime/copy.h"
#include "runtime/linalg.h"
#include "runtime/passes.h"

#include <algorithm>
#include <cmath>

namespace lowband {
namespace {

constexpr std::size_t kSquares = 3;  // of Bbar, of E_i - Ebar, of the leak

}  // namespace

template <class Real>
MatrixView<Real> Diagnosis<Real>::mean_over_replicas(MatrixView<const Real> own, Buffer<Real>& buffer) {
  if (buffer.size() < own.elements() || buffer.device() != own.device)
    buffer = Buffer<Real>(own.elements(), own.device);
  const MatrixView<Real> mean = buffer.matrix(0, own.rows, own.cols);
  copy<Real>(own, mean);
  const PayloadShare share{found_.back().name, own.elements()};
  mesh_->replica().all_reduce(mean.flat(), Reduction::kSum, {Purpose::kPeriodic, {&share, 1}});
  scale<Real>(Real{1} / static_cast<Real>(mesh_->shape().replica), mean);
  return mean;
}

template <class Real>
void Diagnosis<Real>::begin(const std::string& name, Index factor_rank, MatrixView<const Real> b) {
  found_.push_back({.name = name, .factor_rank = factor_rank});
  b_mean_ = mean_over_replicas(b, b_buffer_);
}

template <class Real>
void Diagnosis<Real>::end(MatrixView<const Real> e, const FactorPair<Real>& factors, double removed,
                          std::span<const double> r_norms, Index dead_columns) {
  found_.back().dead_columns = dead_columns;
  double squares = 0;
  for (const double norm : r_norms) squares += norm * norm;
  sent_squares_.push_back(squares);
  measure(e, &factors, removed);
}

template <class Real>
void Diagnosis<Real>::end_unsent(MatrixView<const Real> e) {
  sent_squares_.push_back(0);
  measure(e, nullptr, 0);
}

template <class Real>
void Diagnosis<Real>::measure(MatrixView<const Real> e, const FactorPair<Real>* sent, double removed) {
  squares_.push_back(sum_of_squares<Real>(b_mean_));
  const MatrixView<Real> e_mean = mean_over_replicas(e, e_buffer_);

  // leak <- Bbar - Ebar - removed P R^T, in the memory of Bbar
  add<Real>(Real{-1}, e_mean, Real{1}, b_mean_);
  if (sent != nullptr) add_product<Real>(static_cast<Real>(-removed), *sent, Real{1}, b_mean_);
  // drift <- E_i - Ebar, in the memory of Ebar
  add<Real>(Real{1}, e, Real{-1}, e_mean);
  squares_.push_back(sum_of_squares<Real>(e_mean));
  squares_.push_back(sum_of_squares<Real>(b_mean_));
}

// Replicas hold the same Bbar and leak, so that sums over all processes are D times those over a matrix; the
// drift is a mean over replicas anyway.
template <class Real>
std::vector<MatrixDiagnostics> Diagnosis<Real>::finish() {
  mesh_->world().all_reduce(std::span(squares_), Reduction::kSum, {Purpose::kControl});
  const double replicas = mesh_->shape().replica;
  for (std::size_t i = 0; i < found_.size(); ++i) {
    const double b = squares_[kSquares * i] / replicas;
    if (b == 0) continue;
    found_[i].drift = std::sqrt(squares_[kSquares * i + 1] / replicas / b);
    found_[i].mass_leak = std::sqrt(squares_[kSquares * i + 2] / replicas / b);
    found_[i].captured_energy = sent_squares_[i] / b;
  }
  return std::move(found_);
}

template class Diagnosis<float>;
template class Diagnosis<double>;

}  // namespace lowband
