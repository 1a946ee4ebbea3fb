#pragma once

#include "runtime/types.h"
#include "trainer/config/run_config.pb.h"

namespace lowband {

/// Steps of the linear decay of a CONSTANT_LINEAR schedule: decay_steps, or decay_fraction of the steps
/// rounded to nearest.
Index linear_decay_steps(const RunConfig::Schedule& schedule);

/// Learning rate at `step` (0-based) relative to its peak.
///
/// Warm-up: (step + 1) / warmup_steps for step < warmup_steps. Then, with f = final_fraction,
/// COSINE: f + (1 - f) (1 + cos(pi p)) / 2, where p runs from 0 at warmup_steps to 1 at `steps`.
/// CONSTANT_LINEAR: 1 up to steps - linear_decay_steps, then along a straight line to f at `steps`.
/// The value at `steps` belongs to the end of the run: it is what a further step would get, and is the same
/// beyond.
///
/// Throws: InvalidArgument for a negative step.
double learning_rate_factor(const RunConfig::Schedule& schedule, Index step);

}  // namespace lowband
