#pragma once

#include "plugin/lowband.h"

#include <functional>
#include <stdexcept>
#include <string>

namespace lowband::testing {

/// Throws std::runtime_error with the last error, unless `status` is LOWBAND_OK.
void expect_ok(lowband_status status);

/// Runs `body` as `processes` threads, each with a world of the C interface that meets through a callback,
/// and rethrows the first failure. A process that throws aborts its world.
void run_c_world(int processes, const std::function<void(lowband_world*)>& body);

}  // namespace lowband::testing
