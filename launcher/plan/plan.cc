#include "launcher/plan/plan.h"

#include "model/cuda/device_memory.h"
#include "optimizers/planned_traffic.h"
#include "trainer/byte_plan.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>

namespace lowband {

namespace {

double ratio(Index part, Index whole) { return static_cast<double>(part) / static_cast<double>(whole); }

/// 17 of "model.layers.17.self_attn.q_proj.weight".
Index layer_of(const std::string& name) {
  constexpr std::string_view kPrefix = "model.layers.";
  Index layer = -1;
  if (name.starts_with(kPrefix))
    std::from_chars(name.data() + kPrefix.size(), name.data() + name.size(), layer);
  LB_EXPECTS(layer >= 0, "plan: found layer matrix ", name, ", expected a name like model.layers.0.x.weight");
  return layer;
}

// What a matrix costs as factors and dense, whichever it travels as.
Index factor_bytes(const MatrixPlan& matrix, const ReplicaTraffic& traffic) {
  return matrix.factor_elements() * traffic.factor_element_bytes;
}
Index dense_bytes(const MatrixPlan& matrix, const ReplicaTraffic& traffic) {
  return matrix.dense_elements() * traffic.dense_element_bytes;
}

/// What is the same for every kind of optimizer. `factor_rank`: none where it has none.
MatrixPlan plan_matrix(const ParameterInfo& info, const std::vector<Index>& factor_rank,
                       const RunConfig& config) {
  MatrixPlan plan;
  plan.set_name(info.name);
  plan.set_role(std::string(role_name(info.role)));
  plan.set_layer(layer_of(info.name));
  plan.set_rows(info.rows);
  plan.set_cols(info.cols);
  plan.set_dense_elements(info.elements());
  const PlannedTraffic traffic({&info, 1}, {&factor_rank, 1}, mesh_shape(config), optimizer_options(config),
                               computed_dtype(config));
  const StepBytes sent = traffic.mean(traffic.period(), 2 * traffic.period());
  plan.set_choice(sent.factor > 0 ? "factors" : "dense");
  plan.set_sent_bytes(sent.factor + sent.dense);
  return plan;
}

void add_ranks(MatrixPlan& plan, Index factor_rank, const ReplicaTraffic& traffic) {
  plan.set_factor_rank(factor_rank);
  plan.set_break_even_rank(break_even_rank(traffic, plan.rows(), plan.cols()));
  plan.set_factor_elements(factor_rank * (plan.rows() + plan.cols()));
  plan.set_cheaper(factor_bytes(plan, traffic) < dense_bytes(plan, traffic) ? "factors" : "dense");
}

PeriodicPlan plan_periodic(const PeriodicBytes& bytes) {
  PeriodicPlan plan;
  plan.set_bytes(bytes.bytes);
  plan.set_interval_steps(bytes.interval_steps);
  plan.set_bytes_per_step(bytes.amortised());
  return plan;
}

/// `reference`: of the layer matrices, where they have ranks.
void add_layers(PlanReport& report, const RankProfile& reference, const ReplicaTraffic& traffic) {
  std::map<Index, LayerPlan> layers;
  for (int l = 0; l < report.matrices_size(); ++l) {
    const MatrixPlan& matrix = report.matrices(l);
    LayerPlan& layer = layers[matrix.layer()];
    layer.set_layer(matrix.layer());
    layer.set_dense_elements(layer.dense_elements() + matrix.dense_elements());
    if (matrix.factor_rank() == 0) continue;
    layer.set_factor_elements(layer.factor_elements() + matrix.factor_elements());
    layer.set_cheaper_bytes(layer.cheaper_bytes() +
                            std::min(factor_bytes(matrix, traffic), dense_bytes(matrix, traffic)));
    layer.set_reference_factor_elements(layer.reference_factor_elements() +
                                        reference.factor_ranks[static_cast<std::size_t>(l)] *
                                            (matrix.rows() + matrix.cols()));
  }
  for (auto& [index, layer] : layers) {
    if (layer.factor_elements() > 0) {
      layer.set_ratio_to_dense(ratio(layer.factor_elements() * traffic.factor_element_bytes,
                                     layer.dense_elements() * traffic.dense_element_bytes));
      layer.set_ratio_to_reference(ratio(layer.factor_elements(), layer.reference_factor_elements()));
    }
    report.set_cheaper_bytes(report.cheaper_bytes() + layer.cheaper_bytes());
    *report.add_layers() = layer;
  }
}

void add_remarks(PlanReport& report, const RunConfig& config) {
  if (report.profile().empty()) {
    report.add_remarks(cat("optimizer.kind ", report.optimizer(), " has no factor ranks."));
    return;
  }
  const auto above = std::ranges::count_if(
      report.matrices(), [](const MatrixPlan& matrix) { return matrix.cheaper() == "dense"; });
  const std::string counted =
      cat(above, " of ", report.matrices_size(), " matrices have a rank at or above break-even");
  if (report.factor_bytes() > report.dense_bytes()) {
    report.add_remarks(cat("The factors of ", report.profile(), " exceed the dense gradient: they are ",
                           std::round(report.ratio_to_dense() * 1e4) / 1e4, " times its size; ", counted,
                           "."));
  } else if (above > 0) {
    report.add_remarks(cat(counted, ": their dense gradient would be smaller."));
  }
  const auto dense = std::ranges::count_if(
      report.matrices(), [](const MatrixPlan& matrix) { return matrix.choice() == "dense"; });
  if (dense > 0)
    report.add_remarks(cat("exchange ", report.exchange(), ": ", dense, " of ", report.matrices_size(),
                           " matrices travel dense."));
  if (config.mesh().replica() == 1)
    report.add_remarks(
        "mesh.replica is 1: no factor leaves a process. B(r) is what each of several replicas sends.");
}

/// `rank_profile`, with errors that say which of the two profiles is meant.
RankProfile ranks_of_reference(const RunConfig::Profile& reference, const ModelConfig& model,
                               std::span<const ParameterInfo> parameters) {
  try {
    return rank_profile(reference, model, parameters);
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(cat("reference: ", error.what()));
  }
}

/// B(r) of the profile beside that of the reference and the dense gradient.
void add_profile(PlanReport& report, const RunConfig& config, const RankProfile& profile,
                 const RankProfile& reference) {
  const ReplicaTraffic traffic = replica_traffic(config);
  for (std::size_t l = 0; l < profile.matrices.size(); ++l)
    add_ranks(*report.mutable_matrices(static_cast<int>(l)), profile.factor_ranks[l], traffic);
  report.set_profile(profile.name);
  report.set_reference(reference.name);
  report.set_exchange(RunConfig::Optimizer::Exchange_Name(config.optimizer().exchange()));
  report.set_wire_dtype(config.optimizer().wire() == RunConfig::Optimizer::BF16 ? "bf16" : report.dtype());
  report.set_factor_elements(factor_elements(profile));
  report.set_factor_bytes(report.factor_elements() * traffic.factor_element_bytes);
  report.set_reference_factor_elements(factor_elements(reference));
  report.set_ratio_to_dense(ratio(report.factor_bytes(), report.dense_bytes()));
  report.set_ratio_to_reference(budget_ratio(profile, reference));
  report.set_match_tolerance(config.profile().match_tolerance());
  report.set_matches_reference(std::abs(report.ratio_to_reference() - 1) <= report.match_tolerance());
}

/// What the whole step sends.
void add_traffic(PlanReport& report, const BytePlan& bytes, Index element_bytes) {
  report.set_uncompressed_bytes(bytes.other_dense_bytes);
  report.set_uncompressed_elements(bytes.other_dense_bytes / element_bytes);
  report.set_control_bytes(bytes.control_bytes);
  *report.mutable_diagnostics() = plan_periodic(bytes.diagnostics);
  *report.mutable_weight_hashes() = plan_periodic(bytes.weight_hashes);
  report.set_sent_factor_bytes(bytes.matrices.factor);
  report.set_sent_dense_matrix_bytes(bytes.matrices.dense);
  report.set_sent_bytes(bytes.matrices.sum() + report.uncompressed_bytes());
  report.set_update_bytes(bytes.update_bytes);
  report.set_assemblies(bytes.assemblies);
}

/// Process 0 of a tensor group has the largest pieces.
void add_device_memory(PlanReport& report, const RunConfig& config) {
  const DeviceModelOptions options = device_model_options(config);
  const DeviceMemory memory = plan_device_memory(
      model_config(config), config.mesh().tensor(), 0, sequences_per_micro_batch(config),
      options.recompute_activations ? KeptActivations::kLayerInputs : KeptActivations::kAll,
      dtype_bytes(options.products));
  DeviceMemoryPlan& plan = *report.mutable_device_memory();
  plan.set_weights(memory.weights);
  plan.set_gradients(memory.gradients);
  plan.set_activations(memory.activations);
  plan.set_workspace(memory.workspace);
}

}  // namespace

PlanReport make_plan(const RunConfig& config, const RunConfig::Profile& reference) {
  validate(config, mesh_shape(config).processes());
  const ModelConfig model = model_config(config);
  const std::vector<ParameterInfo> parameters = parameter_table(config);
  const DType dtype = computed_dtype(config);
  const bool has_ranks = has_factor_ranks(config);
  const RankProfile profile = has_ranks ? rank_profile(config, parameters) : RankProfile{};

  PlanReport report;
  report.set_dtype(std::string(dtype_name(dtype)));
  report.set_optimizer(RunConfig::Optimizer::Kind_Name(config.optimizer().kind()));
  Index elements = 0, matrix_elements = 0;
  for (const ParameterInfo& info : parameters) elements += info.elements();
  for (const ParameterInfo& info : layer_matrices(parameters)) {
    matrix_elements += info.elements();
    const auto l = static_cast<std::size_t>(report.matrices_size());
    *report.add_matrices() =
        plan_matrix(info, has_ranks ? std::vector{profile.factor_ranks[l]} : std::vector<Index>{}, config);
  }
  report.set_parameters(elements);
  report.set_dense_elements(matrix_elements);
  report.set_dense_bytes(matrix_elements * dtype_bytes(dtype));
  RankProfile reference_profile;
  if (has_ranks) {
    reference_profile = ranks_of_reference(reference, model, parameters);
    add_profile(report, config, profile, reference_profile);
  }
  add_layers(report, reference_profile, replica_traffic(config));
  add_traffic(report, byte_plan(config), dtype_bytes(dtype));
  report.set_state_bytes(planned_state_bytes(config));
  if (config.device() == RunConfig::CUDA) add_device_memory(report, config);
  if (config.has_budget()) {
    const RankProfile budget = budget_reference(config, parameters);
    BudgetPlan& plan = *report.mutable_budget();
    plan.set_reference(budget.name);
    plan.set_bytes(report.sent_factor_bytes() + report.sent_dense_matrix_bytes());
    plan.set_reference_bytes(matrix_bytes(budget, replica_traffic(config)).sum());
    plan.set_ratio(budget_ratio(profile, budget, replica_traffic(config)));
    plan.set_tolerance(config.budget().tolerance());
  }
  add_remarks(report, config);
  return report;
}

}  // namespace lowband
