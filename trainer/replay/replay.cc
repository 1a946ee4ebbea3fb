#include "trainer/replay/replay.h"

#include "collectives/agreement.h"
#include "collectives/process_device.h"
#include "optimizers/sharded_optimizer.h"
#include "runtime/json.h"
#include "runtime/version.h"
#include "sharding/budget.h"
#include "trainer/config/schedule.h"
#include "trainer/data/content_hash.h"
#include "trainer/host_copies.h"
#include "trainer/replay/replay_account.h"

#include <array>
#include <chrono>
#include <optional>

#include <google/protobuf/text_format.h>

namespace lowband {
namespace {

using Clock = std::chrono::steady_clock;

// The device of this process while it replays, where the configuration asks for one.
struct OnDevice {
  OnDevice(Communicator& world, const RunConfig& config) {
    if (config.device() != RunConfig::CUDA) return;
    own = open_device_of(world, "device: found CUDA", "CPU");
    scope.emplace(world, *own.device);
  }
  ProcessDevice own;
  std::optional<DeviceScope> scope;
};

template <class Real>
class Replay {
 public:
  Replay(const ReplayRequest& request, ReplayPlan plan, Communicator& world)
      : request_(request),
        plan_(std::move(plan)),
        world_(&world),
        on_device_(world, plan_.config),
        mesh_(world, mesh_shape(plan_.config)) {
    hold_parameters();
    optimizer_.emplace(mesh_, parameters_, plan_.profile, optimizer_options(plan_.config));
  }

  ReplaySummary run();

 private:
  void hold_parameters();
  void read_beginning();
  void expect_one_state();
  void check_gradients();
  ReplayStart start() const;
  ReplayStep take_step(Index step);
  void count(ReplayStep& line, bool diagnosed);
  std::string weight_hash();
  void write(const std::string& lines);

  bool first_process() const { return world_->process() == 0; }
  int replica() const { return mesh_.position().replica; }
  bool diagnoses(Index step) const;
  // In host memory, as files are read and written.
  std::vector<TensorPiece<Real>> weights(HostCopies<Real>& copies) {
    return weight_pieces<Real>(plan_.parameters, copies.weights_of(parameters_), mesh_.shape());
  }
  std::vector<TensorPiece<Real>> gradients(HostCopies<Real>& copies) {
    std::vector<Parameter<Real>> of_gradients = parameters_;
    for (Parameter<Real>& parameter : of_gradients) parameter.weight = copies.of(parameter.gradient);
    return weight_pieces<Real>(plan_.parameters, of_gradients, mesh_.shape());
  }
  std::vector<TensorPiece<Real>> state(HostCopies<Real>& copies) {
    return state_pieces<Real>(plan_.parameters, copies.of(optimizer_->state()), mesh_.shape());
  }

  const ReplayRequest& request_;
  ReplayPlan plan_;
  Communicator* world_;
  OnDevice on_device_;
  ProcessMesh mesh_;
  std::vector<Buffer<Real>> storage_;  // weight, then gradient, of every parameter
  std::vector<Parameter<Real>> parameters_;
  std::optional<ShardedOptimizer<Real>> optimizer_;
};

template <class Real>
void Replay<Real>::hold_parameters() {
  for (const RecordedParameter& parameter : plan_.parameters) {
    const PiecePlace place = parameter_place(parameter.info, mesh_.shape(), mesh_.position());
    const Index rows = place.block_rows.size(), cols = place.block_cols.size();
    Buffer<Real>& buffer = storage_.emplace_back(2 * rows * cols, world_->device());
    parameters_.push_back(
        {parameter.info, buffer.matrix(0, rows, cols), buffer.matrix(rows * cols, rows, cols)});
  }
}

template <class Real>
void Replay<Real>::read_beginning() {
  agree(*world_, [&] {
    const SafetensorsFile file(request_.folder / kWeightsFile);
    file.expect_finite<Real>();
    HostCopies<Real> copies;
    read_pieces<Real>(file, weights(copies), mesh_.position());
    copies.put_back();
    if (request_.state.empty()) return;
    // One file for all replicas, or one for each.
    const bool shared = std::filesystem::exists(request_.state);
    const SafetensorsFile state(shared ? request_.state
                                       : state_file_of(request_.state, replica(), plan_.steps.replicas));
    HostCopies<Real> state_copies;
    const auto pieces = this->state(state_copies);
    expect_tensors<Real>(state, pieces);
    state.expect_finite<Real>();
    read_pieces<Real>(state, pieces, mesh_.position());
    state_copies.put_back();
  });
  if (!request_.state.empty()) expect_one_state();
}

// Processes with the same piece of what replicas have in common must have read the same bits.
template <class Real>
void Replay<Real>::expect_one_state() {
  HostCopies<Real> copies;
  const auto pieces = state(copies);
  const auto processes = static_cast<std::size_t>(mesh_.replica().size());
  std::vector<Index> hashes, all(processes * pieces.size());
  for (const auto& piece : pieces) {
    const bool own = differs_between_replicas(piece.name.substr(piece.name.rfind('.') + 1));
    hashes.push_back(own ? 0 : static_cast<Index>(content_hash(std::as_bytes(piece.elements))));
  }
  mesh_.replica().all_gather<Index>(hashes, all, std::vector<Index>(processes, std::ssize(hashes)),
                                    {Purpose::kControl});
  agree(*world_, [&] {
    for (std::size_t k = 0; k < all.size(); ++k)
      LB_EXPECTS(all[k] == hashes[k % hashes.size()], request_.state.string(), ": ",
                 pieces[k % hashes.size()].name, ": found other numbers for replica ", k / hashes.size(),
                 " than for replica ", replica(), ", expected the same");
  });
}

// The processes of a replica share its files.
template <class Real>
void Replay<Real>::check_gradients() {
  const Communicator& within = mesh_.within_replica();
  HostCopies<Real> copies;
  const auto expected = gradients(copies);
  agree(*world_, [&] {
    for (Index i = within.process(); i < plan_.steps.count; i += within.size()) {
      const SafetensorsFile file(plan_.steps.file(plan_.steps.first + i, replica()));
      expect_tensors<Real>(file, expected);
      file.expect_finite<Real>();
    }
  });
}

template <class Real>
bool Replay<Real>::diagnoses(Index step) const {
  if (!feeds_back(optimizer_options(plan_.config).kind)) return false;
  const auto& diagnostics = plan_.config.diagnostics();
  const Index interval = diagnostics.has_interval_steps() ? diagnostics.interval_steps() : 1;
  const bool last = step + 1 == plan_.steps.first + plan_.steps.count;
  return interval > 0 && ((step + 1) % interval == 0 || last);
}

template <class Real>
ReplayStart Replay<Real>::start() const {
  ReplayStart line;
  line.set_folder(request_.folder.string());
  line.set_state(request_.state.string());
  google::protobuf::TextFormat::PrintToString(plan_.config, line.mutable_config_text());
  line.set_optimizer(RunConfig::Optimizer::Kind_Name(plan_.config.optimizer().kind()));
  line.set_profile(plan_.profile.name);
  line.set_replica(mesh_.shape().replica);
  line.set_shard(mesh_.shape().shard);
  line.set_tensor(mesh_.shape().tensor);
  line.set_first_step(plan_.steps.first);
  line.set_steps(plan_.steps.count);
  Index elements = 0;
  for (const RecordedParameter& parameter : plan_.parameters) elements += parameter.info.elements();
  line.set_parameters(elements);
  const Index first = plan_.steps.first;
  const StepBytes planned = optimizer_->planned().mean(first, first + plan_.steps.count);
  line.set_planned_factor_bytes(planned.factor);
  line.set_planned_dense_bytes(planned.dense);
  line.set_dense_gradient_bytes(dense_elements(plan_.profile) * Index{sizeof(Real)});
  line.set_version(std::string(version()));
  line.set_communicator(std::string(world_->backend()));
  line.set_device(on_device_.own.description);
  return line;
}

template <class Real>
ReplayStep Replay<Real>::take_step(Index step) {
  world_->ledger().begin_step(step + 1);
  agree(*world_, [&] {
    HostCopies<Real> copies;
    const SafetensorsFile file(plan_.steps.file(step, replica()));
    read_pieces<Real>(file, gradients(copies), mesh_.position());
    copies.put_back();
  });
  const RunConfig& config = plan_.config;
  const double factor = config.has_schedule() ? learning_rate_factor(config.schedule(), step) : 1.0;
  const double learning_rate = factor * config.optimizer().learning_rate();
  const bool diagnosed = diagnoses(step);
  const StepReport report =
      optimizer_->step({step, learning_rate, factor * scalar_learning_rate(config), diagnosed});
  ReplayStep line;
  line.set_step(step);
  line.set_learning_rate(learning_rate);
  line.set_gradient_norm(report.gradient_norm);
  line.set_clip_scale(report.clip_scale);
  line.set_skipped_matrices(report.skipped_matrices);
  line.set_skipped_other(report.skipped_other);
  line.set_optimizer_seconds(report.seconds);
  for (const MatrixDiagnostics& found : report.diagnostics) {
    ReplayedMatrix& matrix = *line.add_matrices();
    matrix.set_name(found.name);
    matrix.set_drift(found.drift);
    matrix.set_mass_leak(found.mass_leak);
    matrix.set_captured_energy(found.captured_energy);
    matrix.set_dead_columns(found.dead_columns);
  }
  count(line, diagnosed);
  return line;
}

// What the ledgers counted must be what was planned, as in training.
template <class Real>
void Replay<Real>::count(ReplayStep& line, bool diagnosed) {
  const auto counted = [&](Purpose purpose) {
    return static_cast<double>(world_->ledger().step_sum("replica", purpose).payload_bytes);
  };
  std::array<double, 3> sums{counted(Purpose::kFactor), counted(Purpose::kDense),
                             counted(Purpose::kPeriodic)};
  world_->all_reduce<double>(sums, Reduction::kSum, {Purpose::kControl});
  const auto of_a_replica = [&](double sum) { return static_cast<Index>(sum) / mesh_.shape().replica; };
  line.set_counted_factor_bytes(of_a_replica(sums[0]));
  line.set_counted_dense_bytes(of_a_replica(sums[1]));
  line.set_counted_periodic_bytes(of_a_replica(sums[2]));
  const auto expect_planned = [&](std::string_view what, Index found, Index planned) {
    if (found != planned)
      throw Error(cat("step ", line.step(), ": found ", found, " bytes of ", what,
                      " counted on the replica axis, expected ", planned, " as planned"));
  };
  const StepBytes planned = optimizer_->planned().of(line.step());
  expect_planned("factors", line.counted_factor_bytes(), planned.factor);
  expect_planned("dense tensors", line.counted_dense_bytes(), planned.dense);
  expect_planned("diagnostics", line.counted_periodic_bytes(),
                 diagnosed ? optimizer_->planned_periodic_bytes() : 0);
}

// Of whole tensors, so that it does not depend on the mesh. Replicas must have the same.
template <class Real>
std::string Replay<Real>::weight_hash() {
  std::uint64_t hash = 0;  // each tensor's seeded with that of those before it
  HostCopies<Real> copies;
  for (const TensorPiece<Real>& piece : weights(copies)) {
    const std::vector<Real> whole = gather_whole(mesh_, piece);
    hash = content_hash(std::as_bytes(std::span(whole)), hash);
  }
  const auto mine = static_cast<Index>(hash);
  const auto processes = static_cast<std::size_t>(world_->size());
  std::vector<Index> hashes(processes);
  world_->all_gather<Index>({&mine, 1}, hashes, std::vector<Index>(processes, 1), {Purpose::kControl});
  for (std::size_t p = 0; p < processes; ++p) {
    if (hashes[p] == hashes[0]) continue;
    throw Error(cat("replicas differ after the last step: found weight hash ",
                    hash_text(static_cast<std::uint64_t>(hashes[p])), " on process ", p, ", expected ",
                    hash_text(static_cast<std::uint64_t>(hashes[0])), " as on process 0"));
  }
  return hash_text(hash);
}

template <class Real>
void Replay<Real>::write(const std::string& lines) {
  const auto& output = request_.output;
  HostCopies<Real> copies;
  const auto whole = weights(copies);
  write_whole_tensors<Real>(mesh_, replica() == 0 ? output / kWeightsFile : "", whole);
  write_whole_tensors<Real>(mesh_, state_file_of(output / kStateFile, replica(), plan_.steps.replicas),
                            state(copies));
  agree(*world_, [&] {
    if (!first_process()) return;
    DurableFile file(output / "replay.jsonl");
    file.append(lines);
    file.commit();
  });
}

template <class Real>
ReplaySummary Replay<Real>::run() {
  const auto begin = Clock::now();
  read_beginning();
  check_gradients();
  agree(*world_, [&] {
    if (first_process()) require_writable_directory(request_.output);
  });

  ReplayAccount account(start(), plan_, request_.output.string());
  for (Index i = 0; i < plan_.steps.count; ++i) account.add(take_step(plan_.steps.first + i));
  const std::string hash = weight_hash();
  account.finish(hash, std::chrono::duration<double>(Clock::now() - begin).count());
  write(account.lines());
  return account.summary();
}

}  // namespace

ReplaySummary replay(const ReplayRequest& request, Communicator& world) {
  ReplayPlan plan;
  agree(world, [&] {
    plan = plan_replay(request);
    validate(mesh_shape(plan.config), world.size());
    world.set_determinism(determinism(plan.config));
  });
  using Milliseconds = std::chrono::milliseconds;
  world.set_deadline(
      Milliseconds(static_cast<Milliseconds::rep>(1000 * plan.config.collective_deadline_seconds())));
  if (plan.config.precision() == RunConfig::F64) return Replay<double>(request, std::move(plan), world).run();
  return Replay<float>(request, std::move(plan), world).run();
}

}  // namespace lowband
