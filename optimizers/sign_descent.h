#pragma once

#include "optimizers/distributed_sign.h"
#include "optimizers/matrix_optimizer.h"
#include "optimizers/options.h"

namespace lowband {

/// c of the update W <- W - eta c sign U for an m x n matrix. Of global shapes.
double update_scale(UpdateScale scale, Index rows, Index cols);

/// What optimizers have in common whose weights move along signs of matrices:
///
///     U <- the optimizer's own, of the mean gradient
///     U <- sign(U)
///     W <- (1 - eta wd) W - s U       s: step_size
///
/// Gradients are dense over replicas. Blocks lie as the weights' shards; signs are those of whole matrices
/// (DistributedSign).
template <class Real>
class SignDescent : public MatrixOptimizer<Real> {
 public:
  using typename MatrixOptimizer<Real>::Piece;
  using typename MatrixOptimizer<Real>::Outcome;

  Outcome update(std::span<const Piece> pieces, Real scale, const StepInfo& info,
                 Diagnosis<Real>* diagnosis) override;
  Index size() const override { return static_cast<Index>(infos_.size()); }

 protected:
  /// `rotation`: of the processes that compute signs.
  SignDescent(ProcessMesh& mesh, std::vector<ParameterInfo> matrices, const OptimizerOptions& options,
              Index rotation);

  /// A part of a signed matrix that lies in one piece in the block of its parameter too.
  struct Tile {
    Index row = 0, col = 0;  // of its first element in the parameter's block
    MatrixView<Real> u;      // in a block of sign()
  };

  /// Rows and columns of parameter i that this process owns.
  Range block_rows(Index i) const { return block_rows_[static_cast<std::size_t>(i)]; }
  Range block_cols(Index i) const { return block_cols_[static_cast<std::size_t>(i)]; }
  MatrixView<Real> as_block(Index i, Buffer<Real>& state) const {
    return state.matrix(0, block_rows(i).size(), block_cols(i).size());
  }
  /// The positions in sign() of what is signed of parameter i.
  Range signed_of(Index i) const { return signed_of_[static_cast<std::size_t>(i)]; }
  /// Of position j in sign(), as this process has them.
  std::span<const Tile> tiles(Index j) const { return tiles_[static_cast<std::size_t>(j)]; }

  const OptimizerOptions& options() const { return options_; }
  const ParameterInfo& info(Index i) const { return infos_[static_cast<std::size_t>(i)]; }
  DistributedSign<Real>& sign() { return sign_; }
  const DistributedSign<Real>& sign() const { return sign_; }

  /// eta c of position j in sign(), of its own shape; its block on this process is not empty.
  virtual double step_size(Index j, const StepInfo& info) const;

 private:
  /// Tiles of parameter i <- U; not of one that is skipped.
  virtual void form_direction(Index i, const Piece& piece, Real scale) = 0;
  /// Blocks of sign() <- what weights move along. Collective.
  virtual void form_signs(std::span<const Piece> /*pieces*/, const StepInfo& /*info*/) { sign_.compute(); }

  OptimizerOptions options_;
  std::vector<ParameterInfo> infos_;
  std::vector<Range> block_rows_, block_cols_;  // by parameter
  std::vector<Range> signed_of_;                // likewise
  DistributedSign<Real> sign_;
  std::vector<std::vector<Tile>> tiles_;  // by position in sign_
};

}  // namespace lowband
