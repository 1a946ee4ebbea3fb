#include "trainer/byte_plan.h"

#include "collectives/factors/factor_rows.h"
#include "optimizers/diagnosis.h"
#include "optimizers/distributed_sign.h"
#include "optimizers/gradient_sketch.h"
#include "optimizers/normuon.h"
#include "sharding/layout.h"

#include <map>

namespace lowband {
namespace {

std::map<std::string, Index> factor_ranks(const RunConfig& config,
                                          const std::vector<ParameterInfo>& parameters) {
  std::map<std::string, Index> ranks;
  if (!has_factor_ranks(config)) return ranks;
  const RankProfile profile = rank_profile(config, parameters);
  for (std::size_t l = 0; l < profile.matrices.size(); ++l)
    ranks[profile.matrices[l].name] = profile.factor_ranks[l];
  return ranks;
}

/// What one process holds of a parameter, and sends of it along the replica axis.
class Piece {
 public:
  Piece(const ParameterInfo& info, const MeshShape& mesh, const MeshPosition& position)
      : info_(info),
        mesh_(mesh),
        position_(position),
        layout_(info.rows, info.cols, info.cut, mesh.tensor, mesh.shard) {}

  /// Of a matrix that a matrix optimizer treats: the owned block.
  Index block_elements() const { return owned_rows().size() * owned_cols().size(); }

  /// Of everything else: the shard axis cuts the tensor piece into consecutive elements.
  Index consecutive_elements() const {
    const Index piece =
        layout_.tensor_rows(position_.tensor).size() * layout_.tensor_cols(position_.tensor).size();
    return split_range(piece, mesh_.shard, position_.shard).size();
  }

  /// Rows of P and R together. The factor with the rows of the block is summed over the axis that cuts the
  /// columns, whose processes share its rows; and the other way round.
  Index factor_rows() const {
    const bool shard_cuts_rows = layout_.shard_cuts_rows();
    const auto owned = [&](Index rows, bool by_shard) {
      return by_shard ? owned_row_count(rows, mesh_.shard, position_.shard)
                      : owned_row_count(rows, mesh_.tensor, position_.tensor);
    };
    return owned(owned_rows().size(), !shard_cuts_rows) + owned(owned_cols().size(), shard_cuts_rows);
  }

 private:
  Range owned_rows() const { return layout_.owned_rows(position_.shard, position_.tensor); }
  Range owned_cols() const { return layout_.owned_cols(position_.shard, position_.tensor); }

  ParameterInfo info_;
  MeshShape mesh_;
  MeshPosition position_;
  MatrixLayout layout_;
};

Index control_bytes(const RunConfig& config, const std::vector<ParameterInfo>& parameters) {
  // World axis. One flag per parameter: is its gradient usable?
  Index bytes = std::ssize(parameters);
  // The gradient's norm: an exact part, and Dion's sketch of what no process holds.
  const bool sketches = config.optimizer().kind() == RunConfig::Optimizer::DION &&
                        config.optimizer().clip_estimator() == RunConfig::Optimizer::SKETCH;
  bytes += dtype_bytes(DType::kF64) * (sketches ? 1 + GradientSketch::kBuckets : 1);
  bytes += dtype_bytes(DType::kF64) * kStepSums;
  if (!has_factor_ranks(config)) return bytes;
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

/// Whether the matrix is signed as a whole.
bool is_signed(const ParameterInfo& info, const OptimizerOptions& options) {
  return takes_signs(options.kind) && is_layer_matrix(info.role);
}

void plan_signs(BytePlan& plan, const RunConfig& config, const std::vector<ParameterInfo>& parameters) {
  const OptimizerOptions options = optimizer_options(config);
  const Index element_bytes = replica_traffic(config).dense_element_bytes;
  const auto steps = static_cast<Index>(sign_iteration(options.sign).steps.size());
  std::map<Assembly, int> matrices;
  for (const ParameterInfo& info : parameters) {
    if (!is_signed(info, options)) continue;
    plan.update_bytes += update_bytes(info, mesh_shape(config), options, element_bytes);
    ++matrices[choose_assembly(info, mesh_shape(config), steps)];
  }
  for (const auto& [assembly, count] : matrices)
    plan.assemblies += cat(plan.assemblies.empty() ? "" : ", ", assembly_name(assembly), " ", count);
}

}  // namespace

BytePlan byte_plan(const RunConfig& config) {
  const std::vector<ParameterInfo> parameters = parameter_table(model_config(config));
  const ReplicaTraffic traffic = replica_traffic(config);
  BytePlan plan;
  if (has_factor_ranks(config)) {
    const RankProfile profile = rank_profile(config, parameters);
    plan.matrices = matrix_bytes(profile, traffic);
    plan.diagnostics = {
        .bytes = Diagnosis<float>::kSums * dense_elements(profile) * traffic.dense_element_bytes,
        .interval_steps = config.diagnostics().interval_steps()};
  }
  for (const ParameterInfo& info : parameters) {
    const Index copies = info.cut == TensorCut::kNone ? config.mesh().tensor() : 1;
    const Index bytes = info.elements() * copies * traffic.dense_element_bytes;
    if (!is_layer_matrix(info.role)) {
      plan.other_dense_bytes += bytes;
    } else if (!has_factor_ranks(config)) {
      plan.matrices.dense += bytes;
    }
  }
  plan_signs(plan, config, parameters);
  plan.control_bytes = control_bytes(config, parameters);
  plan.weight_hashes = {.bytes = dtype_bytes(DType::kI64) * mesh_shape(config).processes(),
                        .interval_steps = config.hash_interval_steps()};
  return plan;
}

void allow_planned(ByteBudget& budget, const RunConfig& config, const MeshPosition& position) {
  const std::vector<ParameterInfo> parameters = parameter_table(model_config(config));
  const std::map<std::string, Index> ranks = factor_ranks(config, parameters);
  const ReplicaTraffic traffic = replica_traffic(config);
  const OptimizerOptions options = optimizer_options(config);
  const MeshShape mesh = mesh_shape(config);
  budget.allow("replica", Purpose::kFactor, 0);
  budget.allow("replica", Purpose::kDense, 0);
  budget.allow("within_replica", Purpose::kUpdate, 0);
  Index diagnosed_bytes = 0;
  for (const ParameterInfo& info : parameters) {
    const Piece piece(info, mesh, position);
    const auto factor_rank = ranks.find(info.name);
    if (factor_rank == ranks.end()) {
      const bool whole = is_signed(info, options);
      const Index elements = whole ? piece.block_elements() : piece.consecutive_elements();
      budget.allow("replica", Purpose::kDense, elements * traffic.dense_element_bytes, info.name);
      if (whole) {
        budget.allow("within_replica", Purpose::kUpdate,
                     update_bytes(info, mesh, options, traffic.dense_element_bytes), info.name);
      }
      continue;
    }
    if (travels_dense(traffic, info.rows, info.cols, factor_rank->second)) {
      budget.allow("replica", Purpose::kDense, piece.block_elements() * traffic.dense_element_bytes,
                   info.name);
    } else {
      budget.allow("replica", Purpose::kFactor,
                   piece.factor_rows() * factor_rank->second * traffic.factor_element_bytes, info.name);
    }
    diagnosed_bytes += Diagnosis<float>::kSums * piece.block_elements() * traffic.dense_element_bytes;
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
