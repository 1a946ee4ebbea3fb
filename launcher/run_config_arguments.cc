#include "launcher/run_config_arguments.h"

#include "runtime/error.h"
#include "trainer/config/presets.h"

namespace lowband {

RunConfig config_from(Arguments& arguments) {
  const std::string preset = arguments.option("preset");
  const std::string profile = arguments.option("profile");
  const auto overrides = arguments.options("set");
  const auto files = arguments.positional();
  LB_EXPECTS(files.size() + (preset.empty() ? 0u : 1u) == 1, "found ", files.size(), " configuration files",
             preset.empty() ? "" : " and a preset", ", expected one file or --preset NAME (lowband presets)");
  RunConfig config =
      preset.empty() ? load_run_config(files[0]) : parse_run_config(preset_text(preset), preset);
  if (!profile.empty()) *config.mutable_profile() = parse_profile(profile);
  for (const std::string& assignment : overrides) apply_override(config, assignment);
  return config;
}

}  // namespace lowband
