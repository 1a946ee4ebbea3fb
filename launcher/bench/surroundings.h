#pragma once

#include "collectives/communicator.h"
#include "launcher/bench/bench.pb.h"
#include "launcher/bench/options.h"

#include <string>

namespace lowband {

/// Everything of the report that is known before the first measurement. Collective.
void describe_surroundings(Communicator& world, const CommBenchOptions& options, BenchReport& report);

/// "2026-11-24T07:12:33Z"
std::string utc_now();

}  // namespace lowband
