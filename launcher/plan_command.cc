#include "launcher/commands.h"
#include "launcher/plan/plan.h"
#include "launcher/run_config_arguments.h"
#include "runtime/error.h"
#include "runtime/json.h"

#include <algorithm>
#include <iostream>
#include <sstream>
#include <vector>

namespace lowband {
namespace {

std::vector<std::string> split_at_commas(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

}  // namespace

int plan_command(Arguments arguments) {
  const bool json = arguments.flag("json");
  const std::string reference = arguments.option("reference");
  const auto profiles = split_at_commas(arguments.option("profile"));
  RunConfig config = config_from(arguments);
  // Without --profile, the configuration's own; otherwise each of those named, one plan after the other.
  for (std::size_t i = 0; i < std::max<std::size_t>(1, profiles.size()); ++i) {
    if (!profiles.empty()) *config.mutable_profile() = parse_profile(profiles[i]);
    LB_EXPECTS(reference.empty() || has_factor_ranks(config), "--reference: found ", reference,
               ", expected none with optimizer.kind ",
               RunConfig::Optimizer::Kind_Name(config.optimizer().kind()), ", which has no factor ranks");
    const PlanReport report = make_plan(config, parse_profile(reference.empty() ? "structural" : reference));
    std::cout << (json ? to_json(report) + "\n" : (i > 0 ? "\n" : "") + plan_table(report));
  }
  return 0;
}

}  // namespace lowband
