#pragma once

#include "collectives/byte_budget.h"
#include "sharding/process_mesh.h"
#include "trainer/config/run_config.h"

#include <string>

namespace lowband {

/// Numbers that all processes add up after each step: loss, stop, and bytes counted.
inline constexpr Index kStepSums = 7;

/// What is sent every so many steps, for as long as the run lasts; never where the interval is 0.
struct PeriodicBytes {
  Index bytes = 0;
  Index interval_steps = 0;
  /// Bytes per step.
  double amortised() const {
    return interval_steps == 0 ? 0 : static_cast<double>(bytes) / static_cast<double>(interval_steps);
  }
};

/// Payload that a step of a run sends between replicas, from the configuration alone; the mean of a period
/// where steps differ.
struct BytePlan {
  // On the replica axis, summed over the processes of one replica.
  MatrixBytes matrices;         // layer matrices, by factors or dense
  Index other_dense_bytes = 0;  // everything else; norm gains once per process of the tensor axis
  PeriodicBytes diagnostics;
  // Of every process.
  Index update_bytes = 0;   // within_replica axis: signs of matrices that are cut
  std::string assemblies;   // how they are brought together, "owner 13, gram 1"; empty where none are signed
  Index control_bytes = 0;  // replica and world axis: flags, norms, sums
  PeriodicBytes weight_hashes;  // world axis
};

/// `config` must be valid. Bytes of AdamW's layer matrices count as dense matrices.
BytePlan byte_plan(const RunConfig& config);

/// Bytes of persistent optimizer state, of the process that has most. `config` must be valid.
Index planned_state_bytes(const RunConfig& config);

/// Allows what the process at `position` will send, exactly. On the replica axis: factors and dense tensors
/// by parameter, and nothing else for those purposes; diagnostics and weight hashes at their intervals. On
/// the within_replica axis: signs, by matrix. Control is not limited.
void allow_planned(ByteBudget& budget, const RunConfig& config, const MeshPosition& position);

}  // namespace lowband
