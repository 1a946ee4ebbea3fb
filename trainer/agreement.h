#pragma once

#include "collectives/communicator.h"

#include <functional>

namespace lowband {

/// Runs `action` on every process and lets all of them fail together: when it throws InvalidArgument or
/// IoError anywhere, every process throws the error of the lowest process concerned. Its message says which
/// one
/// ("process 2: ..."), unless all of them failed. std::filesystem's errors become IoError.
///
/// Collective: all processes of `group`. `action` itself must not communicate. Other exceptions leave at
/// once.
void run_agreed(Communicator& group, const std::function<void()>& action);

}  // namespace lowband
