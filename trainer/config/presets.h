#pragma once

#include <string_view>
#include <vector>

namespace lowband {

/// Names of the run configurations that come with the program, sorted.
std::vector<std::string_view> preset_names();

/// The configuration in text format, comments included.
///
/// Throws: InvalidArgument naming the presets there are.
std::string_view preset_text(std::string_view name);

}  // namespace lowband
