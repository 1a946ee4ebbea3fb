#pragma once

#include "launcher/arguments.h"
#include "trainer/replay/replay.h"

#include <string>

namespace lowband {

/// Takes all arguments of `lowband replay` but those of `run_job`.
///
/// Throws: InvalidArgument naming the argument, and for a --set of a field that no replay reads; IoError for
/// a configuration that cannot be read.
ReplayRequest replay_request(Arguments& arguments);

/// A table for people: what was replayed, a line for every matrix, bytes.
std::string replay_table(const ReplaySummary& summary);

}  // namespace lowband
