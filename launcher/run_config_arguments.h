#pragma once

#include "launcher/arguments.h"
#include "trainer/config/run_config.h"

namespace lowband {

/// Takes CONFIG or --preset NAME, then --profile and --set in that order, out of the arguments.
///
/// Throws: InvalidArgument, IoError.
RunConfig config_from(Arguments& arguments);

}  // namespace lowband
