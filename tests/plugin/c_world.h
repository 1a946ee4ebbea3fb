#pragma once

#include "plugin/lowband.h"

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace lowband::testing {

/// Throws std::runtime_error with the last error, unless `status` is LOWBAND_OK.
void expect_ok(lowband_status status);

/// Runs `body` as `processes` threads, each with a world of the C interface that meets through a callback,
/// and rethrows the first failure. A process that throws aborts its world.
void run_c_world(int processes, const std::function<void(lowband_world*)>& body);

/// An optimizer of the C interface that frees itself.
struct COptimizer {
  COptimizer(lowband_world* world, const std::vector<lowband_parameter>& parameters,
             const lowband_options& options);
  ~COptimizer() { lowband_optimizer_free(handle); }
  COptimizer(const COptimizer&) = delete;
  COptimizer& operator=(const COptimizer&) = delete;
  lowband_optimizer* handle = nullptr;
};

/// Bytes that this process sent in the last step, on the replica axis.
std::int64_t payload(const lowband_optimizer* optimizer, lowband_purpose purpose);

}  // namespace lowband::testing
