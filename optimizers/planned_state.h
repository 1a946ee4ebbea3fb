#pragma once

#include "optimizers/options.h"
#include "sharding/parameter.h"
#include "sharding/process_mesh.h"

#include <span>
#include <string_view>
#include <vector>

namespace lowband {

/// A persistent piece of state that a parameter has under an optimizer.
struct StateLetter {
  std::string_view letter;  // of "<parameter>.<letter>" in Optimizer::state()
  Index factor_cols = 0;    // of a factor, its rank
};

/// Of each matrix of a parameter (matrices_of), `factor_rank` being 0 where the kind has none; of what is no
/// layer matrix for itself.
std::vector<StateLetter> state_letters(const ParameterInfo& matrix, Index factor_rank,
                                       const OptimizerOptions& options);

/// Elements of persistent state of a parameter on the process at `position`: its pieces as state_place has
/// them. Of global shapes and options alone; `factor_ranks` by matrix, none where the kind has none.
Index planned_state_elements(const ParameterInfo& info, std::span<const Index> factor_ranks,
                             const MeshShape& mesh, const MeshPosition& position,
                             const OptimizerOptions& options);

}  // namespace lowband
