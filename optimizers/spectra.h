#pragma once

#include "collectives/factors/factor_exchange.h"
#include "optimizers/layer_matrix.h"
#include "optimizers/matrix_optimizer.h"
#include "optimizers/options.h"
#include "sharding/process_mesh.h"

#include <vector>

namespace lowband {

/// k of an m x n matrix: its fraction of min(m, n), rounded to nearest, at least 1. The fraction counts in
/// millionths, so that k is a matter of integers.
Index spectra_rank(const ParameterInfo& matrix, double fraction);

/// Spectra: momentum whose k largest singular values are brought down to the size of the others.
///
///     M     <- mu M + G
///     T times:  U <- qf(M V) ; Z <- M^T U ; s_j <- |Z_j| ; V_j <- Z_j / s_j
///     sigma <- sqrt((|M|^2 - sum s_j^2) / (min(m, n) - k))
///     O     <- M - U diag(s_j - sigma) V^T
///     W     <- (1 - eta wd) W - 0.2 eta / (RMS(O) + 1e-8) O
///
/// |O|^2 = sigma^2 min(m, n), so that nothing else is summed for RMS(O). Where there is no tail to take sigma
/// from, because k = min(m, n) or because M has no more than k directions, O = M.
///
/// A process that holds a matrix alone, k at most kOnePassColumns, forms M V and M^T (M V) in one pass over
/// M, and Z from that and the triangular factor of M V, where this costs no accuracy. In the first iteration
/// of a step the same pass forms M.
///
/// G is the mean gradient, dense over replicas. V starts as keyed Gaussians, which step 0 iterates
/// kFirstIterations times more often, in place of the published singular value decomposition. A column with
/// s_j = 0 becomes a unit Gaussian keyed by (seed, parameter, step).
///
/// State: "<name>.M", the block of the weights, and "<name>.V" (n, k), cut like it: the processes whose
/// blocks have the same columns share their rows of V. Over the processes of a replica m n + n k elements,
/// each once.
/// Reference: "Spectra: Rethinking Optimizers for LLMs Under Spectral Anisotropy", algorithms 1 and 2;
/// conventions of algorithms.md 2.12.
template <class Real>
class Spectra final : public MatrixOptimizer<Real> {
 public:
  using typename MatrixOptimizer<Real>::Piece;
  using typename MatrixOptimizer<Real>::LaterOutcome;
  using typename MatrixOptimizer<Real>::Outcome;

  /// A subspace iteration gains the ratio of neighbouring singular values squared. Five in all leave of a
  /// gap of 2 what float32 rounds.
  static constexpr Index kFirstIterations = 4;

  /// `alone`: a group of this process.
  Spectra(ProcessMesh& mesh, Communicator& alone, const std::vector<LayerMatrix>& matrices,
          const OptimizerOptions& options);

  LaterOutcome update(std::span<const Piece> pieces, const Scalar& scale, const StepInfo& info,
                      Diagnosis<Real>* diagnosis) override;
  Index size() const override { return static_cast<Index>(matrices_.size()); }
  std::vector<StateTensor<Real>> state(Index i) override;

 private:
  struct Matrix {
    LayerMatrix definition;
    ParameterInfo info;
    Index k = 0;
    bool one_pass = false;  // Z follows U, see FactorShape::right_follows
    Range cols;             // of the block
    Index owned_begin = 0;  // of the rows of V that this process keeps, among those of its columns
    Buffer<Real> momentum;
    MatrixView<Real> m;  // (block rows, block cols)
  };
  static std::vector<Matrix> make_matrices(const ProcessMesh& mesh,
                                           const std::vector<LayerMatrix>& definitions,
                                           const OptimizerOptions& options);
  static std::vector<FactorShape> factor_shapes(ProcessMesh& mesh, const std::vector<Matrix>& matrices);
  static std::vector<typename FactorRows<Real>::Shape> v_shapes(const std::vector<FactorShape>& shapes);

  /// M and |M|^2 of the matrices for which the first iteration does not form them.
  void accumulate(std::span<const Piece> pieces, Real scale);
  /// U and Z from M and V = right(i), or the cache in the first iteration of a step.
  void iterate(std::span<const Piece> pieces, Real scale, bool first);
  /// Z_j -> V_j
  void normalise(Index i, Index step);
  void apply(Index i, MatrixView<Real> weight, const StepInfo& info);

  ProcessMesh* mesh_;
  OptimizerOptions options_;
  std::vector<Matrix> matrices_;
  FactorExchange<Real> exchange_;     // left: U, right: Z, then V; within the replica
  FactorRows<Real> cache_;            // V between steps
  Buffer<double> squares_;            // by matrix, |M|^2
  std::vector<PayloadShare> shares_;  // of squares_
};

}  // namespace lowband
