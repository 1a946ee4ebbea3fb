#pragma once

#include "optimizers/adamw.h"
#include "optimizers/dense_exchange.h"
#include "optimizers/dion.h"
#include "optimizers/gradient_sketch.h"
#include "optimizers/optimizer.h"
#include "optimizers/options.h"
#include "sharding/rank_profile.h"

#include <optional>

namespace lowband {

/// The optimizer of a training run: Dion for the layer matrices, AdamW for everything else (or for
/// everything), states cut over the shard and tensor axes.
///
/// One step:
///   1. shard axis: gradients are summed into the pieces that each process owns
///   2. all processes agree which parameters have unusable gradients; those are left alone, states included
///   3. replica axis: dense gradients are summed
///   4. the norm of the mean gradient is formed, and the factor that clips it
///   5. AdamW updates the dense pieces; Dion exchanges factors and updates the matrix pieces
///   6. shard axis: updated weights are gathered
///
/// A gradient is usable when every element and its square are finite: AdamW stores squares, and sums over
/// processes stay far from overflow.
///
/// The collectives of a step follow from the parameters alone. The one exception is taken by all processes
/// together: a matrix whose factor cannot be orthonormalised in two passes is gathered within the replica.
/// Ownership: borrows the mesh and the parameters' memory.
template <class Real>
class ShardedOptimizer final : public Optimizer<Real> {
 public:
  /// `profile` gives the factor rank of every layer matrix for Dion; it is not read for AdamW.
  ///
  /// Collective, as `step`: all processes of the mesh; equal options, profile and parameters apart from
  /// memory. Throws: InvalidArgument for an option out of range, a layer matrix without a rank, a rank that
  /// belongs to no layer matrix or is outside 1..min(m, n), and for kTrueNorm where factors are exchanged
  /// between replicas, since nobody then holds the gradient whose norm it is.
  ShardedOptimizer(ProcessMesh& mesh, std::span<Parameter<Real>> parameters, const RankProfile& profile,
                   const OptimizerOptions& options);

  void gradient_ready(Index /*parameter*/) override {}  // everything is exchanged in `step`
  StepReport step(const StepInfo& info) override;
  /// Of Dion ("<name>.M", "<name>.Q"), then of AdamW ("<name>.m", "<name>.v", "<name>.t"). Every process has
  /// every name; M differs between replicas, and pieces may be empty.
  std::vector<StateTensor<Real>> state() override;
  Index planned_factor_bytes() const override;
  Index planned_dense_bytes() const override;
  Index planned_periodic_bytes() const override { return 0; }  // nothing is diagnosed

 private:
  void agree_on_usable_gradients(StepReport& report);
  double gradient_norm(Index step);
  void update_dense(const StepInfo& info, double clip_scale);
  void update_matrices(const StepInfo& info, double clip_scale, StepReport& report);
  bool sketches() const { return norm_parts_.size() > 1; }
  bool is_usable(Index i) const { return unusable_[i] == 0; }

  ProcessMesh* mesh_;
  std::span<Parameter<Real>> parameters_;
  OptimizerOptions options_;
  std::vector<Index> matrices_;  // positions in parameters_
  std::vector<Index> dense_;
  DenseExchange<Real> exchange_;
  AdamW<Real> adamw_;          // of dense_
  Dion<Real> dion_;            // of matrices_
  Buffer<double> norm_parts_;  // what gradient_norm sums: the exact part, then the sketch where there is one
  Buffer<std::uint8_t> unusable_;  // by parameter, agreed
  std::vector<typename Dion<Real>::Piece> pieces_;
};

}  // namespace lowband
