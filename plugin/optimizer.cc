#include "collectives/agreement.h"
#include "optimizers/sharded_optimizer.h"
#include "optimizers/state_place.h"
#include "plugin/description.h"
#include "plugin/world.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <deque>
#include <limits>
#include <map>

using lowband::Index;

/// What `lowband_optimizer` points at: ShardedOptimizer for either element type behind one face.
struct lowband_optimizer {
  lowband_optimizer(lowband_world& world_, std::unique_ptr<lowband::Device> device_)
      : world(world_), device(std::move(device_)) {
    world.has_optimizer = true;
    world.communicator->set_device(device.get());
  }
  virtual ~lowband_optimizer() {
    world.communicator->set_device(nullptr);
    world.has_optimizer = false;
  }
  lowband_optimizer(const lowband_optimizer&) = delete;
  lowband_optimizer& operator=(const lowband_optimizer&) = delete;

  virtual void rebind(Index parameter, void* weight, void* gradient) = 0;
  virtual void gradient_ready(Index parameter) = 0;
  virtual lowband::PendingReport step(const lowband::StepInfo& info) = 0;
  virtual const lowband::PlannedTraffic& planned() const = 0;

  /// Transfers from here on belong to the next step; called by whatever may start one.
  void begin_step() {
    if (!in_step) world.communicator->ledger().begin_step(next_step + 1);
    in_step = true;
  }

  lowband_world& world;
  std::unique_ptr<lowband::Device> device;  // null: the host
  bool in_step = false;
  Index next_step = 0;
  std::vector<std::vector<Index>> factor_ranks;    // by parameter, and in each by matrix
  std::vector<std::vector<std::string>> matrices;  // names, likewise
  std::vector<std::string> names;                  // by parameter
  std::vector<lowband_state_piece> pieces;
  std::vector<lowband_state_place> places;  // of the pieces
  std::deque<std::string> piece_names;
  std::map<std::string, lowband::MatrixDiagnostics> diagnoses;  // of the last step, by matrix
  std::optional<lowband::PendingReport> last_report;
  double agreeing_seconds = 0;  // of the last step, which its report does not know
};

namespace lowband::plugin {
namespace {

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

lowband_state_place place_of(std::string_view piece, Index cols, std::span<const ParameterInfo> infos,
                             const ProcessMesh& mesh) {
  const std::size_t dot = piece.rfind('.');
  const std::string_view letter = piece.substr(dot + 1);
  const auto info = std::ranges::find(infos, piece.substr(0, dot), &ParameterInfo::name);
  LB_EXPECTS(info != infos.end(), "state: found ", piece, ", expected a piece of a parameter");
  const PiecePlace found = state_place(*info, letter, cols, mesh.shape(), mesh.position());
  lowband_state_place place;
  clear(&place);
  place.rows = found.rows;
  place.cols = found.cols;
  place.row_begin = found.block_rows.begin;
  place.row_end = found.block_rows.end;
  place.col_begin = found.block_cols.begin;
  place.col_end = found.block_cols.end;
  place.element_begin = found.elements.begin;
  place.element_end = found.elements.end;
  place.differs_between_replicas = differs_between_replicas(letter) ? 1 : 0;
  return place;
}

template <class Real>
struct BoundOptimizer final : lowband_optimizer {
  BoundOptimizer(lowband_world& world_, std::unique_ptr<Device> device_, Index options_device,
                 const MeshShape& shape, std::span<const lowband_parameter> described,
                 std::span<const ParameterInfo> infos, const RankProfile& profile,
                 const OptimizerOptions& options)
      : lowband_optimizer(world_, std::move(device_)),
        mesh(*world_.communicator, shape),
        parameters(bound_parameters<Real>(described, infos, shape, mesh.position(), device.get())),
        optimizer(mesh, parameters, profile, options) {
    for (const StateTensor<Real>& tensor : optimizer.state()) {
      piece_names.push_back(tensor.name);
      lowband_state_piece piece;
      clear(&piece);
      piece.name = piece_names.back().c_str();
      piece.dtype = std::is_same_v<Real, float> ? LOWBAND_F32 : LOWBAND_F64;
      piece.rows = tensor.value.rows;
      piece.cols = tensor.value.cols;
      piece.row_stride = tensor.value.row_stride;
      piece.data = tensor.value.data;
      piece.device = tensor.value.device != nullptr ? options_device : -1;
      pieces.push_back(piece);
      places.push_back(place_of(tensor.name, tensor.value.cols, infos, mesh));
    }
  }

  void rebind(Index parameter, void* weight, void* gradient) override {
    const Parameter<Real>& bound = parameters[at(parameter)];
    expect_place(weight, bound.weight.elements(), device.get(), "weight");
    expect_place(gradient, bound.gradient.elements(), device.get(), "gradient");
    optimizer.rebind(parameter, static_cast<Real*>(weight), static_cast<Real*>(gradient));
  }
  void gradient_ready(Index parameter) override { optimizer.gradient_ready(parameter); }
  PendingReport step(const StepInfo& info) override { return optimizer.step(info); }
  const PlannedTraffic& planned() const override { return optimizer.planned(); }

  ProcessMesh mesh;
  std::vector<Parameter<Real>> parameters;
  ShardedOptimizer<Real> optimizer;
};

// Null for options.device = -1.
std::unique_ptr<Device> opened(const lowband_options& options) {
  LB_EXPECTS(options.device >= -1 && options.device <= std::numeric_limits<int>::max(),
             "options.device: found ", options.device,
             ", expected a CUDA device of this process, or -1 for the host");
  if (options.device == -1) return nullptr;
  LB_EXPECTS(options.dtype == LOWBAND_F32, "options.dtype: found float64 with options.device ",
             options.device, ", expected float32, in which devices compute");
  LB_EXPECTS(options.overlap == 0, "options.overlap: found ", options.overlap, " with options.device ",
             options.device, ", expected 0: there an exchange begins in lowband_step");
  try {
    return open_device(static_cast<int>(options.device));
  } catch (const CudaError& error) {
    throw InvalidArgument(
        cat("options.device: found ", options.device,
            ", expected a CUDA device of this process, or -1 for the host: ", error.what()));
  }
}

// The facts of process 0, line by line, are those of everybody.
void expect_equal_everywhere(Communicator& world, const std::vector<std::string>& own) {
  std::string text;
  for (const std::string& line : own) text += line + "\n";
  Index bytes = std::ssize(text);
  world.broadcast<Index>({&bytes, 1}, 0, {Purpose::kControl});
  std::string of_first = text;
  of_first.resize(at(bytes));
  world.broadcast<std::uint8_t>({reinterpret_cast<std::uint8_t*>(of_first.data()), of_first.size()}, 0,
                                {Purpose::kControl});
  agree(world, [&] {
    std::istringstream lines(of_first);
    std::string expected;
    for (const std::string& found : own) {
      if (!std::getline(lines, expected)) expected = "nothing more";
      LB_EXPECTS(found == expected, "found ", found, "; expected, as on process 0, ", expected);
    }
    LB_EXPECTS(!std::getline(lines, expected), "found nothing more; expected, as on process 0, ", expected);
  });
}

/// The step of a period that sends most between replicas.
StepBytes largest_step(const PlannedTraffic& planned) {
  StepBytes largest;
  for (Index step = 0; step < 2 * planned.period(); ++step) {
    const StepBytes bytes = planned.of(step);
    if (bytes.factor + bytes.dense > largest.factor + largest.dense) largest = bytes;
  }
  return largest;
}

void expect_within_budget(const StepBytes& planned, const lowband_options& options,
                          const RankProfile& profile) {
  if (options.budget_bytes < 0 || planned.factor + planned.dense <= options.budget_bytes) return;
  Index bytes_per_rank = 0;
  for (const ParameterInfo& matrix : profile.matrices)
    bytes_per_rank += (matrix.rows + matrix.cols) * (options.bf16_factors != 0      ? 2
                                                     : options.dtype == LOWBAND_F32 ? 4
                                                                                    : 8);
  const Index rank_that_fits =
      bytes_per_rank > 0 ? (options.budget_bytes - planned.dense) / bytes_per_rank : 0;
  throw BudgetExceeded(cat("options.budget_bytes: found a plan of ", planned.factor + planned.dense,
                           " bytes a step (factors ", planned.factor, ", dense ", planned.dense,
                           "), expected at most ", options.budget_bytes,
                           rank_that_fits >= 1 ? cat("; uniform rank ", rank_that_fits, " fits") : ""));
}

// Of this process, exactly what its pieces are planned to send, parameter by parameter.
void limit_to_plan(ByteBudget& budget, std::span<const ParameterInfo> infos,
                   std::span<const std::vector<Index>> factor_ranks, const MeshShape& shape,
                   const MeshPosition& position, const OptimizerOptions& options, DType computed) {
  budget = {};
  budget.allow("replica", Purpose::kFactor, 0);
  budget.allow("replica", Purpose::kDense, 0);
  budget.allow("within_replica", Purpose::kUpdate, 0);
  for (std::size_t i = 0; i < infos.size(); ++i) {
    for (const PlannedTransfer& transfer :
         planned_transfers(infos[i], factor_ranks[i], shape, position, options, computed))
      budget.allow(transfer.axis, transfer.purpose, transfer.bytes, infos[i].name, transfer.phase);
  }
}

std::unique_ptr<lowband_optimizer> make_optimizer(lowband_world& world,
                                                  std::span<const lowband_parameter> described,
                                                  const lowband_options& options) {
  Communicator& everyone = *world.communicator;
  MeshShape shape;
  OptimizerOptions own_options;
  std::vector<ParameterInfo> infos;
  RankProfile profile;
  std::vector<std::string> own_facts;
  std::unique_ptr<Device> device;
  agree(everyone, [&] {
    LB_EXPECTS(!world.has_optimizer, "world: found one with an optimizer, expected that to be freed before");
    shape = mesh_shape(options, everyone.size());
    own_options = optimizer_options(options);
    infos = parameter_infos(described);
    profile = rank_profile(options, described, infos);
    own_facts = facts(options, described);
    device = opened(options);
    bound_parameters<float>(described, infos, shape, mesh_position(shape, everyone.process()), device.get());
  });
  expect_equal_everywhere(everyone, own_facts);

  std::unique_ptr<lowband_optimizer> optimizer;
  if (options.dtype == LOWBAND_F32) {
    optimizer = std::make_unique<BoundOptimizer<float>>(world, std::move(device), options.device, shape,
                                                        described, infos, profile, own_options);
  } else {
    optimizer = std::make_unique<BoundOptimizer<double>>(world, nullptr, -1, shape, described, infos, profile,
                                                         own_options);
  }
  for (const ParameterInfo& info : infos) {
    optimizer->names.push_back(info.name);
    std::vector<std::string>& matrices = optimizer->matrices.emplace_back();
    for (const ParameterInfo& matrix : matrices_of(info)) matrices.push_back(matrix.name);
  }
  optimizer->factor_ranks = exchanges_factors(own_options.kind)
                                ? ranks_by_parameter(profile, infos)
                                : std::vector<std::vector<Index>>(infos.size());
  expect_within_budget(largest_step(optimizer->planned()), options, profile);
  limit_to_plan(everyone.budget(), infos, optimizer->factor_ranks, shape,
                mesh_position(shape, everyone.process()), own_options,
                options.dtype == LOWBAND_F32 ? DType::kF32 : DType::kF64);
  return optimizer;
}

// What one process alone got wrong is refused by all, before anything is exchanged.
void expect_equal_info(Communicator& world, const lowband_step_info& info) {
  constexpr std::array kFields{"step", "learning_rate", "scalar_learning_rate", "diagnose"};
  constexpr auto kCount = static_cast<Index>(kFields.size());
  const std::array<double, kFields.size()> own{static_cast<double>(info.step), info.learning_rate,
                                               info.scalar_learning_rate, info.diagnose != 0 ? 1.0 : 0.0};
  std::vector<double> all(at(kCount * world.size()));
  world.all_gather<double>(own, all, std::vector<Index>(at(world.size()), kCount), {Purpose::kControl});
  for (Index i = 0; i < std::ssize(all); ++i) {
    const auto field = cat("[process ", i / kCount, " of ", world.size(), "] info.", kFields[at(i % kCount)]);
    LB_EXPECTS(std::isfinite(all[at(i)]) && all[at(i)] >= 0, field, ": found ", all[at(i)],
               ", expected 0 or more");
    LB_EXPECTS(all[at(i)] == all[at(i % kCount)], field, ": found ", all[at(i)],
               "; expected, as on process 0, ", all[at(i % kCount)]);
  }
}

void expect_parameter(const lowband_optimizer* optimizer, Index parameter) {
  expect_pointer(optimizer, "optimizer");
  LB_EXPECTS(parameter >= 0 && parameter < std::ssize(optimizer->names), "parameter: found ", parameter,
             ", expected 0 .. ", std::ssize(optimizer->names) - 1);
}

void expect_block(const lowband_optimizer* optimizer, Index parameter, Index block) {
  expect_parameter(optimizer, parameter);
  const Index blocks = std::ssize(optimizer->matrices[at(parameter)]);
  LB_EXPECTS(block >= 0 && block < blocks, "block of ", optimizer->names[at(parameter)], ": found ", block,
             ", expected 0 .. ", blocks - 1);
}

void expect_one_matrix(const lowband_optimizer* optimizer, Index parameter, const char* of_blocks) {
  expect_parameter(optimizer, parameter);
  const Index blocks = std::ssize(optimizer->matrices[at(parameter)]);
  LB_EXPECTS(blocks == 1, "parameter: found ", optimizer->names[at(parameter)], " of ", blocks,
             " blocks, expected one without: ", of_blocks);
}

void expect_piece(const lowband_optimizer* optimizer, Index index) {
  expect_pointer(optimizer, "optimizer");
  LB_EXPECTS(index >= 0 && index < std::ssize(optimizer->pieces), "index: found ", index, ", expected 0 .. ",
             std::ssize(optimizer->pieces) - 1);
}

void write(const StepReport& from, lowband_step_report& to) {
  to.gradient_norm = from.gradient_norm;
  to.clip_scale = from.clip_scale;
  to.skipped_matrices = from.skipped_matrices;
  to.skipped_other = from.skipped_other;
  to.dead_columns = from.dead_columns;
  to.householder_fallbacks = from.householder_fallbacks;
  to.seconds = from.seconds;
  to.communication_seconds = from.communication_seconds;
  to.exposed_seconds = from.exposed_seconds;
}

/// Of the last step; waits for the device, the first time.
void write_last(lowband_optimizer& optimizer, lowband_step_report& to) {
  StepReport found = optimizer.last_report->get();
  for (double* seconds : {&found.seconds, &found.communication_seconds, &found.exposed_seconds})
    *seconds += optimizer.agreeing_seconds;
  write(found, to);
}

Index factor_rank_of(const lowband_optimizer& optimizer, Index parameter, Index block) {
  const std::vector<Index>& ranks = optimizer.factor_ranks[at(parameter)];
  return ranks.empty() ? 0 : ranks[at(block)];
}

void write_diagnosis(const lowband_optimizer& optimizer, Index parameter, Index block,
                     lowband_diagnosis& to) {
  const std::string& name = optimizer.matrices[at(parameter)][at(block)];
  const auto found = optimizer.diagnoses.find(name);
  LB_EXPECTS(found != optimizer.diagnoses.end(), "diagnosis of ", name,
             ": found none, expected a matrix that travels as factors, after a step with info.diagnose");
  to.drift = found->second.drift;
  to.mass_leak = found->second.mass_leak;
  to.captured_energy = found->second.captured_energy;
  to.dead_columns = found->second.dead_columns;
}

constexpr std::size_t kOptionsBytesOfVersion2 = offsetof(lowband_options, sign);
constexpr std::size_t kOptionsBytesOfVersion3 = offsetof(lowband_options, parameter_bytes);
constexpr std::size_t kOptionsBytesOfVersion4 = offsetof(lowband_options, device);
constexpr std::size_t kStepInfoBytesOfVersion4 = offsetof(lowband_step_info, stream);
constexpr std::size_t kPieceBytesOfVersion4 = offsetof(lowband_state_piece, device);
constexpr std::size_t kParameterBytesOfVersion3 = offsetof(lowband_parameter, blocks);

/// What an earlier version did not know has its default.
lowband_options complete_options(const lowband_options& options) {
  lowband_options complete;
  lowband_options_defaults(&complete);
  complete.parameter_bytes = kParameterBytesOfVersion3;  // of all versions before
  std::memcpy(&complete, &options, at(options.struct_bytes));
  complete.struct_bytes = static_cast<std::int64_t>(sizeof complete);
  return complete;
}

lowband_step_info complete_step_info(const lowband_step_info& info) {
  lowband_step_info complete;
  clear(&complete);
  std::memcpy(&complete, &info, at(info.struct_bytes));
  return complete;
}

std::vector<lowband_parameter> complete_parameters(const lowband_parameter* parameters, Index count,
                                                   Index parameter_bytes) {
  std::vector<lowband_parameter> complete(at(count));
  for (Index i = 0; i < count; ++i)
    std::memcpy(&complete[at(i)], reinterpret_cast<const std::byte*>(parameters) + i * parameter_bytes,
                at(parameter_bytes));
  return complete;
}

using Totals = std::map<Ledger::Key, TransferTotals>;
void write_sum(const Totals& totals, const char* axis, int32_t purpose, lowband_bytes* bytes) {
  expect_pointer(axis, "axis");
  expect_struct(bytes, "bytes");
  LB_EXPECTS(purpose >= 0 && purpose < std::ssize(kPurposes), "purpose: found ", purpose,
             ", expected 0 (factor) .. 6 (periodic)");
  TransferTotals sum;
  for (const auto& [key, part] : totals) {
    if (key.purpose == kPurposes[at(purpose)] && (*axis == '\0' || key.axis == axis)) sum += part;
  }
  bytes->calls = sum.calls;
  bytes->payload_bytes = sum.payload_bytes;
  bytes->modelled_wire_bytes = sum.modelled_wire_bytes;
  bytes->transport_bytes = sum.transport_bytes;
  bytes->seconds = sum.seconds;
}

}  // namespace
}  // namespace lowband::plugin

using namespace lowband::plugin;

void lowband_options_defaults(lowband_options* options) {
  clear(options);
  const lowband::OptimizerOptions own;
  const lowband::ProfileSpec profile;
  options->mesh_shard = 1;
  options->mesh_tensor = 1;
  options->mu = own.mu;
  options->lambda = own.lambda;
  options->weight_decay = own.weight_decay;
  options->adamw_beta1 = own.adamw_beta1;
  options->adamw_beta2 = own.adamw_beta2;
  options->adamw_epsilon = own.adamw_epsilon;
  options->scalar_kind = LOWBAND_ADAMW;
  options->sgd_momentum = own.sgd_momentum;
  options->lion_beta1 = own.lion_beta1;
  options->lion_beta2 = own.lion_beta2;
  options->clip_norm = own.clip_norm;
  options->bucket_elements = own.bucket_elements;
  options->scale = profile.scale;
  options->fraction_numerator = profile.fraction_numerator;
  options->fraction_denominator = profile.fraction_denominator;
  options->budget_bytes = -1;
  options->sign = static_cast<std::int32_t>(own.sign);
  options->update_scale = static_cast<std::int32_t>(own.update_scale);
  options->normuon_beta2 = own.normuon_beta2;
  options->muonbp_period = own.muonbp_period;
  options->muonbp_block_rate = own.muonbp_block_rate;
  options->dion2_numerator = own.dion2_numerator;
  options->dion2_denominator = own.dion2_denominator;
  options->spectra_fraction = own.spectra_fraction;
  options->spectra_iterations = own.spectra_iterations;
  options->galore_scale = own.galore_scale;
  options->galore_interval = own.galore_interval;
  options->parameter_bytes = sizeof(lowband_parameter);
  options->device = -1;
}

void lowband_step_info_defaults(lowband_step_info* info) { clear(info); }
void lowband_step_report_defaults(lowband_step_report* report) { clear(report); }
void lowband_bytes_defaults(lowband_bytes* bytes) { clear(bytes); }
void lowband_diagnosis_defaults(lowband_diagnosis* diagnosis) { clear(diagnosis); }
void lowband_state_piece_defaults(lowband_state_piece* piece) { clear(piece); }
void lowband_state_place_defaults(lowband_state_place* place) { clear(place); }

lowband_status lowband_optimizer_create(lowband_world* world, const lowband_parameter* parameters,
                                        int64_t parameter_count, const lowband_options* options,
                                        lowband_optimizer** optimizer) {
  if (world == nullptr) return guarded([&] { expect_pointer(world, "world"); });
  return guarded_collective(*world, [&] {
    lowband::agree(*world->communicator, [&] {
      expect_pointer(optimizer, "optimizer");
      expect_struct(options, "options",
                    {kOptionsBytesOfVersion2, kOptionsBytesOfVersion3, kOptionsBytesOfVersion4});
      expect_pointer(parameters, "parameters");
      LB_EXPECTS(parameter_count >= 1, "parameter_count: found ", parameter_count, ", expected at least 1");
      const Index bytes = complete_options(*options).parameter_bytes;
      LB_EXPECTS(bytes == kParameterBytesOfVersion3 || bytes == sizeof(lowband_parameter),
                 "options.parameter_bytes: found ", bytes, ", expected ", sizeof(lowband_parameter),
                 ", sizeof(lowband_parameter)");
    });
    const lowband_options complete = complete_options(*options);
    const std::vector<lowband_parameter> described =
        complete_parameters(parameters, parameter_count, complete.parameter_bytes);
    *optimizer = make_optimizer(*world, described, complete).release();
  });
}

void lowband_optimizer_free(lowband_optimizer* optimizer) { delete optimizer; }

lowband_status lowband_rebind(lowband_optimizer* optimizer, int64_t parameter, void* weight, void* gradient) {
  return guarded([&] {
    expect_parameter(optimizer, parameter);
    expect_pointer(weight, "weight");
    expect_pointer(gradient, "gradient");
    optimizer->rebind(parameter, weight, gradient);
  });
}

lowband_status lowband_gradient_ready(lowband_optimizer* optimizer, int64_t parameter) {
  return guarded([&] {
    expect_parameter(optimizer, parameter);
    optimizer->begin_step();
    optimizer->gradient_ready(parameter);
  });
}

lowband_status lowband_step(lowband_optimizer* optimizer, const lowband_step_info* given,
                            lowband_step_report* report) {
  lowband_step_info info{};
  const lowband_status refused = guarded([&] {
    expect_pointer(optimizer, "optimizer");
    expect_struct(given, "info", {kStepInfoBytesOfVersion4});
    info = complete_step_info(*given);
    if (report != nullptr) expect_struct(report, "report");
  });
  if (refused != LOWBAND_OK) return refused;
  return guarded_collective(optimizer->world, [&] {
    // Its bytes count with the step before: the next one begins when its number is agreed. Its time is of
    // this one: here the processes wait for the last of them.
    const auto begin = std::chrono::steady_clock::now();
    if (optimizer->last_report && optimizer->last_report->over()) optimizer->last_report->get();
    expect_equal_info(*optimizer->world.communicator, info);
    optimizer->agreeing_seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    if (!optimizer->in_step) optimizer->next_step = info.step;
    optimizer->begin_step();
    if (optimizer->device) optimizer->device->follow(info.stream);
    optimizer->last_report.emplace(optimizer->step({.step = info.step,
                                                    .learning_rate = info.learning_rate,
                                                    .scalar_learning_rate = info.scalar_learning_rate,
                                                    .diagnose = info.diagnose != 0}));
    if (optimizer->device) optimizer->device->precede(info.stream);
    optimizer->in_step = false;
    optimizer->next_step = info.step + 1;
    optimizer->diagnoses.clear();
    if (info.diagnose != 0) {
      for (const lowband::MatrixDiagnostics& matrix : optimizer->last_report->get().diagnostics)
        optimizer->diagnoses[matrix.name] = matrix;
    }
    if (report != nullptr) write_last(*optimizer, *report);
  });
}

lowband_status lowband_last_report(lowband_optimizer* optimizer, lowband_step_report* report) {
  return guarded([&] {
    expect_pointer(optimizer, "optimizer");
    expect_struct(report, "report");
    LB_EXPECTS(optimizer->last_report, "lowband_last_report: found no step, expected one before it");
    write_last(*optimizer, *report);
  });
}

lowband_status lowband_step_bytes(const lowband_optimizer* optimizer, const char* axis, int32_t purpose,
                                  lowband_bytes* bytes) {
  return guarded([&] {
    expect_pointer(optimizer, "optimizer");
    write_sum(optimizer->world.communicator->ledger().step(), axis, purpose, bytes);
  });
}

lowband_status lowband_total_bytes(const lowband_optimizer* optimizer, const char* axis, int32_t purpose,
                                   lowband_bytes* bytes) {
  return guarded([&] {
    expect_pointer(optimizer, "optimizer");
    write_sum(optimizer->world.communicator->ledger().total(), axis, purpose, bytes);
  });
}

lowband_status lowband_planned_bytes(const lowband_optimizer* optimizer, int64_t* factor_bytes,
                                     int64_t* dense_bytes) {
  return guarded([&] {
    expect_pointer(optimizer, "optimizer");
    expect_pointer(factor_bytes, "factor_bytes");
    expect_pointer(dense_bytes, "dense_bytes");
    const lowband::StepBytes planned = optimizer->planned().of(optimizer->next_step);
    *factor_bytes = planned.factor;
    *dense_bytes = planned.dense;
  });
}

lowband_status lowband_factor_rank(const lowband_optimizer* optimizer, int64_t parameter,
                                   int64_t* factor_rank) {
  return guarded([&] {
    expect_one_matrix(optimizer, parameter, "lowband_block_factor_rank");
    expect_pointer(factor_rank, "factor_rank");
    *factor_rank = factor_rank_of(*optimizer, parameter, 0);
  });
}

lowband_status lowband_block_factor_rank(const lowband_optimizer* optimizer, int64_t parameter, int64_t block,
                                         int64_t* factor_rank) {
  return guarded([&] {
    expect_block(optimizer, parameter, block);
    expect_pointer(factor_rank, "factor_rank");
    *factor_rank = factor_rank_of(*optimizer, parameter, block);
  });
}

lowband_status lowband_diagnosis_of(const lowband_optimizer* optimizer, int64_t parameter,
                                    lowband_diagnosis* diagnosis) {
  return guarded([&] {
    expect_one_matrix(optimizer, parameter, "lowband_block_diagnosis");
    expect_struct(diagnosis, "diagnosis");
    write_diagnosis(*optimizer, parameter, 0, *diagnosis);
  });
}

lowband_status lowband_block_diagnosis(const lowband_optimizer* optimizer, int64_t parameter, int64_t block,
                                       lowband_diagnosis* diagnosis) {
  return guarded([&] {
    expect_block(optimizer, parameter, block);
    expect_struct(diagnosis, "diagnosis");
    write_diagnosis(*optimizer, parameter, block, *diagnosis);
  });
}

int64_t lowband_state_count(const lowband_optimizer* optimizer) {
  return optimizer != nullptr ? std::ssize(optimizer->pieces) : 0;
}

lowband_status lowband_state_at(const lowband_optimizer* optimizer, int64_t index,
                                lowband_state_piece* piece) {
  return guarded([&] {
    expect_piece(optimizer, index);
    expect_struct(piece, "piece", {kPieceBytesOfVersion4});
    lowband_state_piece found = optimizer->pieces[at(index)];
    found.struct_bytes = piece->struct_bytes;
    std::memcpy(piece, &found, at(found.struct_bytes));
  });
}

lowband_status lowband_state_place_of(const lowband_optimizer* optimizer, int64_t index,
                                      lowband_state_place* place) {
  return guarded([&] {
    expect_piece(optimizer, index);
    expect_struct(place, "place");
    *place = optimizer->places[at(index)];
  });
}
