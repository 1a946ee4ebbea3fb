#include "launcher/replay/replay_arguments.h"

#include "runtime/error.h"
#include "trainer/config/presets.h"

#include <algorithm>
#include <array>
#include <cctype>

namespace lowband {
namespace {

/// The fields of a configuration that a replay reads, and what of the model profiles go by.
constexpr std::array<std::string_view, 10> kSections{"mesh",        "optimizer", "profile",   "schedule",
                                                     "diagnostics", "seed",      "precision", "device",
                                                     "determinism", "threads"};
constexpr std::array<std::string_view, 3> kFields{"collective_deadline_seconds", "model.width",
                                                  "model.head_dim"};

void expect_read(const std::string& assignment) {
  const std::string_view path = std::string_view(assignment).substr(0, assignment.find('='));
  const std::string_view section = path.substr(0, path.find('.'));
  LB_EXPECTS(std::ranges::find(kSections, section) != kSections.end() ||
                 std::ranges::find(kFields, path) != kFields.end(),
             "--set ", path,
             ": found a field that no replay reads, expected one of mesh, optimizer, profile, schedule, "
             "diagnostics, seed, precision, device, determinism, threads, collective_deadline_seconds, "
             "model.width or "
             "model.head_dim");
}

/// --config or --preset, then --optimizer, --profile and --set.
RunConfig take_config(Arguments& arguments, bool& has_model) {
  const std::string file = arguments.option("config");
  const std::string preset = arguments.option("preset");
  LB_EXPECTS(file.empty() || preset.empty(), "--config: found ", file, " beside --preset ", preset,
             ", expected one of them");
  RunConfig config;
  if (!file.empty()) config = load_run_config(file);
  if (!preset.empty()) config = parse_run_config(preset_text(preset), preset);
  has_model = config.has_model();
  LB_EXPECTS(has_model || (file.empty() && preset.empty()), "model: found nothing in ", file, preset,
             ", expected the configuration of the run that was recorded");
  std::string optimizer = arguments.option("optimizer");
  std::ranges::transform(optimizer, optimizer.begin(), [](unsigned char c) { return std::toupper(c); });
  if (!optimizer.empty()) apply_override(config, "optimizer.kind=" + optimizer);
  const std::string profile = arguments.option("profile");
  if (!profile.empty()) *config.mutable_profile() = parse_profile(profile);
  for (const std::string& assignment : arguments.options("set")) {
    expect_read(assignment);
    LB_EXPECTS(!has_model || !assignment.starts_with("model."), "--set ", assignment,
               ": found a field of the model, expected it in the configuration that was given");
    apply_override(config, assignment);
  }
  return config;
}

}  // namespace

ReplayRequest replay_request(Arguments& arguments) {
  ReplayRequest request;
  request.config = take_config(arguments, request.has_model);
  if (const std::string replicas = arguments.option("replicas"); !replicas.empty())
    request.config.mutable_mesh()->set_replica(count_of("--replicas", replicas));
  request.output = arguments.option("out");
  LB_EXPECTS(!request.output.empty(), "--out: found nothing, expected the folder that receives the weights");
  request.state = arguments.option("state");
  request.scalar_patterns = arguments.options("scalar-parameters");
  LB_EXPECTS(request.scalar_patterns.empty() || !request.has_model, "--scalar-parameters: found ",
             request.scalar_patterns.front(), ", expected none with a configuration, which knows");
  const auto words = arguments.positional();
  LB_EXPECTS(words.size() == 1, "replay: found ", words.size(),
             " folders, expected one of recorded gradients");
  request.folder = words.front();
  return request;
}

}  // namespace lowband
