#include "trainer/byte_plan.h"

#include "optimizers/diagnosis.h"
#include "optimizers/dion2.h"
#include "optimizers/distributed_sign.h"
#include "optimizers/gradient_sketch.h"
#include "optimizers/planned_state.h"
#include "optimizers/planned_traffic.h"
#include "sharding/layout.h"

#include <algorithm>
#include <map>

namespace lowband {
namespace {

/// By parameter, and in each by matrix.
std::vector<std::vector<Index>> factor_ranks(const RunConfig& config,
                                             const std::vector<ParameterInfo>& parameters) {
  if (!has_factor_ranks(config)) return std::vector<std::vector<Index>>(parameters.size());
  return ranks_by_parameter(rank_profile(config, parameters), parameters);
}

/// Of the layer matrices, or of everything else.
PlannedTraffic planned_traffic(const RunConfig& config, const std::vector<ParameterInfo>& parameters,
                               bool of_matrices) {
  const std::vector<std::vector<Index>> ranks = factor_ranks(config, parameters);
  std::vector<ParameterInfo> chosen;
  std::vector<std::vector<Index>> ranks_of_chosen;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    if (is_layer_matrix(parameters[i].role) != of_matrices) continue;
    chosen.push_back(parameters[i]);
    ranks_of_chosen.push_back(ranks[i]);
  }
  return {chosen, ranks_of_chosen, mesh_shape(config), optimizer_options(config), computed_dtype(config)};
}

Index control_bytes(const RunConfig& config, const std::vector<ParameterInfo>& parameters) {
  // World axis. One flag per parameter: is its gradient usable?
  Index bytes = std::ssize(parameters);
  // The gradient's norm: an exact part, and Dion's sketch of what no process holds.
  const bool sketches = config.optimizer().kind() == RunConfig::Optimizer::DION &&
                        config.optimizer().clip_estimator() == RunConfig::Optimizer::SKETCH;
  bytes += dtype_bytes(DType::kF64) * (sketches ? 1 + GradientSketch::kBuckets : 1);
  bytes += dtype_bytes(DType::kF64) * kStepSums;
  if (!exchanges_both_factors(optimizer_options(config).kind)) return bytes;
  // Replica axis. How each P was orthonormalised, and which of its columns are dead.
  const RankProfile profile = rank_profile(config, parameters);
  const ReplicaTraffic traffic = replica_traffic(config);
  for (std::size_t l = 0; l < profile.matrices.size(); ++l) {
    const ParameterInfo& matrix = profile.matrices[l];
    if (!travels_dense(traffic, matrix.rows, matrix.cols, profile.factor_ranks[l]))
      bytes += (1 + profile.factor_ranks[l]) * traffic.factor_element_bytes;
  }
  return bytes;
}

/// "owner 13, gram 1": how matrices come together for their signs.
std::string assemblies(const RunConfig& config, const std::vector<ParameterInfo>& parameters) {
  const OptimizerOptions options = optimizer_options(config);
  if (!takes_signs(options.kind)) return "";
  const auto steps = static_cast<Index>(sign_iteration(options.sign).steps.size());
  std::map<Assembly, int> matrices;
  for (const ParameterInfo& info : parameters) {
    if (!is_layer_matrix(info.role)) continue;
    for (const LayerMatrix& matrix : cut_matrices(info, mesh_shape(config), {}))
      ++matrices[choose_assembly(selects_slices(options.kind) ? selected_part(matrix, options) : matrix.cut,
                                 steps)];
  }
  std::string text;
  for (const auto& [assembly, count] : matrices)
    text += cat(text.empty() ? "" : ", ", assembly_name(assembly), " ", count);
  return text;
}

}  // namespace

BytePlan byte_plan(const RunConfig& config) {
  const std::vector<ParameterInfo> parameters = parameter_table(config);
  const ReplicaTraffic traffic = replica_traffic(config);
  const PlannedTraffic planned = planned_traffic(config, parameters, true);
  const Index period = planned.period();
  const StepBytes of_matrices = planned.mean(period, 2 * period);
  BytePlan plan;
  plan.matrices = {.factor = of_matrices.factor, .dense = of_matrices.dense};
  plan.update_bytes = of_matrices.update;
  plan.other_dense_bytes = planned_traffic(config, parameters, false).of(0).dense;
  if (feeds_back(optimizer_options(config).kind)) {
    const RankProfile profile = rank_profile(config, parameters);
    plan.diagnostics = {
        .bytes = Diagnosis<float>::kSums * dense_elements(profile) * traffic.dense_element_bytes,
        .interval_steps = config.diagnostics().interval_steps()};
  }
  plan.assemblies = assemblies(config, parameters);
  plan.control_bytes = control_bytes(config, parameters);
  plan.weight_hashes = {.bytes = dtype_bytes(DType::kI64) * mesh_shape(config).processes(),
                        .interval_steps = config.hash_interval_steps()};
  return plan;
}

Index planned_state_bytes(const RunConfig& config) {
  const std::vector<ParameterInfo> parameters = parameter_table(config);
  const std::vector<std::vector<Index>> ranks = factor_ranks(config, parameters);
  const OptimizerOptions options = optimizer_options(config);
  const MeshShape mesh = mesh_shape(config);
  Index most = 0;
  for (int process = 0; process < mesh.shard * mesh.tensor; ++process) {
    Index elements = 0;
    for (std::size_t i = 0; i < parameters.size(); ++i)
      elements +=
          planned_state_elements(parameters[i], ranks[i], mesh, mesh_position(mesh, process), options);
    most = std::max(most, elements);
  }
  return most * dtype_bytes(computed_dtype(config));
}

void allow_planned(ByteBudget& budget, const RunConfig& config, const MeshPosition& position) {
  const std::vector<ParameterInfo> parameters = parameter_table(config);
  const std::vector<std::vector<Index>> ranks = factor_ranks(config, parameters);
  const ReplicaTraffic traffic = replica_traffic(config);
  const OptimizerOptions options = optimizer_options(config);
  const MeshShape mesh = mesh_shape(config);
  budget.allow("replica", Purpose::kFactor, 0);
  budget.allow("replica", Purpose::kDense, 0);
  budget.allow("within_replica", Purpose::kUpdate, 0);
  Index diagnosed_bytes = 0;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const ParameterInfo& info = parameters[i];
    for (const PlannedTransfer& transfer :
         planned_transfers(info, ranks[i], mesh, position, options, computed_dtype(config)))
      budget.allow(transfer.axis, transfer.purpose, transfer.bytes, info.name, transfer.phase);
    if (ranks[i].empty()) continue;
    const MatrixLayout layout(info.rows, info.cols, info.cut, mesh.tensor, mesh.shard);
    diagnosed_bytes += Diagnosis<float>::kSums * layout.owned_rows(position.shard, position.tensor).size() *
                       layout.owned_cols(position.shard, position.tensor).size() *
                       traffic.dense_element_bytes;
  }

  const BytePlan plan = byte_plan(config);
  // Without an interval a line of nothing, or nothing would limit it.
  const Index interval = plan.diagnostics.interval_steps;
  budget.allow_every("replica", interval > 0 ? interval : 1, interval > 0 ? diagnosed_bytes : 0);
  // Hashes are compared after the last step too.
  if (plan.weight_hashes.interval_steps > 0)
    budget.allow_every("world", plan.weight_hashes.interval_steps, plan.weight_hashes.bytes);
  budget.allow_every("world", config.schedule().steps(), plan.weight_hashes.bytes);
}

}  // namespace lowband
