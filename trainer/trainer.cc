#include "trainer/trainer.h"

#include "collectives/agreement.h"
#include "trainer/byte_plan.h"
#include "trainer/trainer_state.h"

#include <algorithm>
#include <chrono>

#include <glob.h>

namespace lowband {
namespace {

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
  return rank_profile(config, parameter_table(config));
}

}  // namespace

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
  if (config.device() == RunConfig::CUDA) {
    device = open_device_of(world, "device: found CUDA", "CPU");
    device_of_world.emplace(world, *device.device);
  }
  mesh.emplace(world, mesh_shape(config));
  allow_planned(world.budget(), config, mesh->position());
  model = make_model<Real>(model_shape, mesh->tensor(), config.seed(), sequences_per_micro_batch(config),
                           device_model_options(config));
  for (Parameter<Real>& parameter : model->parameters())
    parameter.info = with_blocks(config, std::move(parameter.info));
  optimizer.emplace(*mesh, model->parameters(), profile, optimizer_options(config));
  const auto micro_batch_tokens =
      static_cast<std::size_t>(sequences_per_micro_batch(config) * model_shape.sequence);
  tokens.resize(micro_batch_tokens);
  targets.resize(micro_batch_tokens);
  resume();
  if (config.has_dump()) {
    dump.emplace(config.dump().folder(), config.dump().first_step(), config.dump().steps(), *mesh,
                 std::span<const Parameter<Real>>(model->parameters()));
    dump->prepare(step);
  }
  open_record();
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
  for (ProcessTraffic& process : s.gather_traffic()) {
    summary.set_state_bytes(std::max(summary.state_bytes(), process.state_bytes()));
    summary.set_peak_memory_bytes(std::max(summary.peak_memory_bytes(), process.peak_memory_bytes()));
    *summary.add_traffic() = std::move(process);
  }
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
