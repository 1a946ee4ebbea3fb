#pragma once

#include "collectives/byte_budget.h"
#include "optimizers/options.h"
#include "sharding/parameter.h"
#include "sharding/process_mesh.h"

#include <span>
#include <string_view>
#include <vector>

namespace lowband {

/// Payload that one process sends, in the steps of `phase`, to update one parameter.
struct PlannedTransfer {
  std::string_view axis;  // "replica" or "within_replica"
  Purpose purpose = Purpose::kDense;
  Index bytes = 0;
  StepPhase phase = {};
};

/// Everything that the update of a parameter sends along the replica axis as factors or dense, and along
/// within_replica to bring matrices together, by the process at `position`: the formulas of
/// docs/what_is_counted.md. Of global shapes and options alone; `factor_ranks` by matrix (matrices_of), none
/// where the kind has none.
std::vector<PlannedTransfer> planned_transfers(const ParameterInfo& info, std::span<const Index> factor_ranks,
                                               const MeshShape& mesh, const MeshPosition& position,
                                               const OptimizerOptions& options, DType computed);

/// Payload bytes of one step.
struct StepBytes {
  Index factor = 0;  // replica axis, over the processes of one replica
  Index dense = 0;   // likewise
  Index update = 0;  // within_replica axis, as each of its processes counts them
  bool operator==(const StepBytes&) const = default;
};

/// What the steps of an optimizer send.
class PlannedTraffic {
 public:
  PlannedTraffic() = default;
  /// `factor_ranks`: by parameter, as of planned_transfers.
  PlannedTraffic(std::span<const ParameterInfo> parameters, std::span<const std::vector<Index>> factor_ranks,
                 const MeshShape& mesh, const OptimizerOptions& options, DType computed);

  StepBytes of(Index step) const;
  /// Mean of steps first .. last - 1, each rounded to the nearest byte.
  StepBytes mean(Index first, Index last) const;
  /// Steps after which what is sent repeats itself; 1 where all steps are alike.
  Index period() const;

 private:
  struct Line {
    StepPhase phase;
    StepBytes bytes;
  };
  StepBytes& line(StepPhase phase);

  std::vector<Line> lines_;
};

}  // namespace lowband
