#pragma once

#include "optimizers/optimizer.h"
#include "trainer/replay/recorded_files.h"
#include "trainer/replay/whole_tensors.h"

#include <filesystem>
#include <span>
#include <string>
#include <vector>

namespace lowband {

/// Writes a recording (recorded_files.h) of the steps `first_step` .. `first_step + steps - 1` of a run, for
/// `lowband replay`: weights and optimizer state before the first, gradients of every step and replica as
/// they are before anything is exchanged between replicas or clipped, and the configuration as
/// "run.txtpb".
///
/// Collective, every function: all processes of the mesh, equal arguments apart from memory.
/// Ownership: borrows the mesh and the parameters' memory.
template <class Real>
class GradientDump {
 public:
  GradientDump(std::filesystem::path folder, Index first_step, Index steps, ProcessMesh& mesh,
               std::span<const Parameter<Real>> parameters);

  /// Refuses a run that would mix two recordings, before it begins after `completed_steps`.
  /// Throws: AgreedFailure for a new run whose folder has files, for one that continues within the steps to
  /// be written and whose folder does not have the weights of the first, and for a folder that cannot be
  /// written.
  void prepare(Index completed_steps);

  bool writes(Index step) const { return step >= first_step_ && step < first_step_ + steps_; }
  /// Before the gradients of `step` are used, which must be one that it writes. They are left as they are.
  /// Throws: AgreedFailure when a file cannot be written.
  void write(Index step, const std::vector<StateTensor<Real>>& state, const std::string& config_text);

 private:
  void write_beginning(const std::vector<StateTensor<Real>>& state, const std::string& config_text);
  void write_gradients(Index step);
  bool first_process() const { return mesh_->world().process() == 0; }

  std::filesystem::path folder_;
  Index first_step_;
  Index steps_;
  ProcessMesh* mesh_;
  std::span<const Parameter<Real>> parameters_;
  std::vector<RecordedParameter> recorded_;
  Buffer<Real> mean_;  // of one gradient over the shard axis
};

}  // namespace lowband
