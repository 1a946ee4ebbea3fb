#pragma once

#include "optimizers/adamw.h"
#include "optimizers/factored_matrices.h"
#include "optimizers/gradient_sketch.h"
#include "optimizers/shard_exchange.h"

#include <memory>
#include <optional>
#include <span>
#include <vector>

namespace lowband {

/// A parameter of an optimizer.
struct Member {
  Index parameter = 0;    // its position
  Index factor_rank = 0;  // 0: not a matrix that is factored, AdamW's
};

/// Parameters that are exchanged together: their gradients, from this process's own to what updates need.
///
/// `exchange_gradients` (and `exchange_factors`) and `gather_weights` talk to other processes, on the mesh of
/// the constructor; everything else does not.
template <class Real>
class Bucket {
 public:
  /// Collective, as every exchange: all processes of the mesh, equal arguments apart from memory. `alone` is
  /// a group of this process.
  Bucket(ProcessMesh& mesh, Communicator& alone, std::span<const Parameter<Real>> parameters,
         std::vector<Member> members, const OptimizerOptions& options);

  /// Whether exchange_gradients leaves the factors to exchange_factors: Dion clips what it accumulates, and
  /// the norm that decides is that of all buckets.
  static bool factors_wait(const OptimizerOptions& options) {
    return options.kind == OptimizerKind::kDion && options.clip_norm > 0;
  }
  /// Shard axis: gradients are summed. All processes agree which of them are unusable. Replica axis: dense
  /// gradients are summed; matrices exchange their factors, unless these wait.
  void exchange_gradients();
  /// Where factors wait: with G = clip_scale x gradient.
  void exchange_factors(double clip_scale);

  /// Of the mean gradient, this process's share: what dense parameters (and matrices, when `of_matrices`)
  /// add to the square of its norm, in sum over all processes. Valid after exchange_gradients.
  double sum_of_squares(bool of_matrices) const;
  /// Adds the gradients of the matrices, as they are before replicas have exchanged anything.
  void add_to(GradientSketch& sketch) const;
  /// Sum over matrices of |R|^2; equal on all processes.
  double factor_sum_of_squares() const { return factored_->sum_of_squares(); }

  struct Outcome {
    Index skipped_matrices = 0;  // left alone for an unusable gradient
    Index skipped_other = 0;
    Index dead_columns = 0;
    Index householder_fallbacks = 0;
  };
  /// New states and weights, of this process's pieces. `update_scale` multiplies dense gradients, and the one
  /// that PowerSGD decompressed.
  /// With a diagnosis (equal on all processes) it is collective, on the mesh of that.
  Outcome update(double update_scale, const StepInfo& info, Diagnosis<Real>* diagnosis);
  /// Every shard's piece of every weight, to all.
  void gather_weights() { shards_.gather_weights(); }

  /// In the order of members: of matrix i; of the dense parameters.
  const std::vector<Member>& members() const { return members_; }
  Index matrices() const { return factored_->size(); }
  std::vector<StateTensor<Real>> matrix_state();
  std::vector<StateTensor<Real>> dense_state() { return adamw_.state(); }
  /// Payload elements on the replica axis, over the processes of one replica.
  Index factor_elements() const { return factored_->factor_elements(); }
  Index dense_elements() const;
  Index diagnosed_elements() const { return factored_->diagnosed_elements(); }

 private:
  const ParameterInfo& info(Index i) const { return parameters_[static_cast<std::size_t>(i)].info; }
  void agree_on_usable_gradients();
  bool is_usable(Index i) const { return unusable_[i] == 0; }

  ProcessMesh* mesh_;
  OptimizerOptions options_;
  std::vector<Member> members_;
  std::vector<Parameter<Real>> parameters_;
  std::vector<Index> matrices_;  // positions in members_
  std::vector<Index> dense_;
  ShardExchange<Real> shards_;
  AdamW<Real> adamw_;                                   // of dense_
  std::unique_ptr<FactoredMatrices<Real>> factored_;    // of matrices_, dense_ riding along unless
  std::optional<FactorExchange<Real>> dense_exchange_;  // they go first, where factors wait
  Buffer<std::uint8_t> unusable_;                       // by member, agreed
  std::vector<typename FactoredMatrices<Real>::Piece> pieces_;
};

}  // namespace lowband
