#include "trainer/config/run_config.h"
#include "trainer/config/schedule.h"

#include <cmath>
#include <limits>

namespace lowband {

namespace {

// Keep the element count of a whole model inside 64 bits.
constexpr Index kLargestExtent = Index{1} << 22;
constexpr Index kMostLayers = 10'000;
// OpenMP ends the program when it cannot start so many.
constexpr Index kMostThreads = 4096;
// 64 GiB: beyond any gradient of one process.
constexpr double kLargestBucketMiB = 65'536;
// One tick of the deadline's clock; a year, which its nanoseconds hold.
constexpr double kShortestDeadlineSeconds = 0.001;
constexpr double kLongestDeadlineSeconds = 365.0 * 24 * 3600;
constexpr Index kNoLimit = std::numeric_limits<Index>::max();

// ---- What a single field must be ----

void expect_set(const std::string& field, bool set) {
  LB_EXPECTS(set, field, ": found nothing, expected a value: it has no default");
}

void expect_unset(const std::string& field, bool set, std::string_view reason) {
  LB_EXPECTS(!set, field, ": found a value, expected none ", reason);
}

void expect_count(const std::string& field, Index value, Index least, Index most = kNoLimit) {
  LB_EXPECTS(value >= least && value <= most, field, ": found ", value, ", expected ",
             most == kNoLimit ? cat("at least ", least) : cat(least, " to ", most));
}

void expect_positive(const std::string& field, double value) {
  LB_EXPECTS(std::isfinite(value) && value > 0, field, ": found ", value, ", expected a positive number");
}

void expect_at_least_zero(const std::string& field, double value) {
  LB_EXPECTS(std::isfinite(value) && value >= 0, field, ": found ", value,
             ", expected a number of at least 0");
}

void expect_fraction(const std::string& field, double value) {
  LB_EXPECTS(value >= 0 && value <= 1, field, ": found ", value, ", expected 0 <= value <= 1");
}

// ---- Sections ----

void validate_model(const RunConfig& config) {
  const RunConfig::Model& model = config.model();
  expect_set("model.width", model.has_width());
  expect_set("model.layers", model.has_layers());
  expect_set("model.heads", model.has_heads());
  expect_set("model.ffn_width", model.has_ffn_width());
  expect_set("model.sequence", model.has_sequence());
  expect_count("model.vocabulary", model.vocabulary(), 1, kLargestExtent);
  expect_count("model.width", model.width(), 1, kLargestExtent);
  expect_count("model.layers", model.layers(), 1, kMostLayers);
  expect_count("model.heads", model.heads(), 1, kLargestExtent);
  expect_count("model.ffn_width", model.ffn_width(), 1, kLargestExtent);
  expect_count("model.sequence", model.sequence(), 1, kLargestExtent);
  if (model.has_kv_heads()) expect_count("model.kv_heads", model.kv_heads(), 1, model.heads());
  if (model.has_head_dim()) {
    expect_count("model.head_dim", model.head_dim(), 1, kLargestExtent / model.heads());
  } else {
    LB_EXPECTS(model.width() % model.heads() == 0, "model.width: found ", model.width(),
               ", expected a multiple of model.heads = ", model.heads(), " unless model.head_dim is given");
  }
  LB_EXPECTS(std::isfinite(model.rope_base()), "model.rope_base: found ", model.rope_base(),
             ", expected a finite number");
  validate(mesh_shape(config));
  validate(model_config(config), config.mesh().tensor());
}

void validate_data(const RunConfig& config) {
  const RunConfig::Data& data = config.data();
  LB_EXPECTS(data.train_size() > 0, "data.train: found nothing, expected the path of a token shard");
  for (const std::string& path : data.train())
    LB_EXPECTS(!path.empty(), "data.train: found an empty path, expected the path of a token shard");
  for (const std::string& path : data.validation())
    LB_EXPECTS(!path.empty(), "data.validation: found an empty path, expected the path of a token shard");

  expect_count("validation.interval_steps", config.validation().interval_steps(), 0);
  expect_count("validation.sequences", config.validation().sequences(), 0);
  const std::string reason = "without data.validation";
  if (data.validation().empty()) {
    expect_unset("validation.interval_steps", config.validation().has_interval_steps(), reason);
    expect_unset("validation.sequences", config.validation().has_sequences(), reason);
  }
}

void validate_batch(const RunConfig& config) {
  const RunConfig::Batch& batch = config.batch();
  expect_set("batch.sequences_per_step", batch.has_sequences_per_step());
  expect_count("batch.sequences_per_step", batch.sequences_per_step(), 1, kLargestExtent);
  const Index micro = batch.has_sequences_per_micro_batch() ? batch.sequences_per_micro_batch() : 1;
  expect_count("batch.sequences_per_micro_batch", micro, 1, kLargestExtent);
  const MeshShape mesh = mesh_shape(config);
  const Index divisor = Index{mesh.replica} * mesh.shard * micro;
  LB_EXPECTS(
      batch.sequences_per_step() % divisor == 0, "batch.sequences_per_step: found ",
      batch.sequences_per_step(),
      ", expected a multiple of mesh.replica x mesh.shard x batch.sequences_per_micro_batch = ", divisor);
}

/// Fields of elementwise optimizers that update nothing in this run.
void validate_elementwise(const RunConfig::Optimizer& optimizer, const OptimizerOptions& options) {
  using Optimizer = RunConfig::Optimizer;
  const std::string with_kind = "with optimizer.kind " + Optimizer::Kind_Name(optimizer.kind());
  if (!has_matrix_optimizer(options.kind))
    expect_unset("optimizer.scalar_optimizer", optimizer.has_scalar_optimizer(), with_kind);
  const ElementwiseKind used = elementwise_kind(options);
  const std::string reason =
      has_matrix_optimizer(options.kind)
          ? "with optimizer.scalar_optimizer " + Optimizer::Kind_Name(optimizer.scalar_optimizer())
          : with_kind;
  const auto check_owner = [&](const char* name, bool set, ElementwiseKind owner) {
    if (used != owner) expect_unset(std::string("optimizer.") + name, set, reason);
  };
  check_owner("adamw_beta1", optimizer.has_adamw_beta1(), ElementwiseKind::kAdamW);
  check_owner("adamw_beta2", optimizer.has_adamw_beta2(), ElementwiseKind::kAdamW);
  check_owner("adamw_epsilon", optimizer.has_adamw_epsilon(), ElementwiseKind::kAdamW);
  check_owner("sgd_momentum", optimizer.has_sgd_momentum(), ElementwiseKind::kSgd);
  check_owner("sgd_nesterov", optimizer.has_sgd_nesterov(), ElementwiseKind::kSgd);
  check_owner("lion_beta1", optimizer.has_lion_beta1(), ElementwiseKind::kLion);
  check_owner("lion_beta2", optimizer.has_lion_beta2(), ElementwiseKind::kLion);
}

/// Fields of optimizers by signs, and mu, which others have too.
void validate_signs(const RunConfig::Optimizer& optimizer, OptimizerKind kind) {
  using Optimizer = RunConfig::Optimizer;
  const std::string with_kind = "with optimizer.kind " + Optimizer::Kind_Name(optimizer.kind());
  const auto check_owner = [&](const char* name, bool set, bool belongs) {
    if (!belongs) expect_unset(std::string("optimizer.") + name, set, with_kind);
  };
  const bool signs_momentum = is_muon(kind) || selects_slices(kind);
  check_owner("mu", optimizer.has_mu(),
              signs_momentum || kind == OptimizerKind::kDion || kind == OptimizerKind::kSpectra);
  check_owner("nesterov", optimizer.has_nesterov(), is_muon(kind));
  check_owner("sign", optimizer.has_sign(), takes_signs(kind));
  check_owner("update_scale", optimizer.has_update_scale(), signs_momentum);
  check_owner("normuon_beta2", optimizer.has_normuon_beta2(),
              kind == OptimizerKind::kNorMuon || kind == OptimizerKind::kNorDion2);
  check_owner("dion2_numerator", optimizer.has_dion2_numerator(), selects_slices(kind));
  check_owner("dion2_denominator", optimizer.has_dion2_denominator(), selects_slices(kind));
  check_owner("dion2_selection", optimizer.has_dion2_selection(), selects_slices(kind));
  check_owner("blocks", optimizer.has_blocks(), has_matrix_optimizer(kind));
  const bool periodic = kind == OptimizerKind::kMuonBp;
  check_owner("muonbp_period", optimizer.has_muonbp_period(), periodic);
  check_owner("muonbp_block_learning_rate", optimizer.has_muonbp_block_learning_rate(), periodic);
  if (!periodic) return;
  expect_set("optimizer.muonbp_period", optimizer.has_muonbp_period());
  expect_set("optimizer.muonbp_block_learning_rate", optimizer.has_muonbp_block_learning_rate());
  expect_positive("optimizer.muonbp_block_learning_rate", optimizer.muonbp_block_learning_rate());
}

void validate_optimizer(const RunConfig& config) {
  using Optimizer = RunConfig::Optimizer;
  const Optimizer& optimizer = config.optimizer();
  expect_set("optimizer.learning_rate", optimizer.has_learning_rate());
  expect_positive("optimizer.learning_rate", optimizer.learning_rate());
  expect_positive("optimizer.scalar_learning_rate", scalar_learning_rate(config));
  LB_EXPECTS(optimizer.bucket_mib() > 0 && optimizer.bucket_mib() <= kLargestBucketMiB,
             "optimizer.bucket_mib: found ", optimizer.bucket_mib(), ", expected more than 0, at most ",
             kLargestBucketMiB);
  LB_EXPECTS(optimizer.powersgd_momentum() >= 0 && optimizer.powersgd_momentum() < 1,
             "optimizer.powersgd_momentum: found ", optimizer.powersgd_momentum(),
             ", expected 0 <= value < 1");
  const OptimizerOptions options = optimizer_options(config);
  validate_signs(optimizer, options.kind);
  validate(options);
  validate_elementwise(optimizer, options);

  const std::string with_kind = "with optimizer.kind " + Optimizer::Kind_Name(optimizer.kind());
  if (optimizer.kind() != Optimizer::SPECTRA) {
    expect_unset("optimizer.spectra_fraction", optimizer.has_spectra_fraction(), with_kind);
    expect_unset("optimizer.spectra_iterations", optimizer.has_spectra_iterations(), with_kind);
  }
  if (optimizer.kind() != Optimizer::GALORE) {
    expect_unset("optimizer.galore_scale", optimizer.has_galore_scale(), with_kind);
    expect_unset("optimizer.galore_interval", optimizer.has_galore_interval(), with_kind);
  }
  if (optimizer.kind() != Optimizer::DION) {
    expect_unset("optimizer.clip_estimator", optimizer.has_clip_estimator(), with_kind);
  }
  if (optimizer.kind() != Optimizer::POWERSGD && optimizer.kind() != Optimizer::ACPSGD)
    expect_unset("optimizer.powersgd_momentum", optimizer.has_powersgd_momentum(), with_kind);
  if (!exchanges_both_factors(options.kind)) {
    expect_unset("optimizer.residual", optimizer.has_residual(), with_kind);
    expect_unset("optimizer.exchange", optimizer.has_exchange(), with_kind);
  }
  if (!has_factor_ranks(config)) {
    expect_unset("optimizer.wire", optimizer.has_wire(), with_kind);
    expect_unset("profile", config.has_profile(), with_kind);
  }
  if (!feeds_back(options.kind)) expect_unset("diagnostics", config.has_diagnostics(), with_kind);
  if (!exchanges_both_factors(options.kind)) expect_unset("budget", config.has_budget(), with_kind);
  if (!optimizer.overlap())
    expect_unset("optimizer.bucket_mib", optimizer.has_bucket_mib(), "without optimizer.overlap");
  if (optimizer.exchange() == Optimizer::DENSE)
    expect_unset("optimizer.wire", optimizer.has_wire(), "with optimizer.exchange DENSE: no factors travel");
  LB_EXPECTS(optimizer.wire() != Optimizer::BF16 || config.precision() != RunConfig::F64,
             "optimizer.wire: found BF16, expected AS_COMPUTED with precision F64");

  LB_EXPECTS(optimizer.clip_estimator() != Optimizer::TRUE_NORM || config.mesh().replica() == 1,
             "optimizer.clip_estimator: found TRUE_NORM, expected SKETCH with optimizer.kind DION and "
             "mesh.replica = ",
             config.mesh().replica(), ": no process has the mean gradient");
}

/// Fields that must or must not stand beside `kind`. The ranks themselves are checked by `make_profile`.
void validate_profile(const RunConfig::Profile& profile, const std::string& field) {
  using Profile = RunConfig::Profile;
  const bool matched = profile.has_match_to();
  const bool scales = profile.kind() == Profile::STRUCTURAL || profile.kind() == Profile::INVERTED;
  const std::string reason = matched ? "with " + field + ".match_to"
                                     : "with " + field + ".kind " + Profile::Kind_Name(profile.kind());
  const auto check_owner = [&](const char* name, bool set, bool belongs, bool required) {
    if (required) expect_set(field + "." + name, set);
    if (!belongs) expect_unset(field + "." + name, set, reason);
  };
  const bool uniform = profile.kind() == Profile::UNIFORM && !matched;
  const bool fraction = profile.kind() == Profile::FRACTION && !matched;
  check_owner("rank", profile.has_rank(), uniform, uniform);
  check_owner("scale", profile.has_scale(), scales && !matched, false);
  check_owner("numerator", profile.has_numerator(), fraction, fraction);
  check_owner("denominator", profile.has_denominator(), fraction, fraction);
  LB_EXPECTS(profile.ranks().empty() || profile.kind() == Profile::EXPLICIT, field, ".ranks: found ",
             profile.ranks_size(), " ranks, expected none with ", field, ".kind ",
             Profile::Kind_Name(profile.kind()));

  if (!matched) {
    expect_unset(field + ".match_tolerance", profile.has_match_tolerance(), "without " + field + ".match_to");
    return;
  }
  expect_at_least_zero(field + ".match_tolerance", profile.match_tolerance());
  expect_unset(field + ".match_to.match_to", profile.match_to().has_match_to(),
               "in a profile that another is matched to");
  validate_profile(profile.match_to(), field + ".match_to");
}

void validate_budget(const RunConfig& config) {
  const RunConfig::Budget& budget = config.budget();
  expect_set("budget.reference", budget.has_reference());
  expect_at_least_zero("budget.tolerance", budget.tolerance());
  const std::vector<ParameterInfo> parameters = parameter_table(config);
  expect_within_budget(rank_profile(config, parameters), budget_reference(config, parameters),
                       replica_traffic(config), budget.tolerance());
}

void validate_schedule(const RunConfig& config) {
  const RunConfig::Schedule& schedule = config.schedule();
  expect_set("schedule.steps", schedule.has_steps());
  expect_count("schedule.steps", schedule.steps(), 1);
  expect_count("schedule.warmup_steps", schedule.warmup_steps(), 0, schedule.steps());
  expect_fraction("schedule.final_fraction", schedule.final_fraction());
  if (schedule.kind() == RunConfig::Schedule::COSINE) {
    expect_unset("schedule.decay_fraction", schedule.has_decay_fraction(), "with schedule.kind COSINE");
    expect_unset("schedule.decay_steps", schedule.has_decay_steps(), "with schedule.kind COSINE");
    return;
  }
  expect_fraction("schedule.decay_fraction", schedule.decay_fraction());
  if (schedule.has_decay_steps()) {
    expect_unset("schedule.decay_fraction", schedule.has_decay_fraction(), "beside schedule.decay_steps");
    expect_count("schedule.decay_steps", schedule.decay_steps(), 0, schedule.steps());
  }
  const Index decay = linear_decay_steps(schedule);
  LB_EXPECTS(decay <= schedule.steps() - schedule.warmup_steps(), "schedule.warmup_steps: found ",
             schedule.warmup_steps(), " before a decay of ", decay,
             " steps, expected at most schedule.steps = ", schedule.steps(), " together");
}

void validate_dump(const RunConfig& config) {
  if (!config.has_dump()) return;
  const RunConfig::Dump& dump = config.dump();
  const Index steps = config.schedule().steps();
  LB_EXPECTS(!dump.folder().empty(), "dump.folder: found nothing, expected the path of a folder");
  expect_set("dump.steps", dump.has_steps());
  expect_count("dump.first_step", dump.first_step(), 0, steps - 1);
  expect_count("dump.steps", dump.steps(), 1, steps - dump.first_step());
}

std::string with_device(const RunConfig& config) {
  return "with device " + RunConfig::Device_Name(config.device());
}

/// Of the optimizer.
void validate_updates_on_device(const RunConfig& config) {
  if (config.device() == RunConfig::CPU) return;
  LB_EXPECTS(config.precision() != RunConfig::F64, "precision: found F64, expected F32 or BF16 ",
             with_device(config));
  LB_EXPECTS(!config.optimizer().overlap(), "optimizer.overlap: found true, expected false ",
             with_device(config), ": gradients are complete when the device has ended the backward pass");
}

/// Of the model.
void validate_device(const RunConfig& config) {
  if (config.device() == RunConfig::CPU) {
    LB_EXPECTS(config.precision() != RunConfig::BF16, "precision: found BF16, expected F32 or F64 ",
               with_device(config));
    return expect_unset("recompute_activations", config.has_recompute_activations(), with_device(config));
  }
  const Index head_dim = model_config(config).head_dim;
  LB_EXPECTS(head_dim % 16 == 0 && head_dim <= 128, "model.head_dim: found ", head_dim,
             ", expected a multiple of 16 up to 128 ", with_device(config));
}

/// Of a process and its waits.
void validate_limits(const RunConfig& config) {
  const double deadline = config.collective_deadline_seconds();
  LB_EXPECTS(deadline >= kShortestDeadlineSeconds && deadline <= kLongestDeadlineSeconds,
             "collective_deadline_seconds: found ", deadline, ", expected ", kShortestDeadlineSeconds, " to ",
             kLongestDeadlineSeconds);
  expect_count("threads", config.threads(), 0, kMostThreads);
}

/// How gradients become updates. The ranks themselves are checked by `make_profile`.
void validate_updates(const RunConfig& config) {
  validate_optimizer(config);
  validate_updates_on_device(config);
  if (!has_factor_ranks(config)) return;
  expect_set("profile", config.has_profile());
  validate_profile(config.profile(), "profile");
  expect_count("diagnostics.interval_steps", config.diagnostics().interval_steps(), 0);
}

void validate_output(const RunConfig& config) {
  LB_EXPECTS(!config.output_dir().empty(), "output_dir: found nothing, expected the path of a folder");
  const std::string& name = config.name();
  LB_EXPECTS(!name.empty() && name != "." && name != ".." && name.find('/') == std::string::npos,
             "name: found \"", name, "\", expected a plain file name");
  expect_count("checkpoint.interval_steps", config.checkpoint().interval_steps(), 0);
  expect_count("checkpoint.keep", config.checkpoint().keep(), 1);
  LB_EXPECTS(!config.checkpoint().resume().empty(),
             "checkpoint.resume: found nothing, expected none, auto or the path of a checkpoint");
  expect_count("log_interval_steps", config.log_interval_steps(), 1);
  expect_count("hash_interval_steps", config.hash_interval_steps(), 0);
  validate_limits(config);
}

}  // namespace

void validate(const RunConfig& config, int processes) {
  validate_model(config);
  validate(mesh_shape(config), processes);
  validate_data(config);
  validate_batch(config);
  validate_updates(config);
  if (has_factor_ranks(config)) rank_profile(config, parameter_table(config));
  validate_schedule(config);
  validate_device(config);
  validate_output(config);
  validate_dump(config);
  if (config.has_budget()) validate_budget(config);
}

void validate_for_replay(const RunConfig& config, bool has_model) {
  validate(mesh_shape(config));
  if (has_model) validate_model(config);
  validate_updates(config);
  if (config.has_schedule()) validate_schedule(config);
  validate_limits(config);
}

}  // namespace lowband
