#pragma once

#include "optimizers/bucket.h"
#include "optimizers/communication_thread.h"
#include "optimizers/optimizer.h"
#include "optimizers/options.h"
#include "sharding/rank_profile.h"

#include <functional>
#include <memory>
#include <optional>
#include <vector>

namespace lowband {

/// The optimizer of a training run: a matrix optimizer for the layer matrices and an elementwise one for
/// everything else, or an elementwise one for everything; states cut over the shard and tensor axes.
///
/// Parameters are exchanged in buckets. Each bucket:
///   1. shard axis: gradients are summed into the pieces that each process owns
///   2. all processes agree which parameters have unusable gradients; those are left alone, states included
///   3. replica axis: dense gradients are summed, and factors exchanged in the same groups
///   4. the norm of the gradient of all buckets is formed, and the factor that clips it
///   5. elementwise pieces are updated, then matrices
///   6. shard axis: updated weights are gathered
/// Dion clips what it accumulates: where clip_norm > 0 its factors are exchanged between 4 and 5.
///
/// With OptimizerOptions::overlap there is one bucket for every `bucket_elements` gradient elements, in
/// decreasing order of parameters. When all parameters of a bucket and of those before it have been announced
/// by `gradient_ready`, its 1 to 3 start on a communication thread with communicators of its own; 5 of a
/// bucket runs beside the exchanges of the next. Weights change in `step` only. Otherwise there is one
/// bucket, and `step` does everything. Both give the same bits where sums do not depend on how they are cut.
/// Where what is sent depends on the number of the step, nothing overlaps in the first one, whose number is
/// not known before `step`; after that they must follow each other.
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
  /// `profile` gives the factor rank of every layer matrix where `exchanges_factors`; it is not read for
  /// others.
  ///
  /// Collective, as `step`: all processes of the mesh; equal options, profile and parameters apart from
  /// memory. Throws: InvalidArgument for an option out of range, a layer matrix without a rank, a rank that
  /// belongs to no layer matrix or is outside 1..min(m, n), and for kTrueNorm where Dion's factors are
  /// exchanged between replicas, since nobody then holds the gradient whose norm it is.
  ShardedOptimizer(ProcessMesh& mesh, std::span<Parameter<Real>> parameters, const RankProfile& profile,
                   const OptimizerOptions& options);
  /// In the middle of a step, with a communication thread: aborts the groups of that thread, so that neither
  /// it nor its peers wait for what does not come.
  ~ShardedOptimizer() override;

  /// The memory of a parameter from now on: contiguous, of the same shape.
  /// Throws: InvalidArgument for a parameter that is not there or has been announced in this step.
  void rebind(Index parameter, Real* weight, Real* gradient);
  /// Throws: InvalidArgument for a parameter that is not there or was announced before in this step.
  void gradient_ready(Index parameter) override;
  PendingReport step(const StepInfo& info) override;
  /// Of matrices, then of everything else, in the letters of each optimizer, whatever the buckets. Every
  /// process has every name; M of Dion and e of PowerSGD and ACP-SGD differ between replicas, and pieces may
  /// be empty.
  std::vector<StateTensor<Real>> state() override;
  const PlannedTraffic& planned() const override { return planned_; }
  Index planned_periodic_bytes() const override;

 private:
  /// One bucket and how far it is in this step.
  struct Stage {
    std::unique_ptr<Bucket<Real>> bucket;
    Index missing = 0;  // parameters not announced
    bool started = false;
    Index task = 0;  // of the communication thread, the last one started for it
  };
  using Ranks = std::vector<std::vector<Index>>;  // by parameter, none of those that are not factored

  void make_buckets(const Ranks& ranks);
  ProcessMesh& exchange_mesh() { return own_mesh_ ? *own_mesh_ : *mesh_; }

  void expect_unannounced(std::string_view call, Index parameter) const;
  void start(Stage& stage, std::string_view what, std::function<void()> exchange);
  void start_announced(Index step);
  void wait_for(const Stage& stage);
  void find_norm(Index step);
  void diagnose(StepReport& report, Diagnosis<Real>& diagnosis) const;

  ProcessMesh* mesh_;
  std::span<Parameter<Real>> parameters_;
  OptimizerOptions options_;
  std::unique_ptr<Communicator> own_world_;  // of the communication thread
  std::optional<ProcessMesh> own_mesh_;
  std::unique_ptr<Communicator> alone_;
  std::vector<Stage> stages_;       // in the order in which they start
  std::vector<Index> stage_of_;     // by parameter
  std::vector<bool> announced_;     // by parameter
  std::optional<Index> next_step_;  // the one that announcements belong to, after the first
  PlannedTraffic planned_;
  Buffer<double> norm_parts_;      // what find_norm sums: the exact part, then the sketch where there is one
  Buffer<double> norm_squares_;    // of the exact part, of what was decompressed, of the sketch
  Buffer<double> norm_and_scale_;  // of the gradient of this step
  double waited_seconds_ = 0;      // in this step for the thread, while it was in a collective
  double reported_seconds_ = 0;    // of the thread in collectives, in earlier steps
  std::optional<CommunicationThread> thread_;  // last: it ends before what its tasks use
};

}  // namespace lowband
