#pragma once

#include "collectives/process_device.h"
#include "model/model.h"
#include "optimizers/sharded_optimizer.h"
#include "sharding/process_mesh.h"
#include "trainer/checkpoint.h"
#include "trainer/data/token_shards.h"
#include "trainer/host_copies.h"
#include "trainer/progress.h"
#include "trainer/replay/gradient_dump.h"
#include "trainer/run_record.h"
#include "trainer/trainer.h"

#include <chrono>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace lowband {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

/// All that a run holds on one process. Its members are defined by concern: trainer.cc opens a run and orders
/// its steps, training_step.cc takes one, evaluation.cc validates, resume.cc saves and continues,
/// recording.cc says what happened.
template <class Real>
struct Trainer<Real>::State {
  State(const RunConfig& config_, Communicator& world_, const TrainingSession& session_);

  // Sums over the processes of one step: what was lost, whether somebody wants to stop, and what the ledgers
  // counted.
  struct StepSums {
    double loss = 0;  // mean over the tokens of the step
    bool stop = false;
    // Payload on the replica axis, of one replica.
    Index factor_bytes = 0;
    Index dense_bytes = 0;
    Index periodic_bytes = 0;
    Index replica_axis_bytes = 0;  // all purposes
  };
  // One completed step as it is recorded.
  struct StepOutcome {
    StepSums sums;
    StepReport report;
    double learning_rate = 0;
    double forward_backward_seconds = 0;
    double seconds = 0;
  };

  // training_step.cc
  StepSums take_step();
  double accumulate_gradients();
  StepSums agree_on_step(double loss_sum, bool diagnosed);
  void check_replicas_agree();
  void dump_gradients();
  // evaluation.cc
  double validation_loss();
  // resume.cc
  void resume();
  void save();
  CheckpointIdentity identity() const;
  std::vector<NamedTensor> tensors(HostCopies<Real>& copies);
  TensorPlaces places() const;
  // recording.cc
  void open_record();
  void record_start();
  void announce();
  void show_step(const StepOutcome& outcome);
  void record_step(const StepOutcome& outcome);
  void record_diagnostics(const StepReport& report);
  std::vector<ProcessTraffic> gather_traffic();
  RunSummary summary() const;

  Index state_bytes();
  bool first_process() const { return world.process() == 0; }
  Index steps() const { return config.schedule().steps(); }
  Index sequences_per_process() const {
    return sequences_per_micro_batch(config) * micro_batches_per_step(config);
  }
  Index tokens_per_step() const { return config.batch().sequences_per_step() * model_shape.sequence; }
  std::filesystem::path checkpoints() const { return directory / "checkpoints"; }
  bool dumps_step() const { return dump && dump->writes(step); }
  bool at_interval(Index interval) const { return interval > 0 && step % interval == 0; }
  void say(const std::string& line) {
    if (progress) progress->say(line);
  }
  std::vector<TransferSum> run_transfers() const {  // of this process, since the run began
    return merged(earlier_transfers, transfer_sums(world.ledger().total()));
  }

  RunConfig config;
  Communicator& world;
  TrainingSession session;
  ModelConfig model_shape;
  RankProfile profile;
  std::filesystem::path directory;
  Timeline timeline;
  std::optional<TokenSet> train_set, validation_set;
  ProcessDevice device;  // where the configuration asks for one
  std::optional<DeviceScope> device_of_world;
  std::optional<ProcessMesh> mesh;
  std::unique_ptr<Model<Real>> model;
  std::optional<ShardedOptimizer<Real>> optimizer;
  std::optional<GradientDump<Real>> dump;
  std::optional<RunRecorder> record;          // on process 0
  std::optional<Progress> progress;           // on process 0, with a console
  std::vector<std::int32_t> tokens, targets;  // one micro-batch

  Index step = 0;  // completed
  Index first_step = 0;
  std::optional<MeshShape> resharded_from;  // of the checkpoint, where it was another
  Index non_finite_steps = 0;               // without a break, up to now
  bool complete = false;                    // this run ended before, with all its records
  double step_seconds = 0;       // of all steps since `first_step`, validation and checkpoints excluded
  double optimizer_seconds = 0;  // the part of it inside the optimizer
  Clock::time_point begin = Clock::now();
  std::optional<double> last_loss;
  Index factor_bytes = 0, dense_bytes = 0;  // of all steps, on the replica axis, of one replica
  // Since the run began, all its sessions together; `earlier_transfers` without this one.
  double exchange_seconds = 0, exposed_seconds = 0;
  std::vector<TransferSum> earlier_transfers;
  std::optional<double> final_validation, best_validation;
  Index best_validation_step = 0;
};

}  // namespace lowband
