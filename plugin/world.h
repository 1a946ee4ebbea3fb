#pragma once

#include "collectives/communicator.h"
#include "collectives/mpi/mpi_world.h"
#include "collectives/ucx/ucx_world.h"
#include "plugin/boundary.h"

#include <memory>
#include <optional>

/// What `lowband_world` points at. Members end in reverse order: the communicator before what carries it.
struct lowband_world {
  std::optional<lowband::MpiWorld> mpi;
  std::optional<lowband::UcxWorld> ucx;
  std::unique_ptr<lowband::Communicator> communicator;
  bool has_optimizer = false;
  bool broken = false;  // by an abort, or by a call that failed on its way
};

namespace lowband::plugin {

/// As `guarded`, for calls in which processes wait for one another: when they end in anything but a refusal,
/// `world` is broken.
template <class Body>
lowband_status guarded_collective(lowband_world& world, Body body) noexcept {
  const lowband_status status = guarded(body);
  if (status != LOWBAND_OK && status != LOWBAND_INVALID_ARGUMENT && status != LOWBAND_BUDGET_EXCEEDED)
    world.broken = true;
  return status;
}

}  // namespace lowband::plugin
