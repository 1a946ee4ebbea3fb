#pragma once

#include "optimizers/optimizer.h"
#include "runtime/low_rank.h"

#include <span>
#include <string>
#include <vector>

namespace lowband {

/// Measures how well the exchange of matrices did in one step: MatrixDiagnostics, matrix by matrix.
///
/// Between `begin` and `end` of a matrix its state turns from B_i into E_i. Means over replicas are formed by
/// dense all-reduces, with Purpose::kPeriodic, and buffers hold one matrix. Nothing that it is shown changes.
///
/// Means and residuals are formed in Real: a leak or drift below its precision is rounding.
/// Collective, every function: all processes of the mesh, the same matrices in the same order.
template <class Real>
class Diagnosis {
 public:
  /// Means over replicas of a whole matrix that one diagnosis forms.
  static constexpr Index kSums = 2;

  explicit Diagnosis(ProcessMesh& mesh) : mesh_(&mesh) {}

  /// Shapes: b is this process's block of B_i, contiguous.
  void begin(const std::string& name, Index factor_rank, MatrixView<const Real> b);
  /// e is the block of E_i; `removed` x factors, the mean, is what left the state. Norms of the columns of R.
  void end(MatrixView<const Real> e, const FactorPair<Real>& factors, double removed,
           std::span<const double> r_norms, Index dead_columns);
  /// Of a matrix that was skipped: E_i = B_i.
  void end_unsent(MatrixView<const Real> e);

  /// All matrices, in the order of `begin`. A matrix with B = 0 has only zeros.
  std::vector<MatrixDiagnostics> finish();

 private:
  MatrixView<Real> mean_over_replicas(MatrixView<const Real> own, Buffer<Real>& buffer);
  void measure(MatrixView<const Real> e, const FactorPair<Real>* sent, double removed);

  ProcessMesh* mesh_;
  std::vector<MatrixDiagnostics> found_;
  std::vector<double> squares_;  // by matrix: of Bbar, of E_i - Ebar, of the leak; over this process's block
  std::vector<double> sent_squares_;  // by matrix, of R
  Buffer<Real> b_buffer_, e_buffer_;
  MatrixView<Real> b_mean_;
};

}  // namespace lowband
