#include "trainer/trainer.h"

#include "collectives/agreement.h"
#include "model/transformer.h"
#include "optimizers/sharded_optimizer.h"
#include "runtime/cpu.h"
#include "runtime/version.h"
#include "sharding/process_mesh.h"
#include "trainer/byte_plan.h"
#include "trainer/checkpoint.h"
#include "trainer/config/schedule.h"
#include "trainer/data/content_hash.h"
#include "trainer/data/token_shards.h"
#include "trainer/message_fields.h"
#include "trainer/progress.h"

#include <array>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <functional>
#include <optional>

#include <glob.h>
#include <google/protobuf/text_format.h>

namespace lowband {
namespace {

using Clock = std::chrono::steady_clock;

/// A loss that is not finite for so many steps will not be again. Fewer than the steps between two
/// checkpoints of any sensible run, so that a good one is still there.
constexpr Index kNonFiniteStepsAllowed = 5;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

/// The files that paths and glob patterns name, in the order of the patterns.
std::vector<std::filesystem::path> expand(const std::string& field,
                                          const google::protobuf::RepeatedPtrField<std::string>& patterns) {
  std::vector<std::filesystem::path> files;
  for (const std::string& pattern : patterns) {
    if (std::error_code missing; std::filesystem::exists(pattern, missing)) {
      files.emplace_back(pattern);  // whatever its name is made of
      continue;
    }
    glob_t found{};
    const int status = glob(pattern.c_str(), 0, nullptr, &found);
    for (std::size_t i = 0; status == 0 && i < found.gl_pathc; ++i) files.emplace_back(found.gl_pathv[i]);
    globfree(&found);
    LB_EXPECTS(status == 0, field, ": found no file at '", pattern,
               "', expected a token shard or a pattern that matches some");
  }
  return files;
}

RankProfile profile_of(const RunConfig& config) {
  if (!has_factor_ranks(config)) return {};
  return rank_profile(config, parameter_table(model_config(config)));
}

std::string exchange_name(const RunConfig& config) {
  return has_factor_ranks(config) ? RunConfig::Optimizer::Exchange_Name(config.optimizer().exchange()) : "";
}

std::string wire_dtype_name(const RunConfig& config) {
  if (!has_factor_ranks(config)) return "";
  if (config.optimizer().wire() == RunConfig::Optimizer::BF16) return std::string(dtype_name(DType::kBF16));
  return std::string(dtype_name(config.precision() == RunConfig::F64 ? DType::kF64 : DType::kF32));
}

/// "factors 13.6 MB (bf16), dense matrices 1.20 MB".
std::string matrix_bytes_text(const RunConfig& config, const RankProfile& profile) {
  const MatrixBytes bytes = matrix_bytes(profile, replica_traffic(config));
  const auto quantity = [](Index count) { return format_quantity(static_cast<double>(count), "B"); };
  std::string text;
  if (bytes.factor > 0) text = cat("factors ", quantity(bytes.factor), " (", wire_dtype_name(config), ")");
  if (bytes.dense > 0) text += cat(text.empty() ? "" : ", ", "dense matrices ", quantity(bytes.dense));
  return text;
}

}  // namespace

template <class Real>
struct Trainer<Real>::State {
  State(const RunConfig& config_, Communicator& world_, const TrainingSession& session_);

  // Sums over the processes of one step: what was lost, whether somebody wants to stop, and what the ledgers
  // counted.
  struct StepSums {
    double loss = 0;  // mean over the tokens of the step
    bool stop = false;
    // Payload on the replica axis, of one replica.
    Index factor_bytes = 0;
    Index dense_bytes = 0;
    Index periodic_bytes = 0;
    Index replica_axis_bytes = 0;  // all purposes
  };
  // One completed step as it is recorded.
  struct StepOutcome {
    StepSums sums;
    StepReport report;
    double learning_rate = 0;
    double forward_backward_seconds = 0;
    double seconds = 0;
  };

  double accumulate_gradients();
  StepSums take_step();
  StepSums agree_on_step(double loss_sum, bool diagnosed);
  void show_step(const StepOutcome& outcome);
  void record_step(const StepOutcome& outcome);
  void record_diagnostics(const StepReport& report);
  double validation_loss();
  void check_replicas_agree();
  void save();

  void resume();
  void open_record();
  std::vector<ProcessTraffic> gather_traffic();
  std::vector<TransferSum> run_transfers() const {  // of this process, since the run began
    return merged(earlier_transfers, transfer_sums(world.ledger().total()));
  }
  RunSummary summary() const;
  CheckpointIdentity identity() const;
  std::vector<NamedTensor> tensors();

  bool first_process() const { return world.process() == 0; }
  Index steps() const { return config.schedule().steps(); }
  Index sequences_per_process() const {
    return sequences_per_micro_batch(config) * micro_batches_per_step(config);
  }
  Index tokens_per_step() const { return config.batch().sequences_per_step() * model_shape.sequence; }
  std::filesystem::path checkpoints() const { return directory / "checkpoints"; }
  bool at_interval(Index interval) const { return interval > 0 && step % interval == 0; }
  void say(const std::string& line) {
    if (progress) progress->say(line);
  }

  RunConfig config;
  Communicator& world;
  TrainingSession session;
  ModelConfig model_shape;
  RankProfile profile;
  std::filesystem::path directory;
  Timeline timeline;
  std::optional<TokenSet> train_set, validation_set;
  std::optional<ProcessMesh> mesh;
  std::optional<Transformer<Real>> model;
  std::optional<ShardedOptimizer<Real>> optimizer;
  std::optional<RunRecorder> record;          // on process 0
  std::optional<Progress> progress;           // on process 0, with a console
  std::vector<std::int32_t> tokens, targets;  // one micro-batch

  Index step = 0;  // completed
  Index first_step = 0;
  Index non_finite_steps = 0;  // without a break, up to now
  bool complete = false;       // this run ended before, with all its records
  double step_seconds = 0;     // of all steps since `first_step`, validation and checkpoints excluded
  Clock::time_point begin = Clock::now();
  std::optional<double> last_loss;
  Index last_factor_bytes = 0;
  // Since the run began, all its sessions together; `earlier_transfers` without this one.
  double exchange_seconds = 0, exposed_seconds = 0;
  std::vector<TransferSum> earlier_transfers;
  std::optional<double> final_validation, best_validation;
  Index best_validation_step = 0;
};

// ---- Beginning ----

template <class Real>
Trainer<Real>::State::State(const RunConfig& config_, Communicator& world_, const TrainingSession& session_)
    : config(config_), world(world_), session(session_) {
  agree(world, [&] {
    lowband::validate(config, world.size());
    model_shape = model_config(config);
    profile = profile_of(config);
    directory = std::filesystem::path(config.output_dir()) / config.name();
    train_set.emplace(expand("data.train", config.data().train()), model_shape.vocabulary,
                      model_shape.sequence, config.seed());
    if (config.data().validation_size() == 0) return;
    validation_set.emplace(expand("data.validation", config.data().validation()), model_shape.vocabulary,
                           model_shape.sequence, config.seed());
    LB_EXPECTS(config.validation().sequences() <= validation_set->blocks(), "validation.sequences: found ",
               config.validation().sequences(), ", expected at most ", validation_set->blocks(),
               ", the sequences in data.validation");
  });
  using Milliseconds = std::chrono::milliseconds;
  world.set_deadline(
      Milliseconds(static_cast<Milliseconds::rep>(1000 * config.collective_deadline_seconds())));
  if (config.trace()) {
    timeline.start((directory / cat("timeline-", world.process(), ".json")).string(), world.process());
    world.set_timeline(&timeline);
  }
  agree(world, [&] { world.set_determinism(determinism(config)); });
  mesh.emplace(world, mesh_shape(config));
  allow_planned(world.budget(), config, mesh->position());
  model.emplace(model_shape, mesh->tensor(), config.seed(), sequences_per_micro_batch(config));
  optimizer.emplace(*mesh, model->parameters(), profile, optimizer_options(config));
  const auto micro_batch_tokens =
      static_cast<std::size_t>(sequences_per_micro_batch(config) * model_shape.sequence);
  tokens.resize(micro_batch_tokens);
  targets.resize(micro_batch_tokens);
  resume();
  open_record();
}

template <class Real>
CheckpointIdentity Trainer<Real>::State::identity() const {
  // What a trajectory depends on. The schedule may be extended and data may move.
  CheckpointIdentity identity;
  identity.mesh = mesh->shape();
  identity.parameters = parameter_table(model_shape);
  identity.fields = message_fields(config.model(), "model");
  RunConfig::Optimizer optimizer_fields = config.optimizer();
  optimizer_fields.clear_overlap();  // when gradients travel changes no bit of them
  optimizer_fields.clear_bucket_mib();
  identity.fields.merge(message_fields(optimizer_fields, "optimizer"));
  identity.fields.merge(message_fields(config.profile(), "profile"));
  identity.fields.merge(message_fields(config.batch(), "batch"));
  identity.fields["seed"] = std::to_string(config.seed());
  identity.fields["precision"] = RunConfig::Precision_Name(config.precision());
  return identity;
}

template <class Real>
void Trainer<Real>::State::resume() {
  const std::string& from = config.checkpoint().resume();
  std::optional<std::filesystem::path> latest;
  agree(world, [&] {
    latest = latest_complete(checkpoints());
    // A run that began anew beside them would remove its own checkpoints first, and `auto` would continue the
    // other run.
    std::error_code missing;
    LB_EXPECTS(!latest || from == "auto" || std::filesystem::equivalent(from, *latest, missing),
               "checkpoint.resume: found ", from, " beside the checkpoint ", latest->string(),
               " of an earlier run, expected auto, another name or another output_dir");
  });
  // Process 0 chooses: on folders that are not shared, the others may see another one, or none.
  std::string chosen = latest ? latest->filename().string() : "";
  auto length = static_cast<Index>(chosen.size());
  world.broadcast<Index>({&length, 1}, 0, {Purpose::kControl});
  chosen.resize(static_cast<std::size_t>(length));
  world.broadcast<std::uint8_t>({reinterpret_cast<std::uint8_t*>(chosen.data()), chosen.size()}, 0,
                                {Purpose::kControl});
  if (from == "none" || (from == "auto" && chosen.empty())) return;
  const std::filesystem::path checkpoint =
      from == "auto" ? checkpoints() / chosen : std::filesystem::path(from);
  const CheckpointProgress reached = load_checkpoint(world, checkpoint, identity(), tensors());
  agree(world, [&] {
    LB_EXPECTS(reached.step <= steps(), "schedule.steps: found ", steps(), ", expected at least ",
               reached.step, ", the steps of the checkpoint ", checkpoint.string());
  });
  step = first_step = reached.step;
  const auto scalar = [&](const char* name) -> std::optional<double> {
    const auto found = reached.scalars.find(name);
    return found == reached.scalars.end() ? std::nullopt : std::optional(found->second);
  };
  last_loss = scalar("last_loss");
  last_factor_bytes = static_cast<Index>(scalar("last_factor_bytes").value_or(0));
  exchange_seconds = scalar("exchange_seconds").value_or(0);
  exposed_seconds = scalar("exposed_seconds").value_or(0);
  earlier_transfers = transfer_sums_in(reached.scalars);
  best_validation = scalar("best_validation_loss");
  best_validation_step = static_cast<Index>(scalar("best_validation_step").value_or(0));
}

template <class Real>
void Trainer<Real>::State::open_record() {
  std::uint8_t summary_exists = std::filesystem::exists(directory / "summary.json");
  world.broadcast<std::uint8_t>({&summary_exists, 1}, 0, {Purpose::kControl});
  complete = step == steps() && summary_exists != 0;
  if (first_process() && session.console != nullptr) {
    progress.emplace(*session.console, terminal_columns(), step, steps());
  }
  if (complete) return say(cat("complete already, ", step, " steps: ", directory.string()));
  agree(world, [&] {
    if (!first_process()) return;
    const bool continues = step > 0 && std::filesystem::exists(directory / "run.jsonl");
    record.emplace(directory, continues ? std::optional(step) : std::nullopt);
  });
  if (!first_process()) return;
  const Index element_bytes = dtype_bytes(dtype_of<Real>);
  Index elements = 0, state_bytes = 0;
  for (const ParameterInfo& info : parameter_table(model_shape)) elements += info.elements();
  for (const auto& tensor : optimizer->state()) state_bytes += tensor.value.elements() * element_bytes;

  RunStart start;
  start.set_completed_steps(step);
  start.set_total_steps(steps());
  start.set_name(config.name());
  start.set_profile(profile.name);
  google::protobuf::TextFormat::PrintToString(config, start.mutable_config_text());
  start.set_replica(mesh->shape().replica);
  start.set_shard(mesh->shape().shard);
  start.set_tensor(mesh->shape().tensor);
  start.set_version(std::string(version()));
  start.set_communicator(std::string(world.backend()));
  start.set_determinism(std::string(determinism_name(world.determinism())));
  start.set_cpu(cpu_info().model);
  start.set_blas_kernels(blas_core_name());
  start.set_gemm_library(gemm_library_name());
  start.set_vector_kernels(vector_kernel_name());
  start.set_threads(compute_threads());
  start.set_parameters(elements);
  start.set_planned_factor_bytes(optimizer->planned_factor_bytes());
  start.set_planned_dense_bytes(optimizer->planned_dense_bytes());
  start.set_dense_gradient_bytes(dense_elements(profile) * element_bytes);
  start.set_optimizer(RunConfig::Optimizer::Kind_Name(config.optimizer().kind()));
  start.set_exchange(exchange_name(config));
  start.set_wire_dtype(wire_dtype_name(config));
  record->write(start);

  say(cat(format_quantity(static_cast<double>(elements)), " parameters on ", world.size(),
          " processes (replica ", mesh->shape().replica, " x shard ", mesh->shape().shard, " x tensor ",
          mesh->shape().tensor, "), ", world.backend(), " with ", determinism_name(world.determinism()),
          " sums, ", compute_threads(), " thread(s) each"));
  say(cat("kernels: vector ", vector_kernel_name(), ", GEMM ", gemm_library_name(), ", BLAS ",
          blas_core_name()));
  say(cat("memory per process: weights and gradients ",
          format_quantity(static_cast<double>(model->parameter_bytes()), "B"), ", activations ",
          format_quantity(static_cast<double>(model->activation_bytes()), "B"), ", optimizer ",
          format_quantity(static_cast<double>(state_bytes), "B")));
  if (has_factor_ranks(config)) {
    say(cat("profile ", profile.name, ": ", matrix_bytes_text(config, profile),
            " per step and replica; B(r) is ",
            static_cast<double>(factor_elements(profile)) / static_cast<double>(dense_elements(profile)),
            " of the dense gradient"));
  }
  if (step > 0) say(cat("continues after step ", step));
}

// ---- One step ----

// With the last micro-batch gradients are complete, and nothing here touches them again: from the moment that
// the optimizer is told they are its own.
template <class Real>
double Trainer<Real>::State::accumulate_gradients() {
  const Timeline::Range range(&timeline, "forward_backward", 0);
  const Index per_micro_batch = sequences_per_micro_batch(config), sequence = model_shape.sequence;
  const double gradient_scale = 1.0 / static_cast<double>(sequences_per_process() * sequence);
  model->zero_gradients();
  // Sample numbers count over the whole run, so that the batch of a step does not depend on the layout.
  Index sample = step * config.batch().sequences_per_step() + mesh->data_index() * sequences_per_process();
  double loss_sum = 0;
  for (Index micro_batch = 0; micro_batch < micro_batches_per_step(config); ++micro_batch) {
    for (Index row = 0; row < per_micro_batch; ++row, ++sample) {
      const auto offset = static_cast<std::size_t>(row * sequence),
                 count = static_cast<std::size_t>(sequence);
      train_set->sample(sample, std::span(tokens).subspan(offset, count),
                        std::span(targets).subspan(offset, count));
    }
    std::function<void(Index)> gradient_ready;
    if (micro_batch + 1 == micro_batches_per_step(config))
      gradient_ready = [this](Index parameter) { optimizer->gradient_ready(parameter); };
    loss_sum += model->forward_backward(tokens, targets, per_micro_batch, gradient_scale, gradient_ready);
  }
  return loss_sum;
}

template <class Real>
auto Trainer<Real>::State::take_step() -> StepSums {
  const auto step_begin = Clock::now();
  const Timeline::Range range(&timeline, cat("step ", step), 0);
  world.ledger().begin_step(step + 1);
  const double loss_sum = accumulate_gradients();
  StepOutcome outcome;
  outcome.forward_backward_seconds = seconds_since(step_begin);

  const double factor = learning_rate_factor(config.schedule(), step);
  outcome.learning_rate = factor * config.optimizer().learning_rate();
  const Index diagnosed_interval = config.diagnostics().interval_steps();
  const bool diagnose = diagnosed_interval > 0 && (step + 1) % diagnosed_interval == 0;
  {
    const Timeline::Range optimizer_range(&timeline, "optimizer", 0);
    outcome.report =
        optimizer->step({step, outcome.learning_rate, factor * scalar_learning_rate(config), diagnose});
  }
  const StepSums sums = outcome.sums = agree_on_step(loss_sum, diagnose);
  ++step;
  outcome.seconds = seconds_since(step_begin);
  step_seconds += outcome.seconds;
  exchange_seconds += outcome.report.communication_seconds;
  exposed_seconds += outcome.report.exposed_seconds;
  last_loss = sums.loss;
  last_factor_bytes = sums.factor_bytes;
  if (progress) show_step(outcome);
  if (record) {
    record_step(outcome);
    if (diagnose) record_diagnostics(outcome.report);
  }
  non_finite_steps = std::isfinite(sums.loss) ? 0 : non_finite_steps + 1;
  if (non_finite_steps == kNonFiniteStepsAllowed) {
    throw AgreedFailure(cat("step ", step, ": found no finite loss for ", non_finite_steps,
                            " steps, expected the run to recover; checkpoints are left as they are, a lower "
                            "optimizer.learning_rate may help"));
  }
  return sums;
}

template <class Real>
auto Trainer<Real>::State::agree_on_step(double loss_sum, bool diagnosed) -> StepSums {
  // Losses add up over data-parallel processes; the T processes of a tensor group hold the same one. Bytes
  // add up over the processes of a replica, and every replica counts the same. Byte counts are exact in a
  // double (< 2^53).
  const Ledger& ledger = world.ledger();
  const auto counted = [&](Purpose purpose) {
    return static_cast<double>(ledger.step_sum("replica", purpose).payload_bytes);
  };
  double replica_axis_bytes = 0;
  for (const Purpose purpose : kPurposes) replica_axis_bytes += counted(purpose);
  const bool stop = session.stop_requested != nullptr && session.stop_requested->load();
  std::array<double, kStepSums> sums{loss_sum / mesh->shape().tensor, stop ? 1.0 : 0.0,
                                     counted(Purpose::kFactor),       counted(Purpose::kDense),
                                     counted(Purpose::kPeriodic),     replica_axis_bytes};
  world.all_reduce<double>(sums, Reduction::kSum, {Purpose::kControl});
  const auto of_a_replica = [&](double sum) { return static_cast<Index>(sum) / mesh->shape().replica; };
  const StepSums result{.loss = sums[0] / static_cast<double>(tokens_per_step()),
                        .stop = sums[1] > 0,
                        .factor_bytes = of_a_replica(sums[2]),
                        .dense_bytes = of_a_replica(sums[3]),
                        .periodic_bytes = of_a_replica(sums[4]),
                        .replica_axis_bytes = of_a_replica(sums[5])};
  const auto expect_planned = [&](std::string_view what, Index found, Index planned) {
    if (found == planned) return;
    throw Error(cat("step ", step, ": found ", found, " bytes of ", what,
                    " counted on the replica axis, expected ", planned, " as planned"));
  };
  expect_planned("factors", result.factor_bytes, optimizer->planned_factor_bytes());
  expect_planned("dense tensors", result.dense_bytes, optimizer->planned_dense_bytes());
  expect_planned("diagnostics", result.periodic_bytes, diagnosed ? optimizer->planned_periodic_bytes() : 0);
  return result;
}

template <class Real>
void Trainer<Real>::State::show_step(const StepOutcome& outcome) {
  const bool overlap = config.optimizer().overlap();
  progress->update(step, outcome.sums.loss, static_cast<double>(tokens_per_step()), outcome.seconds,
                   static_cast<double>(outcome.sums.replica_axis_bytes),
                   overlap ? std::optional(outcome.report.exposed_seconds) : std::nullopt);
}

template <class Real>
void Trainer<Real>::State::record_step(const StepOutcome& outcome) {
  const auto& [sums, report, learning_rate, forward_backward_seconds, seconds] = outcome;
  if (!at_interval(config.log_interval_steps()) && step != steps() && !sums.stop) return;
  StepRecord line;
  line.set_step(step);
  line.set_loss(sums.loss);
  line.set_learning_rate(learning_rate);
  line.set_gradient_norm(report.gradient_norm);
  line.set_clip_scale(report.clip_scale);
  line.set_tokens(tokens_per_step());
  line.set_seconds(seconds);
  line.set_forward_backward_seconds(forward_backward_seconds);
  line.set_optimizer_seconds(report.seconds);
  line.set_communication_seconds(world.ledger().step_sum().seconds);
  line.set_exchange_seconds(report.communication_seconds);
  line.set_exposed_seconds(report.exposed_seconds);
  line.set_counted_factor_bytes(sums.factor_bytes);
  line.set_counted_dense_bytes(sums.dense_bytes);
  line.set_counted_periodic_bytes(sums.periodic_bytes);
  for (TransferSum& sum : transfer_sums(world.ledger().step())) *line.add_transfers() = std::move(sum);
  line.set_dead_columns(report.dead_columns);
  line.set_skipped_matrices(report.skipped_matrices);
  line.set_skipped_other(report.skipped_other);
  line.set_householder_fallbacks(report.householder_fallbacks);
  record->write(line);
}

template <class Real>
void Trainer<Real>::State::record_diagnostics(const StepReport& report) {
  DiagnosticsRecord line;
  line.set_step(step);
  for (const MatrixDiagnostics& found : report.diagnostics) {
    DiagnosticsRecord::Matrix& matrix = *line.add_matrices();
    matrix.set_name(found.name);
    matrix.set_factor_rank(found.factor_rank);
    matrix.set_drift(found.drift);
    matrix.set_mass_leak(found.mass_leak);
    matrix.set_captured_energy(found.captured_energy);
    matrix.set_dead_columns(found.dead_columns);
  }
  record->write(line);
}

template <class Real>
void Trainer<Real>::State::check_replicas_agree() {
  std::uint64_t hash = 0;  // of all weights, each seeded with that of those before it
  for (const auto& parameter : model->parameters()) {
    hash = content_hash(std::as_bytes(parameter.weight.flat()), hash);
  }
  // Everybody sees every hash, so that everybody stops, not the processes of the differing piece alone.
  const auto processes = static_cast<std::size_t>(world.size());
  const auto mine = static_cast<Index>(hash);
  std::vector<Index> hashes(processes), ones(processes, 1);
  world.all_gather<Index>({&mine, 1}, hashes, ones, {Purpose::kPeriodic});
  const auto pieces = static_cast<std::size_t>(mesh->within_replica().size());
  for (std::size_t process = pieces; process < processes; ++process) {
    const std::size_t original = process % pieces;  // the process of replica 0 that holds the same piece
    if (hashes[process] == hashes[original]) continue;
    throw Error(cat("replicas differ after step ", step, ": found weight hash ",
                    hash_text(static_cast<std::uint64_t>(hashes[process])), " on process ", process,
                    ", expected ", hash_text(static_cast<std::uint64_t>(hashes[original])), " as on process ",
                    original));
  }
}

// ---- Validation, checkpoint, end ----

template <class Real>
double Trainer<Real>::State::validation_loss() {
  const Timeline::Range range(&timeline, "validation", 0);
  const auto validation_begin = Clock::now();
  const Index wanted = config.validation().sequences();
  const Index count = wanted == 0 ? validation_set->blocks() : wanted;
  const Index per_micro_batch = sequences_per_micro_batch(config), sequence = model_shape.sequence;
  double loss_sum = 0;
  // Sequence i belongs to data-parallel position i mod data_size.
  for (Index next = mesh->data_index(); next < count;) {
    Index rows = 0;
    for (; rows < per_micro_batch && next < count; ++rows, next += mesh->data_size()) {
      const auto offset = static_cast<std::size_t>(rows * sequence),
                 extent = static_cast<std::size_t>(sequence);
      validation_set->block(next, std::span(tokens).subspan(offset, extent),
                            std::span(targets).subspan(offset, extent));
    }
    const auto extent = static_cast<std::size_t>(rows * sequence);
    loss_sum += model->loss(std::span(tokens).first(extent), std::span(targets).first(extent), rows);
  }
  std::array<double, 1> sum{loss_sum / mesh->shape().tensor};
  world.all_reduce<double>(sum, Reduction::kSum, {Purpose::kControl});
  const double loss = sum[0] / static_cast<double>(count * sequence);

  final_validation = loss;
  if (!best_validation || loss < *best_validation) {
    best_validation = loss;
    best_validation_step = step;
  }
  if (record) {
    ValidationRecord line;
    line.set_step(step);
    line.set_loss(loss);
    line.set_tokens(count * sequence);
    line.set_seconds(seconds_since(validation_begin));
    record->write(line);
    say(cat("step ", step, ": validation loss ", loss, " nats per token"));
  }
  return loss;
}

template <class Real>
std::vector<NamedTensor> Trainer<Real>::State::tensors() {
  auto all = checkpoint_tensors<Real>(std::span<const Parameter<Real>>(model->parameters()));
  const auto state = optimizer->state();
  const auto rest = checkpoint_tensors<Real>(std::span<const StateTensor<Real>>(state));
  all.insert(all.end(), rest.begin(), rest.end());
  return all;
}

template <class Real>
void Trainer<Real>::State::save() {
  const Timeline::Range range(&timeline, "checkpoint", 0);
  CheckpointProgress reached;
  reached.step = step;
  reached.scalars = scalars_of(run_transfers());
  reached.scalars["exchange_seconds"] = exchange_seconds;
  reached.scalars["exposed_seconds"] = exposed_seconds;
  if (last_loss) reached.scalars["last_loss"] = *last_loss;
  reached.scalars["last_factor_bytes"] = static_cast<double>(last_factor_bytes);  // exact below 2^53
  if (best_validation) {
    reached.scalars["best_validation_loss"] = *best_validation;
    reached.scalars["best_validation_step"] = static_cast<double>(best_validation_step);
  }
  std::string config_text;
  google::protobuf::TextFormat::PrintToString(config, &config_text);
  lowband::save_checkpoint(world, checkpoints(), identity(), config_text, reached, tensors());
  agree(world, [&] {
    if (first_process()) keep_latest(checkpoints(), config.checkpoint().keep());
  });
}

// Of every process since the run began; the gather itself is in nobody's figures.
template <class Real>
std::vector<ProcessTraffic> Trainer<Real>::State::gather_traffic() {
  TransferTotals own;
  for (const auto& [key, totals] : world.ledger().total()) own += totals;
  // Byte counts are exact in a double (< 2^53).
  const std::array<double, 2> mine{own.modelled_wire_bytes, static_cast<double>(own.transport_bytes)};
  const auto processes = static_cast<std::size_t>(world.size());
  std::vector<double> all(2 * processes);
  world.all_gather<double>(mine, all, std::vector<Index>(processes, 2), {Purpose::kControl});
  std::vector<ProcessTraffic> traffic(processes);
  for (std::size_t p = 0; p < processes; ++p) {
    traffic[p].set_modelled_wire_bytes(all[2 * p]);
    traffic[p].set_transport_bytes(static_cast<Index>(all[2 * p + 1]));
  }
  return traffic;
}

template <class Real>
RunSummary Trainer<Real>::State::summary() const {
  RunSummary summary;
  const Index own_steps = step - first_step;
  summary.set_name(config.name());
  summary.set_profile(profile.name);
  summary.set_steps(step);
  summary.set_tokens(step * tokens_per_step());
  summary.set_seconds(seconds_since(begin));
  if (step_seconds > 0)
    summary.set_tokens_per_second(static_cast<double>(own_steps * tokens_per_step()) / step_seconds);
  summary.set_processes(world.size());
  if (last_loss) summary.set_final_loss(*last_loss);
  if (final_validation) summary.set_final_validation_loss(*final_validation);
  if (best_validation) summary.set_best_validation_loss(*best_validation);
  summary.set_best_validation_step(best_validation_step);
  summary.set_planned_factor_bytes(optimizer->planned_factor_bytes());
  summary.set_counted_factor_bytes(last_factor_bytes);
  const Index dense_bytes = dense_elements(profile) * dtype_bytes(dtype_of<Real>);
  summary.set_dense_gradient_bytes(dense_bytes);
  if (dense_bytes > 0) {
    summary.set_ratio_to_dense(static_cast<double>(last_factor_bytes) / static_cast<double>(dense_bytes));
  }
  summary.set_optimizer(RunConfig::Optimizer::Kind_Name(config.optimizer().kind()));
  summary.set_exchange(exchange_name(config));
  summary.set_wire_dtype(wire_dtype_name(config));
  summary.set_exchange_seconds(exchange_seconds);
  summary.set_exposed_seconds(exposed_seconds);
  if (exchange_seconds > 0) summary.set_exposed_fraction(exposed_seconds / exchange_seconds);
  Index periodic_bytes = 0;
  for (const TransferSum& sum : run_transfers()) {
    if (sum.purpose() == purpose_name(Purpose::kPeriodic)) periodic_bytes += sum.payload_bytes();
    *summary.add_transfers() = sum;
  }
  summary.set_periodic_bytes(periodic_bytes);
  summary.set_periodic_bytes_per_step(static_cast<double>(periodic_bytes) / static_cast<double>(step));
  return summary;
}

template <class Real>
Trainer<Real>::Trainer(const RunConfig& config, Communicator& world, const TrainingSession& session)
    : state_(std::make_unique<State>(config, world, session)) {}

template <class Real>
Trainer<Real>::~Trainer() = default;

template <class Real>
RunOutcome Trainer<Real>::run() {
  State& s = *state_;
  const auto& checkpoint = s.config.checkpoint();
  if (s.complete) return {s.first_process() ? read_run_summary(s.directory) : RunSummary(), false};
  bool stopped = false;
  while (s.step < s.steps() && !stopped) {
    stopped = s.take_step().stop && s.step < s.steps();
    const bool last = s.step == s.steps();
    if (s.at_interval(s.config.hash_interval_steps()) || last) s.check_replicas_agree();
    if (s.validation_set && !stopped && (s.at_interval(s.config.validation().interval_steps()) || last)) {
      s.validation_loss();
    }
    if (stopped || last || s.at_interval(checkpoint.interval_steps())) s.save();
  }
  if (s.first_step == s.steps() && s.validation_set) s.validation_loss();  // only the summary was missing
  s.timeline.write();
  RunOutcome outcome;
  outcome.interrupted = stopped;
  if (s.progress) s.progress->finish();
  if (stopped) return outcome;
  RunSummary summary = s.summary();
  for (ProcessTraffic& process : s.gather_traffic()) *summary.add_traffic() = std::move(process);
  if (!s.first_process()) return outcome;
  outcome.summary = std::move(summary);
  s.record->write(outcome.summary);
  return outcome;
}

template <class Real>
double Trainer<Real>::step() {
  return state_->take_step().loss;
}

template <class Real>
double Trainer<Real>::validate() {
  LB_EXPECTS(state_->validation_set, "data.validation: found nothing, expected token shards to validate on");
  return state_->validation_loss();
}

template <class Real>
void Trainer<Real>::save_checkpoint() {
  state_->save();
}

template <class Real>
Index Trainer<Real>::next_step() const {
  return state_->step;
}

template <class Real>
std::span<const Parameter<Real>> Trainer<Real>::parameters() const {
  return state_->model->parameters();
}

template class Trainer<float>;
template class Trainer<double>;

RunOutcome train(const RunConfig& config, Communicator& world, const TrainingSession& session) {
  if (config.precision() == RunConfig::F64) return Trainer<double>(config, world, session).run();
  return Trainer<float>(config, world, session).run();
}

}  // namespace lowband
