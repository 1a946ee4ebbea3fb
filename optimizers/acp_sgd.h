#pragma once

#include "collectives/factors/factor_exchange.h"
#include "optimizers/compressed_matrices.h"
#include "optimizers/factored_matrices.h"
#include "optimizers/options.h"
#include "sharding/process_mesh.h"

#include <vector>

namespace lowband {

/// ACP-SGD: PowerSGD whose replicas exchange one factor in each step, P and Q by turns. The other one is that
/// of the step before, orthonormalised.
///
///     even step:  Q <- qf(Q) ; P_i <- (e_i + G_i) Q   ; e_i <- e_i + G_i - P_i Q^T ; P <- mean P_i
///     odd step:   P <- qf(P) ; Q_i <- (e_i + G_i)^T P ; e_i <- e_i + G_i - P Q_i^T ; Q <- mean Q_i
///     D <- P Q^T ; u <- lambda u + c D
///     W <- (1 - eta wd) W - eta (c D + u)
///
/// with P (m, r) and Q (n, r) whatever the shape, P_i and Q_i as they were sent, and c the update scale,
/// which clips |D|; what D lost by it is not fed back. mean e_T + sum D = sum of mean G.
///
/// Which factor travels follows the number of the step, also where a matrix was skipped in the last. Both are
/// keyed Gaussians at first. A dead column of the factor that is orthonormalised is zero in both; the one
/// that was exchanged gets a unit Gaussian keyed by (seed, parameter, step) in its place, for the next step.
///
/// State: "<name>.e" and "<name>.u", the block of the weights; "<name>.left" and "<name>.right", P and Q as
/// they were exchanged, of which every process keeps a share of the rows of its block: r (m + n) elements
/// over the processes of a replica. Reference: Zhang et al., "Evaluation and Optimization of Gradient
/// Compression for Distributed Deep Learning", ICDCS 2023; conventions of algorithms.md 2.10.
template <class Real>
class AcpSgd final : public CompressedMatrices<Real> {
 public:
  using typename MatrixOptimizer<Real>::Piece;
  using typename MatrixOptimizer<Real>::LaterOutcome;
  using typename MatrixOptimizer<Real>::Outcome;

  /// Collective, as `exchange`: all processes of the mesh, equal arguments.
  AcpSgd(ProcessMesh& mesh, const std::vector<LayerMatrix>& matrices, const OptimizerOptions& options);

  void exchange(std::span<const Piece> pieces, const Scalar& gradient_scale, Index step) override;
  void add_sum_of_squares(MatrixView<double> sum) const override;
  Index diagnosed_elements() const override;
  /// Throws: Error, on all processes, when a state is not finite although the gradients are.
  LaterOutcome update(std::span<const Piece> pieces, const Scalar& update_scale, const StepInfo& info,
                      Diagnosis<Real>* diagnosis) override;
  Index size() const override { return static_cast<Index>(matrices_.size()); }
  std::vector<StateTensor<Real>> state(Index i) override;

 private:
  struct Matrix {
    LayerMatrix definition;
    Buffer<Real> error, momentum;
    MatrixView<Real> e, u;
  };
  /// One of the two factors, of all matrices.
  struct Factor {
    Factor(ProcessMesh& mesh, const std::vector<Matrix>& matrices, bool is_left,
           const OptimizerOptions& options);
    /// rows <- qf of the kept rows, gathered.
    void orthonormalise();
    RandomStream random(const ParameterInfo& info, std::uint64_t seed, Index step) const;

    bool left;
    FactorRows<Real> rows;  // of a process's block, and those of them that it keeps
    Orthonormaliser<Real> orthonormaliser;
    FactorExchange<Real> exchange;  // right: this factor
    std::vector<Buffer<Real>> kept;
    std::vector<Range> kept_rows;   // by matrix
    std::vector<Index> first_rows;  // likewise, of the block
  };
  static std::vector<Matrix> make_matrices(const ProcessMesh& mesh,
                                           const std::vector<LayerMatrix>& definitions);
  static std::vector<FactorShape> factor_shapes(ProcessMesh& mesh, const std::vector<Matrix>& matrices,
                                                bool left);

  Factor& sent(Index step) { return step % 2 == 0 ? left_ : right_; }
  Factor& orthonormal(Index step) { return step % 2 == 0 ? right_ : left_; }
  void apply(Index i, MatrixView<Real> weight, const Scalar& update_scale, const StepInfo& info);
  void keep(Index i, Index step);

  OptimizerOptions options_;
  std::vector<Matrix> matrices_;
  Factor left_, right_;
  const Factor* last_sent_ = nullptr;
  Buffer<Real> scaled_;  // what was received of one matrix, times the update scale
};

}  // namespace lowband
