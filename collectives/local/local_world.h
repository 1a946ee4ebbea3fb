#pragma once

#include "collectives/communicator.h"

#include <chrono>
#include <functional>

namespace lowband {

struct LocalWorldOptions {
  /// Of each call on the communicators of this world.
  std::chrono::milliseconds deadline{20'000};
  /// Of the whole run: processes that wait for one another then are told to give up. Computing is not cut
  /// short.
  std::chrono::milliseconds total_deadline{300'000};
};

/// Runs `body` as `processes` processes, each a thread of this one with its own communicator, ledger and one
/// compute thread, and returns when all have ended.
///
/// Threads: a process may use different communicators from different threads of its own at once.
///
/// When one throws, the others get PeerFailed from whatever call they are in, and the first exception is
/// thrown again, of the same lowband type, its message preceded by "[process 2 of 4] ". Throws: also
/// PeerFailed, when the total deadline passes.
void run_world(int processes, const std::function<void(Communicator&)>& body,
               const LocalWorldOptions& options = {});

}  // namespace lowband
