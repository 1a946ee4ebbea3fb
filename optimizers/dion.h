#pragma once

#include "collectives/factors/factor_exchange.h"
#include "optimizers/optimizer.h"
#include "optimizers/options.h"
#include "runtime/random.h"
#include "sharding/layout.h"

#include <span>
#include <string>
#include <vector>

namespace lowband {

/// A matrix that Dion treats: global shape and the rank of its factors.
struct DionMatrix {
  ParameterInfo info;
  Index factor_rank = 0;
};

/// Dion with decoupled momentum: replicas keep their own momentum M and exchange nothing but the factors P, R
/// of what they apply.
///
/// With B = M + G, orientation a x b = m x n where m >= n and n x m otherwise (B is transposed then),
/// replicas i:
///
///     P   <- orth(mean_i B_i Q)        dead columns zero
///     R_i <- B_i^T P ; R <- mean_i R_i
///     M_i <- B_i - (1 - mu) P R_i^T    (local; aggregated: P R^T)
///     Q_j <- R_j / (|R_j| + 1e-8)
///     W   <- (1 - eta wd) W - eta sqrt(m/n) P Q^T
///     dead j: Q_j <- unit Gaussian keyed by (seed, parameter, step), for the next step
///
/// so that mean M_T = sum of mean G - (1 - mu) sum P R^T: what is not sent stays in the momentum.
/// Everything but M is equal on all replicas, bit by bit.
///
/// Reference: Dion, arXiv 2504.05295; conventions of algorithms.md 2.7.
template <class Real>
class Dion {
 public:
  /// Collective, as `step`: all processes of the mesh, equal arguments.
  /// Throws: InvalidArgument naming the parameter when a rank is outside 1..min(m, n), or when the tensor
  /// axis does not cut a matrix although it has several processes.
  Dion(ProcessMesh& mesh, const std::vector<DionMatrix>& matrices, const OptimizerOptions& options);

  /// One matrix in one step: the blocks that this process owns.
  struct Piece {
    MatrixView<const Real> gradient;  // contiguous
    MatrixView<Real> weight;
    bool skipped = false;  // agreed by all processes: no state changes, zeros travel
  };
  /// G = gradient_scale x piece.gradient. Adds to the dead columns and fallbacks of `report`.
  /// Throws: Error, on all processes, when a momentum is not finite although the gradients are.
  void step(std::span<const Piece> pieces, Real gradient_scale, const StepInfo& info, StepReport& report);

  /// "<name>.M" (the owned block) and "<name>.Q" (rows of Q that belong to the block).
  std::vector<StateTensor<Real>> state();
  /// B(r) in elements.
  Index factor_elements() const;

 private:
  struct Matrix {
    DionMatrix definition;
    bool tall = true;   // B = M, otherwise B = M^T
    Index b_begin = 0;  // first row of Q held here
    Buffer<Real> momentum;
    Buffer<Real> right_factor;
    MatrixView<Real> m;  // (block rows, block cols)
    MatrixView<Real> q;  // (block's extent along b, r)
    RandomStream random(std::uint64_t seed, Index step) const;
  };
  static std::vector<Matrix> make_matrices(const ProcessMesh& mesh,
                                           const std::vector<DionMatrix>& definitions, std::uint64_t seed);
  static std::vector<FactorShape> factor_shapes(ProcessMesh& mesh, const std::vector<Matrix>& matrices);

  void left_product(Index i, const Piece& piece, Real gradient_scale);
  void right_product(Index i, const Piece& piece);
  void apply(Index i, const Piece& piece, const StepInfo& info);
  void refill(Matrix& matrix, std::span<const std::uint8_t> dead, Index step);

  OptimizerOptions options_;
  std::vector<Matrix> matrices_;
  FactorExchange<Real> exchange_;
};

}  // namespace lowband
