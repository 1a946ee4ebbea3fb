#include "trainer/config/run_config.h"

#include <algorithm>
#include <cmath>

namespace lowband {

ModelConfig model_config(const RunConfig& config) {
  const RunConfig::Model& model = config.model();
  return {.vocabulary = model.vocabulary(),
          .width = model.width(),
          .layers = model.layers(),
          .heads = model.heads(),
          .kv_heads = model.has_kv_heads() ? model.kv_heads() : model.heads(),
          .head_dim = model.has_head_dim() ? model.head_dim() : model.width() / model.heads(),
          .ffn_width = model.ffn_width(),
          .sequence = model.sequence(),
          .rope_base = model.rope_base(),
          .norm_epsilon = model.norm_epsilon(),
          .tied_head = model.tied_head()};
}

MeshShape mesh_shape(const RunConfig& config) {
  return {
      .replica = config.mesh().replica(), .shard = config.mesh().shard(), .tensor = config.mesh().tensor()};
}

DType computed_dtype(const RunConfig& config) {
  return config.precision() == RunConfig::F64 ? DType::kF64 : DType::kF32;
}
DType products_dtype(const RunConfig& config) {
  return config.precision() == RunConfig::BF16 ? DType::kBF16 : computed_dtype(config);
}

DeviceModelOptions device_model_options(const RunConfig& config) {
  return {.products = products_dtype(config),
          .recompute_activations = config.recompute_activations(),
          .measured_plans = config.determinism() == RunConfig::FAST};
}

namespace {

OptimizerKind optimizer_kind(RunConfig::Optimizer::Kind kind) {
  switch (kind) {
    case RunConfig::Optimizer::DION:
      return OptimizerKind::kDion;
    case RunConfig::Optimizer::ADAMW:
      return OptimizerKind::kAdamW;
    case RunConfig::Optimizer::POWERSGD:
      return OptimizerKind::kPowerSgd;
    case RunConfig::Optimizer::SGD:
      return OptimizerKind::kSgd;
    case RunConfig::Optimizer::LION:
      return OptimizerKind::kLion;
    case RunConfig::Optimizer::MUON:
      return OptimizerKind::kMuon;
    case RunConfig::Optimizer::NORMUON:
      return OptimizerKind::kNorMuon;
    case RunConfig::Optimizer::MUONBP:
      return OptimizerKind::kMuonBp;
    case RunConfig::Optimizer::DION2:
      return OptimizerKind::kDion2;
    case RunConfig::Optimizer::NORDION2:
      return OptimizerKind::kNorDion2;
    case RunConfig::Optimizer::SPECGD:
      return OptimizerKind::kSpecGd;
    case RunConfig::Optimizer::ACPSGD:
      return OptimizerKind::kAcpSgd;
    case RunConfig::Optimizer::GALORE:
      return OptimizerKind::kGalore;
    case RunConfig::Optimizer::SPECTRA:
      return OptimizerKind::kSpectra;
  }
  throw InvalidArgument(cat("optimizer.kind: found ", static_cast<int>(kind)));
}

ElementwiseKind scalar_optimizer(RunConfig::Optimizer::Kind kind) {
  switch (kind) {
    case RunConfig::Optimizer::ADAMW:
      return ElementwiseKind::kAdamW;
    case RunConfig::Optimizer::SGD:
      return ElementwiseKind::kSgd;
    case RunConfig::Optimizer::LION:
      return ElementwiseKind::kLion;
    default:
      throw InvalidArgument(cat("optimizer.scalar_optimizer: found ", RunConfig::Optimizer::Kind_Name(kind),
                                ", expected ADAMW, LION or SGD"));
  }
}

SignPolynomial sign_polynomial(RunConfig::Optimizer::Sign sign) {
  switch (sign) {
    case RunConfig::Optimizer::NEWTON_SCHULZ_5:
      return SignPolynomial::kNewtonSchulz5;
    case RunConfig::Optimizer::POLAR_EXPRESS_5:
      return SignPolynomial::kPolarExpress5;
    case RunConfig::Optimizer::POLAR_EXPRESS_8:
      return SignPolynomial::kPolarExpress8;
  }
  throw InvalidArgument(cat("optimizer.sign: found ", static_cast<int>(sign)));
}

UpdateScale update_scale_of(RunConfig::Optimizer::UpdateScale scale) {
  switch (scale) {
    case RunConfig::Optimizer::RMS_TO_RMS:
      return UpdateScale::kRmsToRms;
    case RunConfig::Optimizer::ADAM_RMS:
      return UpdateScale::kAdamRms;
    case RunConfig::Optimizer::SHAPE:
      return UpdateScale::kShape;
    case RunConfig::Optimizer::NONE:
      return UpdateScale::kNone;
  }
  throw InvalidArgument(cat("optimizer.update_scale: found ", static_cast<int>(scale)));
}

ExchangeChoice exchange_choice(RunConfig::Optimizer::Exchange exchange) {
  switch (exchange) {
    case RunConfig::Optimizer::FACTORS:
      return ExchangeChoice::kFactors;
    case RunConfig::Optimizer::DENSE:
      return ExchangeChoice::kDense;
    case RunConfig::Optimizer::AUTO:
      return ExchangeChoice::kAuto;
  }
  throw InvalidArgument(cat("optimizer.exchange: found ", static_cast<int>(exchange)));
}

/// 0 where a replay knows no model.
Index head_dim(const RunConfig& config) {
  const RunConfig::Model& model = config.model();
  if (model.has_head_dim()) return model.head_dim();
  return model.heads() > 0 ? model.width() / model.heads() : 0;
}

Index bucket_elements(const RunConfig& config) {
  constexpr double kMiB = 1 << 20;
  const double bytes = config.optimizer().bucket_mib() * kMiB;
  return std::max(Index{1},
                  static_cast<Index>(bytes / static_cast<double>(dtype_bytes(computed_dtype(config)))));
}

}  // namespace

OptimizerOptions optimizer_options(const RunConfig& config) {
  using Optimizer = RunConfig::Optimizer;
  const Optimizer& optimizer = config.optimizer();
  return {
      .kind = optimizer_kind(optimizer.kind()),
      .mu = optimizer.mu(),
      .lambda = optimizer.powersgd_momentum(),
      .nesterov = optimizer.nesterov(),
      .sign = sign_polynomial(optimizer.sign()),
      .update_scale = update_scale_of(optimizer.update_scale()),
      .normuon_beta2 = optimizer.normuon_beta2(),
      .muonbp_period = optimizer.has_muonbp_period() ? optimizer.muonbp_period() : 1,
      .muonbp_block_rate = optimizer.has_muonbp_block_learning_rate()
                               ? optimizer.muonbp_block_learning_rate() / optimizer.learning_rate()
                               : 1,
      .dion2_numerator = optimizer.dion2_numerator(),
      .dion2_denominator = optimizer.dion2_denominator(),
      .dion2_selection = optimizer.dion2_selection() == Optimizer::RANDOM ? SliceSelection::kRandom
                                                                          : SliceSelection::kLargest,
      .spectra_fraction = optimizer.spectra_fraction(),
      .spectra_iterations = optimizer.spectra_iterations(),
      .galore_scale = optimizer.galore_scale(),
      .galore_interval = optimizer.galore_interval(),
      .residual = optimizer.residual() == Optimizer::AGGREGATED ? Residual::kAggregated : Residual::kLocal,
      .weight_decay = optimizer.weight_decay(),
      .scalar_optimizer = scalar_optimizer(optimizer.scalar_optimizer()),
      .adamw_beta1 = optimizer.adamw_beta1(),
      .adamw_beta2 = optimizer.adamw_beta2(),
      .adamw_epsilon = optimizer.adamw_epsilon(),
      .sgd_momentum = optimizer.sgd_momentum(),
      .sgd_nesterov = optimizer.sgd_nesterov(),
      .lion_beta1 = optimizer.lion_beta1(),
      .lion_beta2 = optimizer.lion_beta2(),
      .clip_norm = optimizer.clip_norm(),
      .clip_estimator = optimizer.clip_estimator() == Optimizer::TRUE_NORM ? NormEstimator::kTrueNorm
                                                                           : NormEstimator::kSketch,
      .exchange = exchange_choice(optimizer.exchange()),
      .wire = optimizer.wire() == Optimizer::BF16 ? FactorWire::kBF16 : FactorWire::kAsComputed,
      .overlap = optimizer.overlap(),
      .bucket_elements = bucket_elements(config),
      .seed = config.seed()};
}

ParameterInfo with_blocks(const RunConfig& config, ParameterInfo info) {
  if (config.optimizer().blocks() != RunConfig::Optimizer::PER_HEAD) return info;
  return with_heads(std::move(info), head_dim(config));
}

std::vector<ParameterInfo> parameter_table(const RunConfig& config) {
  std::vector<ParameterInfo> table = parameter_table(model_config(config));
  for (ParameterInfo& info : table) info = with_blocks(config, std::move(info));
  return table;
}

bool has_factor_ranks(const RunConfig& config) {
  return exchanges_factors(optimizer_kind(config.optimizer().kind()));
}

ReplicaTraffic replica_traffic(const RunConfig& config) {
  return replica_traffic(optimizer_options(config), computed_dtype(config));
}

Determinism determinism(const RunConfig& config) {
  switch (config.determinism()) {
    case RunConfig::FAST:
      return Determinism::kFast;
    case RunConfig::PINNED:
      return Determinism::kPinned;
    case RunConfig::EXACT:
      return Determinism::kExact;
  }
  throw InvalidArgument(cat("determinism: found ", static_cast<int>(config.determinism())));
}

double scalar_learning_rate(const RunConfig& config) {
  const RunConfig::Optimizer& optimizer = config.optimizer();
  return optimizer.has_scalar_learning_rate() ? optimizer.scalar_learning_rate() : optimizer.learning_rate();
}

namespace {

Index sequences_per_process(const RunConfig& config) {
  const MeshShape mesh = mesh_shape(config);
  return config.batch().sequences_per_step() / (Index{mesh.replica} * mesh.shard);
}

ProfileSpec profile_spec(const RunConfig::Profile& profile, const ModelConfig& model) {
  using Profile = RunConfig::Profile;
  switch (profile.kind()) {
    case Profile::UNIFORM:
      return {.kind = ProfileSpec::Kind::kUniform, .uniform_rank = profile.rank()};
    case Profile::STRUCTURAL:
    case Profile::INVERTED:
      return {.kind = profile.kind() == Profile::INVERTED ? ProfileSpec::Kind::kInverted
                                                          : ProfileSpec::Kind::kStructural,
              .width = model.width,
              .head_dim = model.head_dim,
              .scale = profile.scale()};
    case Profile::FRACTION:
      // Without a numerator and a denominator (a matched profile) the shape is min(m, n) itself.
      return {.kind = ProfileSpec::Kind::kFraction,
              .fraction_numerator = profile.has_numerator() ? profile.numerator() : 1,
              .fraction_denominator = profile.has_denominator() ? profile.denominator() : 1};
    case Profile::EXPLICIT:
      return {.kind = ProfileSpec::Kind::kExplicit,
              .explicit_ranks = {profile.ranks().begin(), profile.ranks().end()}};
  }
  throw InvalidArgument(cat("profile.kind: found ", static_cast<int>(profile.kind())));
}

/// `make_profile`, with the field's full name in its errors.
RankProfile reference_profile(const RunConfig::Profile& match_to, const ModelConfig& model,
                              std::span<const ParameterInfo> parameters) {
  try {
    return make_profile(profile_spec(match_to, model), parameters);
  } catch (const InvalidArgument& error) {
    constexpr std::string_view kField = "profile";
    throw InvalidArgument(cat("profile.match_to", std::string_view(error.what()).substr(kField.size())));
  }
}

}  // namespace

Index sequences_per_micro_batch(const RunConfig& config) {
  const RunConfig::Batch& batch = config.batch();
  return batch.has_sequences_per_micro_batch() ? batch.sequences_per_micro_batch()
                                               : sequences_per_process(config);
}

Index micro_batches_per_step(const RunConfig& config) {
  return sequences_per_process(config) / sequences_per_micro_batch(config);
}

RankProfile rank_profile(const RunConfig::Profile& profile, const ModelConfig& model,
                         std::span<const ParameterInfo> parameters) {
  const ProfileSpec spec = profile_spec(profile, model);
  if (!profile.has_match_to()) return make_profile(spec, parameters);

  const RankProfile reference = reference_profile(profile.match_to(), model, parameters);
  RankProfile matched =
      spec.kind == ProfileSpec::Kind::kUniform ? matched_uniform(reference) : matched_to(spec, reference);
  const double ratio = budget_ratio(matched, reference);
  LB_EXPECTS(std::abs(ratio - 1) <= profile.match_tolerance(), "profile.match_to: found B(r) ratio ", ratio,
             " as the nearest that ", matched.name, " reaches to ", reference.name, ", expected 1 within ",
             profile.match_tolerance());
  return matched;
}

RankProfile rank_profile(const RunConfig& config, std::span<const ParameterInfo> parameters) {
  LB_EXPECTS(has_factor_ranks(config), "optimizer.kind: found ",
             RunConfig::Optimizer::Kind_Name(config.optimizer().kind()),
             ", expected DION, POWERSGD, ACPSGD or GALORE: only low-rank exchange has factor ranks");
  return rank_profile(config.profile(), model_config(config), parameters);
}

RankProfile budget_reference(const RunConfig& config, std::span<const ParameterInfo> parameters) {
  try {
    return rank_profile(parse_profile(config.budget().reference()), model_config(config), parameters);
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(cat("budget.reference: ", error.what()));
  }
}

}  // namespace lowband
