#pragma once

#include "optimizers/options.h"
#include "sharding/parameter.h"
#include "sharding/process_mesh.h"

#include <string_view>
#include <vector>

namespace lowband {

/// A persistent piece of state that a parameter has under an optimizer.
struct StateLetter {
  std::string_view letter;  // of "<parameter>.<letter>" in Optimizer::state()
  Index factor_cols = 0;    // of a factor, its rank
};

/// `factor_rank` is 0 where the kind has none.
std::vector<StateLetter> state_letters(const ParameterInfo& info, Index factor_rank,
                                       const OptimizerOptions& options);

/// Elements of persistent state of a parameter on the process at `position`: its pieces as state_place has
/// them. Of global shapes and options alone.
Index planned_state_elements(const ParameterInfo& info, Index factor_rank, const MeshShape& mesh,
                             const MeshPosition& position, const OptimizerOptions& options);

}  // namespace lowband
