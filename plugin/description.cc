#include "plugin/description.h"

#include "plugin/boundary.h"

#include <algorithm>
#include <array>
#include <set>

namespace lowband::plugin {
namespace {

constexpr std::array kRoleNames{"query", "key",    "value",     "output", "gate", "up",
                                "down",  "matrix", "embedding", "head",   "norm"};
constexpr std::array kCutNames{"uncut", "rows cut", "columns cut"};
constexpr std::array kKindNames{"dion",   "power_sgd", "adamw",    "sgd",    "lion",    "muon",    "normuon",
                                "muonbp", "dion2",     "nordion2", "specgd", "spectra", "acp_sgd", "galore"};
constexpr std::array kKinds{OptimizerKind::kDion,     OptimizerKind::kPowerSgd, OptimizerKind::kAdamW,
                            OptimizerKind::kSgd,      OptimizerKind::kLion,     OptimizerKind::kMuon,
                            OptimizerKind::kNorMuon,  OptimizerKind::kMuonBp,   OptimizerKind::kDion2,
                            OptimizerKind::kNorDion2, OptimizerKind::kSpecGd,   OptimizerKind::kSpectra,
                            OptimizerKind::kAcpSgd,   OptimizerKind::kGalore};
constexpr std::array kSignNames{"newton_schulz_5", "polar_express_5", "polar_express_8"};
constexpr std::array kScaleNames{"rms_to_rms", "adam_rms", "shape", "none"};
constexpr std::array kProfileNames{"uniform", "structural", "inverted", "fraction", "explicit"};
constexpr std::array kExchangeNames{"factors", "dense", "fewer"};

// A caller in C can put any number into an enum.
template <std::size_t kCount>
std::size_t checked(int value, const std::array<const char*, kCount>& names, std::string_view field) {
  LB_EXPECTS(value >= 0 && value < static_cast<int>(kCount), field, ": found ", value, ", expected 0 (",
             names.front(), ") .. ", kCount - 1, " (", names.back(), ")");
  return static_cast<std::size_t>(value);
}

bool is_matrix(std::int32_t role) { return role <= LOWBAND_MATRIX; }

// A matrix without a better name is an up projection: the roles of layer matrices differ in structural and
// inverted profiles only, which rank_profile refuses for it.
Role role_of(std::int32_t role) {
  constexpr std::array kRoles{Role::kQuery,     Role::kKey,  Role::kValue, Role::kOutput,
                              Role::kGate,      Role::kUp,   Role::kDown,  Role::kUp,
                              Role::kEmbedding, Role::kHead, Role::kNorm};
  return kRoles[static_cast<std::size_t>(role)];
}

std::string field_of(std::size_t i, const char* name) {
  return cat("parameters[", i, "]", name != nullptr ? cat(" ", name) : "");
}

std::span<const lowband_block> blocks_of(const lowband_parameter& parameter) {
  return {parameter.blocks, static_cast<std::size_t>(parameter.block_count)};
}

// Block after block gets its lines, by turns.
ParameterBlocks parameter_blocks(const lowband_parameter& parameter, const std::string& field) {
  LB_EXPECTS(parameter.block_count >= 0, field, ".block_count: found ", parameter.block_count,
             ", expected at least 0");
  ParameterBlocks blocks{.of_rows = parameter.blocks_of_columns == 0};
  if (parameter.block_count == 0) return blocks;
  LB_EXPECTS(is_matrix(parameter.role), field, ".blocks: found ", parameter.block_count,
             " of a parameter that is no matrix, expected none");
  expect_pointer(parameter.blocks, field + ".blocks");
  Index turn = 0;
  for (const lowband_block& block : blocks_of(parameter)) {
    const std::string field_of_block = cat(field, ".blocks[", blocks.roles.size(), "]");
    checked(block.role, kRoleNames, field_of_block + ".role");
    LB_EXPECTS(is_matrix(block.role), field_of_block, ".role: found ",
               kRoleNames[static_cast<std::size_t>(block.role)], ", expected 0 (query) .. 7 (matrix)");
    LB_EXPECTS(block.lines >= 1, field_of_block, ".lines: found ", block.lines, ", expected at least 1");
    blocks.roles.push_back(role_of(block.role));
    turn += block.lines;
  }
  const Index extent = blocks.of_rows ? parameter.rows : parameter.cols;
  LB_EXPECTS(turn <= extent && extent % turn == 0, field, ".blocks: found ", turn, " lines in all, expected ",
             extent, blocks.of_rows ? " rows" : " columns", " or a divisor of it");
  blocks.ranges.resize(blocks.roles.size());
  for (Index begin = 0; begin < extent;) {
    for (std::size_t j = 0; j < blocks.ranges.size(); ++j) {
      const Index end = begin + parameter.blocks[j].lines;
      blocks.ranges[j].push_back({begin, end});
      begin = end;
    }
  }
  return blocks;
}

ParameterInfo info_of(const lowband_parameter& parameter, std::size_t i) {
  const std::string field = field_of(i, parameter.name);
  LB_EXPECTS(parameter.name != nullptr && *parameter.name != '\0', field,
             ".name: found nothing, expected a unique name");
  checked(parameter.role, kRoleNames, field + ".role");
  checked(parameter.cut, kCutNames, field + ".cut");
  LB_EXPECTS(parameter.rows >= 1, field, ".rows: found ", parameter.rows, ", expected at least 1");
  LB_EXPECTS(parameter.cols >= 1, field, ".cols: found ", parameter.cols, ", expected at least 1");
  LB_EXPECTS(!(parameter.cut == LOWBAND_CUT_ROWS && parameter.rows == 1), field,
             ".cut: found LOWBAND_CUT_ROWS for a vector, expected LOWBAND_UNCUT or LOWBAND_CUT_COLS");
  return {.name = parameter.name,
          .role = role_of(parameter.role),
          .rows = parameter.rows,
          .cols = parameter.cols,
          .cut = static_cast<TensorCut>(parameter.cut),
          .blocks = parameter_blocks(parameter, field)};
}

ProfileSpec profile_spec(const lowband_options& options, std::span<const lowband_parameter> parameters,
                         std::span<const ParameterInfo> infos) {
  ProfileSpec spec;
  spec.kind = static_cast<ProfileSpec::Kind>(checked(options.profile, kProfileNames, "options.profile"));
  spec.uniform_rank = options.uniform_rank;
  spec.width = options.width;
  spec.head_dim = options.head_dim;
  spec.scale = options.scale;
  spec.fraction_numerator = options.fraction_numerator;
  spec.fraction_denominator = options.fraction_denominator;
  const bool by_role = options.profile == LOWBAND_STRUCTURAL || options.profile == LOWBAND_INVERTED;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const lowband_parameter& parameter = parameters[i];
    const auto add = [&](const std::string& field, const std::string& name, std::int32_t role,
                         Index factor_rank) {
      LB_EXPECTS(
          !(by_role && role == LOWBAND_MATRIX), field,
          ".role: found matrix with a profile by role, expected query, key, value, output, gate, up or down");
      const bool names_rank = options.profile == LOWBAND_EXPLICIT && is_matrix(role);
      LB_EXPECTS(names_rank || factor_rank == 0, field, ".factor_rank: found ", factor_rank,
                 ", expected 0 unless it is a matrix and options.profile is explicit");
      if (names_rank) spec.explicit_ranks[name] = factor_rank;
    };
    const std::string field = field_of(i, parameter.name);
    const std::vector<ParameterInfo> matrices = matrices_of(infos[i]);
    if (parameter.block_count == 0) add(field, parameter.name, parameter.role, parameter.factor_rank);
    LB_EXPECTS(parameter.block_count == 0 || parameter.factor_rank == 0, field, ".factor_rank: found ",
               parameter.factor_rank, ", expected 0 beside blocks, which have their own");
    for (std::size_t j = 0; j < blocks_of(parameter).size(); ++j)
      add(cat(field, ".blocks[", j, "]"), matrices[j].name, parameter.blocks[j].role,
          parameter.blocks[j].factor_rank);
  }
  return spec;
}

ElementwiseKind elementwise_kind(std::int32_t kind) {
  switch (kind) {
    case LOWBAND_ADAMW:
      return ElementwiseKind::kAdamW;
    case LOWBAND_SGD:
      return ElementwiseKind::kSgd;
    case LOWBAND_LION:
      return ElementwiseKind::kLion;
    default:
      throw InvalidArgument(
          cat("options.scalar_kind: found ", kind, ", expected 2 (adamw), 3 (sgd) or 4 (lion)"));
  }
}

}  // namespace

MeshShape mesh_shape(const lowband_options& options, int processes) {
  MeshShape shape{
      .replica = options.mesh_replica, .shard = options.mesh_shard, .tensor = options.mesh_tensor};
  if (shape.replica == 0) {
    shape.replica = 1;
    validate(shape);
    shape.replica = std::max(1, processes / shape.processes());
  }
  validate(shape, processes);
  return shape;
}

OptimizerOptions optimizer_options(const lowband_options& options) {
  OptimizerOptions own;
  own.kind = kKinds[checked(options.kind, kKindNames, "options.kind")];
  own.scalar_optimizer = elementwise_kind(options.scalar_kind);
  own.mu = options.mu;
  own.lambda = options.lambda;
  own.residual = options.aggregated_residual != 0 ? Residual::kAggregated : Residual::kLocal;
  own.weight_decay = options.weight_decay;
  own.adamw_beta1 = options.adamw_beta1;
  own.adamw_beta2 = options.adamw_beta2;
  own.adamw_epsilon = options.adamw_epsilon;
  own.sgd_momentum = options.sgd_momentum;
  own.sgd_nesterov = options.sgd_nesterov != 0;
  own.lion_beta1 = options.lion_beta1;
  own.lion_beta2 = options.lion_beta2;
  own.clip_norm = options.clip_norm;
  own.clip_estimator = options.clip_by_true_norm != 0 ? NormEstimator::kTrueNorm : NormEstimator::kSketch;
  own.exchange = static_cast<ExchangeChoice>(checked(options.exchange, kExchangeNames, "options.exchange"));
  own.wire = options.bf16_factors != 0 ? FactorWire::kBF16 : FactorWire::kAsComputed;
  own.overlap = options.overlap != 0;
  own.bucket_elements = options.bucket_elements;
  own.seed = options.seed;
  own.sign = static_cast<SignPolynomial>(checked(options.sign, kSignNames, "options.sign"));
  own.update_scale =
      static_cast<UpdateScale>(checked(options.update_scale, kScaleNames, "options.update_scale"));
  own.nesterov = options.nesterov != 0;
  own.normuon_beta2 = options.normuon_beta2;
  own.muonbp_period = options.muonbp_period;
  own.muonbp_block_rate = options.muonbp_block_rate;
  own.dion2_numerator = options.dion2_numerator;
  own.dion2_denominator = options.dion2_denominator;
  own.dion2_selection = options.dion2_random != 0 ? SliceSelection::kRandom : SliceSelection::kLargest;
  own.spectra_fraction = options.spectra_fraction;
  own.spectra_iterations = options.spectra_iterations;
  own.galore_scale = options.galore_scale;
  own.galore_interval = options.galore_interval;
  validate(own);
  LB_EXPECTS(options.dtype == LOWBAND_F32 || options.dtype == LOWBAND_F64, "options.dtype: found ",
             options.dtype, ", expected 0 (float32) or 1 (float64)");
  LB_EXPECTS(own.wire == FactorWire::kAsComputed || options.dtype == LOWBAND_F32,
             "options.bf16_factors: found it with float64, expected float32 weights");
  return own;
}

std::vector<ParameterInfo> parameter_infos(std::span<const lowband_parameter> parameters) {
  LB_EXPECTS(!parameters.empty(), "parameters: found none, expected at least one");
  std::vector<ParameterInfo> infos;
  std::set<std::string> names;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    infos.push_back(info_of(parameters[i], i));
    LB_EXPECTS(names.insert(infos.back().name).second, field_of(i, parameters[i].name),
               ".name: found it again, expected unique names");
  }
  return infos;
}

RankProfile rank_profile(const lowband_options& options, std::span<const lowband_parameter> parameters,
                         std::span<const ParameterInfo> infos) {
  if (!exchanges_factors(kKinds[static_cast<std::size_t>(options.kind)])) return {};
  return make_profile(profile_spec(options, parameters, infos), infos);
}

std::vector<std::string> facts(const lowband_options& options,
                               std::span<const lowband_parameter> parameters) {
  std::vector<std::string> lines;
  const auto add = [&](std::string_view name, const auto& value) {
    lines.push_back(cat("options.", name, ": ", value));
  };
  add("dtype", options.dtype == LOWBAND_F32 ? "float32" : "float64");
  add("mesh_replica", options.mesh_replica);
  add("mesh_shard", options.mesh_shard);
  add("mesh_tensor", options.mesh_tensor);
  add("kind", kKindNames[static_cast<std::size_t>(options.kind)]);
  add("mu", options.mu);
  add("lambda", options.lambda);
  add("weight_decay", options.weight_decay);
  add("adamw_beta1", options.adamw_beta1);
  add("adamw_beta2", options.adamw_beta2);
  add("adamw_epsilon", options.adamw_epsilon);
  add("scalar_kind", kKindNames[static_cast<std::size_t>(options.scalar_kind)]);
  add("sgd_momentum", options.sgd_momentum);
  add("sgd_nesterov", options.sgd_nesterov != 0);
  add("lion_beta1", options.lion_beta1);
  add("lion_beta2", options.lion_beta2);
  add("clip_norm", options.clip_norm);
  add("clip_by_true_norm", options.clip_by_true_norm != 0);
  add("aggregated_residual", options.aggregated_residual != 0);
  add("bf16_factors", options.bf16_factors != 0);
  add("overlap", options.overlap != 0);
  add("bucket_elements", options.bucket_elements);
  add("seed", options.seed);
  add("exchange", kExchangeNames[static_cast<std::size_t>(options.exchange)]);
  add("profile", kProfileNames[static_cast<std::size_t>(options.profile)]);
  add("uniform_rank", options.uniform_rank);
  add("width", options.width);
  add("head_dim", options.head_dim);
  add("scale", options.scale);
  add("fraction", cat(options.fraction_numerator, "/", options.fraction_denominator));
  add("budget_bytes", options.budget_bytes);
  add("device", options.device >= 0 ? "a CUDA device" : "-1");
  add("sign", kSignNames[static_cast<std::size_t>(options.sign)]);
  add("update_scale", kScaleNames[static_cast<std::size_t>(options.update_scale)]);
  add("nesterov", options.nesterov != 0);
  add("normuon_beta2", options.normuon_beta2);
  add("muonbp_period", options.muonbp_period);
  add("muonbp_block_rate", options.muonbp_block_rate);
  add("dion2", cat(options.dion2_numerator, "/", options.dion2_denominator));
  add("dion2_random", options.dion2_random != 0);
  add("spectra_fraction", options.spectra_fraction);
  add("spectra_iterations", options.spectra_iterations);
  add("galore_scale", options.galore_scale);
  add("galore_interval", options.galore_interval);
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const lowband_parameter& parameter = parameters[i];
    lines.push_back(cat(field_of(i, parameter.name), ": ",
                        kRoleNames[static_cast<std::size_t>(parameter.role)], ", ", parameter.rows, " x ",
                        parameter.cols, ", ", kCutNames[static_cast<std::size_t>(parameter.cut)],
                        parameter.factor_rank != 0 ? cat(", factor rank ", parameter.factor_rank) : ""));
    for (const lowband_block& block : blocks_of(parameter))
      lines.back() += cat(&block == parameter.blocks ? "; " : ", ", block.lines,
                          parameter.blocks_of_columns != 0 ? " columns " : " rows ",
                          kRoleNames[static_cast<std::size_t>(block.role)],
                          block.factor_rank != 0 ? cat(" of factor rank ", block.factor_rank) : "");
  }
  return lines;
}

template <class Real>
std::vector<Parameter<Real>> bound_parameters(std::span<const lowband_parameter> parameters,
                                              std::span<const ParameterInfo> infos, const MeshShape& mesh,
                                              const MeshPosition& position, Device* device) {
  std::vector<Parameter<Real>> bound;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const ParameterInfo& info = infos[i];
    expect_pointer(parameters[i].weight, field_of(i, parameters[i].name) + ".weight");
    expect_pointer(parameters[i].gradient, field_of(i, parameters[i].name) + ".gradient");
    const MatrixLayout layout(info.rows, info.cols, info.cut, mesh.tensor, mesh.shard);
    const Index rows = layout.tensor_rows(position.tensor).size();
    const Index cols = layout.tensor_cols(position.tensor).size();
    expect_place(parameters[i].weight, rows * cols, device, field_of(i, parameters[i].name) + ".weight");
    expect_place(parameters[i].gradient, rows * cols, device, field_of(i, parameters[i].name) + ".gradient");
    bound.push_back({info,
                     {static_cast<Real*>(parameters[i].weight), rows, cols, cols, device},
                     {static_cast<Real*>(parameters[i].gradient), rows, cols, cols, device}});
  }
  return bound;
}

template std::vector<Parameter<float>> bound_parameters(std::span<const lowband_parameter>,
                                                        std::span<const ParameterInfo>, const MeshShape&,
                                                        const MeshPosition&, Device*);
template std::vector<Parameter<double>> bound_parameters(std::span<const lowband_parameter>,
                                                         std::span<const ParameterInfo>, const MeshShape&,
                                                         const MeshPosition&, Device*);

void expect_place(const void* memory, Index elements, const Device* device, std::string_view field) {
  LB_EXPECTS(device == nullptr || elements == 0 || device->holds(memory), field,
             ": found an address of other memory, expected one of ", place_name(device));
}

}  // namespace lowband::plugin
