#include "collectives/agreement.h"
#include "runtime/cpu.h"
#include "runtime/version.h"
#include "trainer/byte_plan.h"
#include "trainer/trainer_state.h"

#include <array>

#include <google/protobuf/text_format.h>

namespace lowband {
namespace {

Index total_elements(const ModelConfig& model_shape) {
  Index elements = 0;
  for (const ParameterInfo& info : parameter_table(model_shape)) elements += info.elements();
  return elements;
}

std::string exchange_name(const RunConfig& config) {
  return has_factor_ranks(config) ? RunConfig::Optimizer::Exchange_Name(config.optimizer().exchange()) : "";
}

std::string wire_dtype_name(const RunConfig& config) {
  if (!has_factor_ranks(config)) return "";
  if (config.optimizer().wire() == RunConfig::Optimizer::BF16) return std::string(dtype_name(DType::kBF16));
  return std::string(dtype_name(computed_dtype(config)));
}

/// "factors 13.6 MB (bf16), dense matrices 1.20 MB".
std::string matrix_bytes_text(const RunConfig& config) {
  const MatrixBytes bytes = byte_plan(config).matrices;
  const auto quantity = [](Index count) { return format_quantity(static_cast<double>(count), "B"); };
  std::string text;
  if (bytes.factor > 0) text = cat("factors ", quantity(bytes.factor), " (", wire_dtype_name(config), ")");
  if (bytes.dense > 0) text += cat(text.empty() ? "" : ", ", "dense matrices ", quantity(bytes.dense));
  return text;
}

}  // namespace

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
  record_start();
  announce();
}

template <class Real>
void Trainer<Real>::State::record_start() {
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
  start.set_device(device.description);
  start.set_products_dtype(std::string(dtype_name(products_dtype(config))));
  start.set_parameters(total_elements(model_shape));
  const Index period = optimizer->planned().period();
  const StepBytes planned = optimizer->planned().mean(period, 2 * period);
  start.set_planned_factor_bytes(planned.factor);
  start.set_planned_dense_bytes(planned.dense);
  start.set_planned_update_bytes(planned.update);
  start.set_assemblies(byte_plan(config).assemblies);
  start.set_dense_gradient_bytes(dense_elements(profile) * dtype_bytes(dtype_of<Real>));
  start.set_optimizer(RunConfig::Optimizer::Kind_Name(config.optimizer().kind()));
  start.set_exchange(exchange_name(config));
  start.set_wire_dtype(wire_dtype_name(config));
  record->write(start);
}

// Of this process.
template <class Real>
Index Trainer<Real>::State::state_bytes() {
  Index elements = 0;
  for (const auto& tensor : optimizer->state()) elements += tensor.value.elements();
  return elements * dtype_bytes(dtype_of<Real>);
}

template <class Real>
void Trainer<Real>::State::announce() {
  say(cat(format_quantity(static_cast<double>(total_elements(model_shape))), " parameters on ", world.size(),
          " processes (replica ", mesh->shape().replica, " x shard ", mesh->shape().shard, " x tensor ",
          mesh->shape().tensor, "), ", world.backend(), " with ", determinism_name(world.determinism()),
          " sums, ", compute_threads(), " thread(s) each"));
  say(cat("kernels: vector ", vector_kernel_name(), ", GEMM ", gemm_library_name(), ", BLAS ",
          blas_core_name()));
  if (device.device)
    say(cat("device of process 0: ", device.description, ", products in ",
            dtype_name(products_dtype(config))));
  say(cat("memory per process: weights and gradients ",
          format_quantity(static_cast<double>(model->parameter_bytes()), "B"), ", activations ",
          format_quantity(static_cast<double>(model->activation_bytes()), "B"), ", optimizer ",
          format_quantity(static_cast<double>(state_bytes()), "B")));
  if (has_factor_ranks(config)) {
    say(cat("profile ", profile.name, ": ", matrix_bytes_text(config), " per step and replica; B(r) is ",
            static_cast<double>(factor_elements(profile)) / static_cast<double>(dense_elements(profile)),
            " of the dense gradient"));
  }
  if (const BytePlan plan = byte_plan(config); !plan.assemblies.empty())
    say(cat("signs of whole matrices: ", plan.assemblies, "; ",
            format_quantity(static_cast<double>(plan.update_bytes), "B"), " per step within a replica"));
  if (step > 0) say(cat("continues after step ", step));
  if (resharded_from)
    say(cat("from a checkpoint of replica ", resharded_from->replica, " x shard ", resharded_from->shard,
            " x tensor ", resharded_from->tensor, ": same numbers, sums in another order from here"));
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

// Of every process since the run began; the gather itself is in nobody's figures.
template <class Real>
std::vector<ProcessTraffic> Trainer<Real>::State::gather_traffic() {
  TransferTotals own;
  for (const auto& [key, totals] : world.ledger().total()) own += totals;
  // Byte counts are exact in a double (< 2^53).
  constexpr std::size_t kNumbers = 4;
  const std::array<double, kNumbers> mine{own.modelled_wire_bytes, static_cast<double>(own.transport_bytes),
                                          static_cast<double>(state_bytes()),
                                          static_cast<double>(peak_memory_bytes())};
  const auto processes = static_cast<std::size_t>(world.size());
  std::vector<double> all(kNumbers * processes);
  world.all_gather<double>(mine, all, std::vector<Index>(processes, kNumbers), {Purpose::kControl});
  std::vector<ProcessTraffic> traffic(processes);
  for (std::size_t p = 0; p < processes; ++p) {
    const double* const of_process = &all[kNumbers * p];
    traffic[p].set_modelled_wire_bytes(of_process[0]);
    traffic[p].set_transport_bytes(static_cast<Index>(of_process[1]));
    traffic[p].set_state_bytes(static_cast<Index>(of_process[2]));
    traffic[p].set_peak_memory_bytes(static_cast<Index>(of_process[3]));
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
  if (own_steps > 0) {
    summary.set_seconds_per_step(step_seconds / static_cast<double>(own_steps));
    summary.set_optimizer_seconds_per_step(optimizer_seconds / static_cast<double>(own_steps));
  }
  summary.set_processes(world.size());
  if (last_loss) summary.set_final_loss(*last_loss);
  if (final_validation) summary.set_final_validation_loss(*final_validation);
  if (best_validation) summary.set_best_validation_loss(*best_validation);
  summary.set_best_validation_step(best_validation_step);
  summary.set_planned_factor_bytes(optimizer->planned().mean(0, step).factor);
  summary.set_counted_factor_bytes(step > 0 ? (factor_bytes + step / 2) / step : 0);
  summary.set_counted_dense_bytes(step > 0 ? (dense_bytes + step / 2) / step : 0);
  const Index gradient_bytes = dense_elements(profile) * dtype_bytes(dtype_of<Real>);
  summary.set_dense_gradient_bytes(gradient_bytes);
  if (gradient_bytes > 0) {
    summary.set_ratio_to_dense(static_cast<double>(summary.counted_factor_bytes()) /
                               static_cast<double>(gradient_bytes));
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

template void Trainer<float>::State::open_record();
template void Trainer<double>::State::open_record();
template void Trainer<float>::State::show_step(const StepOutcome&);
template void Trainer<double>::State::show_step(const StepOutcome&);
template void Trainer<float>::State::record_step(const StepOutcome&);
template void Trainer<double>::State::record_step(const StepOutcome&);
template void Trainer<float>::State::record_diagnostics(const StepReport&);
template void Trainer<double>::State::record_diagnostics(const StepReport&);
template std::vector<ProcessTraffic> Trainer<float>::State::gather_traffic();
template std::vector<ProcessTraffic> Trainer<double>::State::gather_traffic();
template RunSummary Trainer<float>::State::summary() const;
template RunSummary Trainer<double>::State::summary() const;

}  // namespace lowband
