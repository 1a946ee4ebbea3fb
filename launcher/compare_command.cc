#include "launcher/commands.h"
#include "launcher/compare/compare_runs.h"
#include "launcher/compare/loss_curves.h"
#include "runtime/error.h"
#include "runtime/json.h"

#include <filesystem>
#include <iostream>
#include <vector>

namespace lowband {

int compare_command(Arguments arguments) {
  const bool json = arguments.flag("json");
  const std::string picture = arguments.option("picture");
  const auto words = arguments.positional();
  const std::vector<std::filesystem::path> runs(words.begin(), words.end());
  const Comparison comparison = compare_runs(runs);
  std::cout << (json ? to_json(comparison) + "\n" : comparison_table(comparison));
  if (!picture.empty()) {
    draw_loss_curves(runs, picture);
    if (!json) std::cout << "loss curves: " << picture << ".png, .svg, .csv\n";
  }
  return 0;
}

}  // namespace lowband
