#include "runtime/version.h"

namespace lowband {

std::string_view version() { return LOWBAND_VERSION; }

}  // namespace lowband
