#pragma once

#include "optimizers/block_views.h"
#include "optimizers/elementwise.h"
#include "optimizers/factored_matrices.h"
#include "optimizers/gradient_sketch.h"
#include "optimizers/shard_exchange.h"

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

namespace lowband {

/// A parameter of an optimizer.
struct Member {
  Index parameter = 0;                   // its position
  bool is_matrix = false;                // a matrix optimizer's, otherwise elementwise
  std::vector<Index> factor_ranks = {};  // of its matrices that are exchanged by their factors
};

/// Parameters that are exchanged together: their gradients, from this process's own to what updates need.
///
/// `exchange_gradients` (and `exchange_factors`) and `gather_weights` talk to other processes on
/// `exchange_mesh`, `update` on `update_mesh`; everything else does not. So the first may run on another
/// thread than the second.
template <class Real>
class Bucket {
 public:
  /// Collective, as every exchange: all processes of the mesh, equal arguments apart from memory. `alone` is
  /// a group of this process.
  Bucket(ProcessMesh& exchange_mesh, ProcessMesh& update_mesh, Communicator& alone,
         std::span<const Parameter<Real>> parameters, std::vector<Member> members,
         const OptimizerOptions& options);

  /// The memory of member i from now on; not between exchange_gradients and gather_weights.
  void rebind(Index i, Real* weight, Real* gradient) { shards_.rebind(i, weight, gradient); }

  /// Whether exchange_gradients leaves the factors to exchange_factors: Dion clips what it accumulates, and
  /// the norm that decides is that of all buckets.
  static bool factors_wait(const OptimizerOptions& options) {
    return options.kind == OptimizerKind::kDion && options.clip_norm > 0;
  }
  /// Whether dense tensors travel with the factors of matrices, otherwise by themselves.
  static bool dense_rides_along(const OptimizerOptions& options) {
    return exchanges_both_factors(options.kind) && !factors_wait(options);
  }
  /// Shard axis: gradients are summed. All processes agree which of them are unusable. Replica axis: dense
  /// gradients are summed; compressed matrices have their exchange, unless it waits.
  void exchange_gradients(Index step);
  /// Where factors wait: with G = clip_scale x gradient.
  void exchange_factors(MatrixView<const double> clip_scale, Index step);

  /// Of the mean gradient, this process's share: adds to `sum` what dense gradients (and compressed ones,
  /// when `of_compressed`) add to the square of its norm, in sum over all processes. Once after
  /// exchange_gradients.
  void add_sum_of_squares(bool of_compressed, MatrixView<double> sum);
  /// Adds the gradients of compressed matrices, as they are before replicas have exchanged anything.
  void add_to(GradientSketch& sketch) const;
  /// Likewise of what compressed matrices have decompressed; equal on all processes.
  void add_decompressed_sum_of_squares(MatrixView<double> sum) const {
    if (compressed_ != nullptr) compressed_->add_sum_of_squares(sum);
  }

  struct Outcome {
    Index skipped_matrices = 0;  // left alone for an unusable gradient
    Index skipped_other = 0;
    Index dead_columns = 0;
    Index householder_fallbacks = 0;
  };
  /// To be asked once, later, by a caller that then waits for a device if need be.
  using LaterOutcome = std::function<Outcome()>;
  /// New states and weights, of this process's pieces. `update_scale` multiplies dense gradients, and those
  /// that were decompressed.
  /// Collective where matrices are signed, and with a diagnosis (equal on all processes), on the mesh of
  /// that.
  LaterOutcome update(MatrixView<const double> update_scale, const StepInfo& info,
                      Diagnosis<Real>* diagnosis);
  /// Every shard's piece of every weight, to all.
  void gather_weights() { shards_.gather_weights(); }

  const std::vector<Member>& members() const { return members_; }
  /// Layer matrices that a diagnosis measures.
  Index diagnosed_matrices() const { return diagnosed_elements() > 0 ? compressed_->size() : 0; }
  /// In the order of members.
  std::vector<StateTensor<Real>> matrix_state();
  std::vector<StateTensor<Real>> elementwise_state() { return elementwise_optimizer_->state(); }
  /// Payload elements of a diagnosis on the replica axis, over the processes of one replica.
  Index diagnosed_elements() const { return compressed_ != nullptr ? compressed_->diagnosed_elements() : 0; }

 private:
  using Piece = typename MatrixOptimizer<Real>::Piece;

  const ParameterInfo& info(Index i) const { return parameters_[static_cast<std::size_t>(i)].info; }
  void find_counted();
  void cut_layer_matrices();
  void make_matrix_optimizer(ProcessMesh& update_mesh, Communicator& alone, std::vector<DenseTensor> riders);
  /// Calls visit(views, position in members_, pieces of its matrices) for each of matrices_.
  template <class Visit>
  void for_each_parameter_of_matrices(Visit visit);
  void agree_on_usable_gradients();
  double learning_rate(Index i, const StepInfo& step) const;
  MatrixView<const std::uint8_t> unusable(Index i) const { return unusable_.matrix(i, 1, 1); }

  ProcessMesh* mesh_;
  OptimizerOptions options_;
  std::vector<Member> members_;
  std::vector<Parameter<Real>> parameters_;
  std::vector<Index> matrices_;     // positions in members_, of parameters of one or several matrices
  std::vector<Index> elementwise_;  // all others
  std::vector<Index> dense_;        // whose gradients themselves are summed over replicas
  ShardExchange<Real> shards_;
  std::unique_ptr<ElementwiseOptimizer<Real>> elementwise_optimizer_;
  std::unique_ptr<MatrixOptimizer<Real>> matrix_optimizer_;  // none where all is elementwise
  CompressedMatrices<Real>* compressed_ = nullptr;           // the same, where it has an exchange of its own
  FactoredMatrices<Real>* carrier_ = nullptr;                // the same, where dense_ ride along
  std::optional<FactorExchange<Real>> dense_exchange_;       // unless they go by themselves
  Buffer<double> squares_;                   // by member, of this process's piece before replicas are summed
  Buffer<std::uint8_t> unusable_;            // by member, agreed
  Buffer<std::uint8_t> unusable_on_host_;    // the same, where matrices are decided about there
  std::vector<Index> counted_dense_;         // members whose squares count here, and nowhere else
  Buffer<Index> counted_;                    // the same, then matrices
  Buffer<double> one_;                       // a clip_scale that changes nothing
  std::vector<BlockViews<Real>> views_;      // by position in matrices_
  std::vector<LayerMatrix> layer_matrices_;  // of all of them, one after the other
  std::vector<Piece> pieces_;                // likewise
  Buffer<Real> scratch_;                     // of a gradient
};

}  // namespace lowband
