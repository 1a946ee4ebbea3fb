#pragma once

#include "collectives/communicator.h"
#include "sharding/parameter.h"
#include "trainer/config/run_config.h"
#include "trainer/run_record.h"

#include <atomic>
#include <memory>
#include <ostream>
#include <span>

namespace lowband {

/// How a run talks to whoever started it.
struct TrainingSession {
  /// Set from outside (a signal) to stop after the current step, with a checkpoint. May be null.
  const std::atomic<bool>* stop_requested = nullptr;
  /// Where process 0 shows progress; null for silence.
  std::ostream* console = nullptr;
};

struct RunOutcome {
  RunSummary summary;        // filled on process 0, when the run came to its end
  bool interrupted = false;  // a stop was requested; equal on all processes
};

/// One run as one process sees it: model, optimizer, data, records, in the order of docs/life_of_a_step.md.
///
/// Collective: every process of `world` constructs it with the same configuration and makes the same calls.
template <class Real>
class Trainer {
 public:
  /// Opens data, builds the model and the optimizer, resumes where the configuration says so, and lets
  /// process 0 open the run record. All bad input is reported here, before anything is written. Throws:
  /// InvalidArgument, IoError; on all processes together.
  Trainer(const RunConfig& config, Communicator& world, const TrainingSession& session);
  ~Trainer();

  /// Trains from the current step to the last, validates, writes checkpoints and records. A stop request ends
  /// it after the current step, with a checkpoint. A run that is complete already is not touched.
  RunOutcome run();

  /// One step alone; returns the training loss, nats per token, mean over the whole batch.
  double step();
  /// Mean loss over the validation sequences, nats per token.
  double validate();
  void save_checkpoint();

  Index next_step() const;
  std::span<const Parameter<Real>> parameters() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// `Trainer<Real>::run` in the precision of the configuration.
RunOutcome train(const RunConfig& config, Communicator& world, const TrainingSession& session);

}  // namespace lowband
