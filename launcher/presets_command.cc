#include "launcher/commands.h"
#include "runtime/error.h"
#include "runtime/json.h"
#include "trainer/config/presets.h"

#include <iostream>

namespace lowband {

int presets_command(Arguments arguments) {
  const bool json = arguments.flag("json");
  const auto names = arguments.positional();
  LB_EXPECTS(names.size() <= 1, "presets: found ", names.size(), " names, expected at most one");
  if (names.size() == 1) {
    LB_EXPECTS(!json, "presets: found --json beside ", names[0], ", expected it without a name");
    std::cout << preset_text(names[0]);
    return 0;
  }
  std::string listed;
  for (const auto& name : preset_names())
    listed += json ? cat(listed.empty() ? "" : ",", json_string(name)) : cat(name, "\n");
  std::cout << (json ? "{\"presets\":[" + listed + "]}\n" : listed);
  return 0;
}

}  // namespace lowband
