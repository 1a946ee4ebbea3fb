#include "launcher/bench/options.h"

#include "launcher/run_config_arguments.h"
#include "runtime/error.h"

#include <charconv>
#include <sstream>

namespace lowband {
namespace {

std::vector<std::string> split_at(const std::string& text, char mark) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, mark);) parts.push_back(part);
  return parts;
}

std::string or_nothing(const std::string& text) { return text.empty() ? "nothing" : text; }

template <class Number>
Number number_of(const std::string& name, const std::string& text, Number lowest, Number highest) {
  Number number{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  LB_EXPECTS(
      error == std::errc() && end == text.data() + text.size() && number >= lowest && number <= highest, name,
      ": found ", or_nothing(text), ", expected a number from ", lowest, " to ", highest);
  return number;
}

constexpr Index kLargestCount = 1'000'000;
constexpr Index kLargestSize = Index{1} << 40;

/// "64M" in bytes.
Index size_of_text(const std::string& text) {
  std::string digits = text;
  Index unit = 1;
  constexpr std::string_view kUnits = "KMG";
  if (!digits.empty()) {
    const auto at = kUnits.find(digits.back());
    if (at != std::string_view::npos) {
      unit = Index{1} << (10 * (static_cast<Index>(at) + 1));
      digits.pop_back();
    }
  }
  return unit * number_of<Index>("--sizes", digits, 1, kLargestSize / unit);
}

std::vector<BenchWire> parse_wires(const std::string& text) {
  std::vector<BenchWire> wires;
  for (const std::string& name : split_at(text, ',')) {
    LB_EXPECTS(name == "f32" || name == "bf16", "--wire: found ", or_nothing(name),
               ", expected f32, bf16 or both with a comma");
    wires.push_back(name == "f32" ? BenchWire::kF32 : BenchWire::kBF16);
  }
  LB_EXPECTS(!wires.empty() && (wires.size() == 1 || (wires.size() == 2 && wires[0] != wires[1])),
             "--wire: found ", or_nothing(text), ", expected f32, bf16 or both with a comma");
  return wires;
}

/// The configuration's mesh says nothing here, and what it says must not be passed over.
void check_mesh(const RunConfig& config, int processes) {
  const RunConfig::Mesh& mesh = config.mesh();
  LB_EXPECTS(mesh.shard() == 1 && mesh.tensor() == 1, "mesh: found shard ", mesh.shard(), " x tensor ",
             mesh.tensor(), ", expected 1 x 1: in bench comm every process is a replica");
  LB_EXPECTS(!mesh.has_replica() || mesh.replica() == 1 || mesh.replica() == processes,
             "mesh.replica: found ", mesh.replica(), ", expected the ", processes, " processes of this job");
}

}  // namespace

std::string_view wire_name(BenchWire wire) { return wire == BenchWire::kBF16 ? "bf16" : "f32"; }

std::vector<Index> parse_sizes(const std::string& text) {
  const auto parts = split_at(text, ':');
  LB_EXPECTS(parts.size() == 2 || parts.size() == 3, "--sizes: found ", or_nothing(text),
             ", expected BEGIN:END or BEGIN:END:FACTOR, for example 8:64M:2");
  const Index begin = size_of_text(parts[0]);
  const Index end = size_of_text(parts[1]);
  const Index factor = parts.size() == 3 ? number_of<Index>("--sizes", parts[2], 2, 1024) : 2;
  LB_EXPECTS(begin <= end, "--sizes: found ", text, ", expected an end of at least the beginning");
  LB_EXPECTS(begin % 4 == 0, "--sizes: found ", parts[0], ", expected a multiple of 4 bytes");
  std::vector<Index> sizes;
  for (Index size = begin; size <= end; size *= factor) sizes.push_back(size);
  return sizes;
}

CommBenchOptions comm_bench_options(Arguments arguments, int processes) {
  CommBenchOptions options;
  options.json_to_output = arguments.flag("json");
  options.json_file = arguments.option("json");
  options.with_products = arguments.flag("with-products");
  options.picture = arguments.option("picture");
  for (const std::string ending : {".svg", ".png"}) {
    if (options.picture.ends_with(ending)) options.picture.resize(options.picture.size() - ending.size());
  }
  options.link = arguments.option("link");
  options.interface = arguments.option("interface");
  const std::string device = arguments.option("device", "cpu");
  LB_EXPECTS(device == "cpu" || device == "cuda", "--device: found ", device, ", expected cpu or cuda");
  options.on_device = device == "cuda";
  options.wires = parse_wires(arguments.option("wire", "f32,bf16"));
  options.warmup = number_of<Index>("--warmup", arguments.option("warmup", "5"), 0, kLargestCount);
  options.iterations =
      number_of<Index>("--iterations", arguments.option("iterations", "20"), 1, kLargestCount);
  options.base_iterations =
      number_of<Index>("--base-iterations", arguments.option("base-iterations", "5"), 0, kLargestCount);
  options.checks = number_of<Index>("--check", arguments.option("check", "1"), 0, kLargestCount);
  options.min_time_seconds = number_of<double>("--min-time", arguments.option("min-time", "0"), 0, 86400);
  const std::string sizes = arguments.option("sizes");
  if (!sizes.empty()) options.sizes = parse_sizes(sizes);

  const auto profiles = split_at(arguments.option("profile"), ',');
  const auto factor_ranks = split_at(arguments.option("ranks"), ',');
  const std::string preset = arguments.option("preset");
  Arguments rest = arguments;
  auto words = rest.options("set");
  const auto files = rest.positional();
  const bool has_model = !preset.empty() || !files.empty();
  if (!has_model && !options.sizes.empty() && profiles.empty() && factor_ranks.empty() && words.empty()) {
    LB_EXPECTS(options.picture.empty(),
               "--picture: found --sizes alone, expected a model: it shows exchanges");
    return options;
  }
  LB_EXPECTS(has_model,
             "bench comm: found no model, expected a configuration file or --preset NAME "
             "(lowband presets), or --sizes alone");

  std::vector<std::string> config_words{files};
  if (!preset.empty()) config_words.insert(config_words.end(), {"--preset", preset});
  for (const std::string& assignment : words) config_words.insert(config_words.end(), {"--set", assignment});
  Arguments config_arguments(config_words);
  RunConfig config = config_from(config_arguments);
  options.model = preset.empty() ? files.front() : preset;
  validate(config, mesh_shape(config).processes());
  check_mesh(config, processes);
  LB_EXPECTS(config.precision() != RunConfig::F64,
             "precision: found F64, expected F32: --wire says what is sent");
  options.on_device = options.on_device || config.device() == RunConfig::CUDA;
  options.threads = config.threads();
  options.deadline =
      std::chrono::milliseconds(static_cast<std::int64_t>(config.collective_deadline_seconds() * 1000));

  const ModelConfig model = model_config(config);
  const std::vector<ParameterInfo> parameters = parameter_table(model);
  std::vector<RunConfig::Profile> chosen;
  chosen.reserve(profiles.size() + factor_ranks.size());
  for (const std::string& text : profiles) chosen.push_back(parse_profile(text));
  for (const std::string& text : factor_ranks) {
    number_of<Index>("--ranks", text, 1, kLargestCount);
    chosen.push_back(parse_profile("uniform:" + text));
  }
  if (chosen.empty()) {
    LB_EXPECTS(config.optimizer().kind() == RunConfig::Optimizer::DION,
               "profile: found none, and the configuration has none, expected --profile or --ranks");
    chosen.push_back(config.profile());
  }
  options.profiles.reserve(chosen.size());
  for (const RunConfig::Profile& profile : chosen)
    options.profiles.push_back(rank_profile(profile, model, parameters));
  return options;
}

}  // namespace lowband
