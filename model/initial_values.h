#pragma once

#include "runtime/tensor.h"
#include "sharding/parameter.h"

#include <cstdint>

namespace lowband {

/// weight <- what a process of the tensor axis holds of a parameter's initial values: N(0, 0.02) keyed by
/// (seed, name, global element index), residual projections scaled by 1/sqrt(2 layers), norm gains 1.
template <class Real>
void draw_initial_values(const ParameterInfo& info, Index layers, std::uint64_t seed, int tensor_processes,
                         int tensor_process, MatrixView<Real> weight);

}  // namespace lowband
