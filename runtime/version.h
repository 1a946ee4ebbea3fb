#pragma once

#include <string_view>

namespace lowband {

/// Version of lowband, "0.1.0".
std::string_view version();

}  // namespace lowband
