#include "launcher/commands.h"
#include "runtime/error.h"
#include "trainer/config/presets.h"

#include <iostream>

namespace lowband {

int presets_command(Arguments arguments) {
  const auto names = arguments.positional();
  LB_EXPECTS(names.size() <= 1, "presets: found ", names.size(), " names, expected at most one");
  if (names.size() == 1) {
    std::cout << preset_text(names[0]);
    return 0;
  }
  for (const auto& name : preset_names()) std::cout << name << "\n";
  return 0;
}

}  // namespace lowband
