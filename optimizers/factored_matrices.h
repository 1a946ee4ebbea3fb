#pragma once

#include "collectives/factors/factor_exchange.h"
#include "optimizers/compressed_matrices.h"
#include "optimizers/layer_matrix.h"
#include "optimizers/options.h"
#include "runtime/low_rank.h"
#include "runtime/random.h"

#include <optional>
#include <span>
#include <string>
#include <vector>

namespace lowband {

/// What Dion and PowerSGD have in common: matrices that are exchanged together, by their factors.
///
/// Each replica i keeps a state S_i of the shape of the weights (Dion's momentum M, PowerSGD's error e), and
/// all keep the same right factor Q. Orientation a x b = m x n where m >= n, and n x m otherwise (B is
/// transposed then), from the global shape alone. One step:
///
///     B_i <- S_i + G_i                 in the memory of S
///     P   <- orth(mean_i B_i Q)        dead columns zero
///     R_i <- B_i^T P ; R <- mean_i R_i
///     S_i <- B_i - removed P R_i^T     (local; aggregated: P R^T); removed = 1 - mu for Dion, 1 for PowerSGD
///     Q, W <- the optimizer's own
///     dead j: Q_j <- unit Gaussian keyed by (seed, parameter, step), for the next step
///
/// A matrix that *travels dense* (OptimizerOptions::exchange) sends B_i instead of B_i Q and B_i^T P. Its P
/// and R are then computed from mean B, in an exchange whose replica axis is this process alone, and its own
/// R_i beside them: the same P, R and R_i, up to rounding.
///
/// Dense tensors of others ride along with the left factors.
///
/// Of Q every process keeps a share of the rows that its block multiplies, those that hold the same rows
/// keeping the rest: b r elements over the processes of a replica, each once. They are gathered, where the
/// exchange has room for R, before B Q.
///
/// Everything but S is equal on all replicas, bit by bit.
template <class Real>
class FactoredMatrices : public CompressedMatrices<Real> {
 public:
  using typename MatrixOptimizer<Real>::Piece;
  using typename MatrixOptimizer<Real>::LaterOutcome;
  using typename MatrixOptimizer<Real>::Outcome;

  /// Copies this process's summand of rider k into the exchange; before `exchange`.
  void put_rider(Index k, MatrixView<const Real> values) { exchange_.put_dense(first_rider_ + k, values); }
  /// Copies the sum over replicas of rider k out of it; after `exchange`.
  void get_rider(Index k, MatrixView<Real> values) const { exchange_.get_dense(first_rider_ + k, values); }

  /// Adds G = gradient_scale x piece.gradient to the states and forms P, R and R_i.
  void exchange(std::span<const Piece> pieces, const Scalar& gradient_scale, Index step) override;
  /// |R|^2 = |P R^T|^2
  void add_sum_of_squares(MatrixView<double> sum) const override;

  /// Takes what was sent out of the states, updates right factors and weights. Sends nothing, but for a
  /// diagnosis, where one is wanted (on all processes).
  /// `update_scale` multiplies the gradient that PowerSGD decompressed; Dion's is clipped before its
  /// exchange.
  LaterOutcome update(std::span<const Piece> pieces, const Scalar& update_scale, const StepInfo& info,
                      Diagnosis<Real>* diagnosis) override;

  Index size() const override { return static_cast<Index>(matrices_.size()); }
  /// "<name>.<letter>" of matrix i: the owned block of S ("M" or "e"), the kept rows of Q, and what else the
  /// optimizer keeps.
  std::vector<StateTensor<Real>> state(Index i) override;

  Index diagnosed_elements() const override;

 protected:
  struct Matrix {
    LayerMatrix definition;
    bool tall = true;       // B = S, otherwise B = S^T
    bool dense = false;     // travels dense
    Index place = 0;        // among the matrices that travel as this one does
    bool shares_q = false;  // others hold the same rows of Q
    Range b;                // rows of Q that belong to the block
    Range kept;             // those of them that are kept here
    Buffer<Real> state;
    Buffer<Real> right_factor;
    MatrixView<Real> s;  // (block rows, block cols)
    MatrixView<Real> q;  // (kept rows, r)
    /// L R^T as it lies in the weights, from a left and a right factor of B.
    FactorPair<Real> pair(MatrixView<const Real> left, MatrixView<const Real> right) const {
      return tall ? FactorPair<Real>{left, right} : FactorPair<Real>{right, left};
    }
  };

  /// Collective, as `exchange`: all processes of the mesh, equal arguments. `alone` is a group of this
  /// process.
  FactoredMatrices(ProcessMesh& mesh, Communicator& alone, const std::vector<LayerMatrix>& matrices,
                   const std::vector<DenseTensor>& riders, const OptimizerOptions& options,
                   std::string_view state_letter);

  const OptimizerOptions& options() const { return options_; }
  const Matrix& matrix(Index i) const { return matrices_[static_cast<std::size_t>(i)]; }
  MatrixView<const Real> p(Index i);
  MatrixView<const Real> mean_r(Index i);
  /// R_i with the local residual, mean R with the aggregated one: what the state loses.
  MatrixView<const Real> residual_r(Index i);
  /// Norms of the columns of mean R.
  MatrixView<const double> r_norms(Index i) const;
  /// (block's extent along b, r): where `apply` puts the Q of the next step.
  MatrixView<Real> next_q(const Matrix& matrix);

 private:
  virtual void apply(Index i, MatrixView<Real> weight, const Scalar& update_scale, const StepInfo& info) = 0;
  /// The multiple of P R^T that the state loses.
  virtual double removed() const = 0;
  virtual void add_state(Index /*i*/, std::vector<StateTensor<Real>>& /*tensors*/) {}

  static std::vector<Matrix> make_matrices(const ProcessMesh& mesh,
                                           const std::vector<LayerMatrix>& definitions,
                                           const OptimizerOptions& options);
  static std::vector<FactorShape> factor_shapes(ProcessMesh& mesh, const std::vector<Matrix>& matrices,
                                                bool dense);
  static std::vector<DenseTensor> dense_tensors(const std::vector<Matrix>& matrices,
                                                const std::vector<DenseTensor>& riders);

  /// The rows of Q that the blocks of the matrices of one exchange multiply, now in the place of their R.
  void gather_q(bool dense);
  MatrixView<const Real> q_of_block(const Matrix& matrix);
  void left_products(std::span<const Piece> pieces, const Scalar& gradient_scale);
  void factor_means();
  MatrixView<const Real> mean_b(const Matrix& matrix);
  FactorExchange<Real>& exchange_of(const Matrix& matrix) { return matrix.dense ? *from_means_ : exchange_; }
  const FactorExchange<Real>& exchange_of(const Matrix& matrix) const {
    return matrix.dense ? *from_means_ : exchange_;
  }
  /// FactorExchange::outcome
  MatrixView<const Real> outcome(const Matrix& matrix) const;
  void keep_q(Matrix& matrix);
  void refill(Matrix& matrix, Index step);
  LaterOutcome later_outcome(Index step) const;

  OptimizerOptions options_;
  std::string state_letter_;
  Index replicas_;
  std::vector<Matrix> matrices_;
  Index first_rider_ = 0;                           // dense tensors before it are matrices
  FactorExchange<Real> exchange_;                   // of the matrices that travel as factors
  std::optional<FactorExchange<Real>> from_means_;  // of those that travel dense
  std::vector<Buffer<Real>> own_right_;             // R_i of those that travel dense, with the local residual
  Buffer<Real> mean_b_;                             // of one of them
  Buffer<Real> next_q_;                             // of one matrix, where processes share Q
  Buffer<std::uint8_t> stays_;                      // by matrix: skipped, or its state is not finite
};

}  // namespace lowband
