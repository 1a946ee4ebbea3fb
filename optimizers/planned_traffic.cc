#include "optimizers/planned_traffic.h"

#include "optimizers/dion2.h"
#include "optimizers/galore.h"
#include "optimizers/layer_matrix.h"
#include "optimizers/muonbp.h"
#include "optimizers/row_scaling.h"
#include "optimizers/spec_gd.h"
#include "optimizers/state_place.h"

#include <algorithm>
#include <iterator>
#include <numeric>

namespace lowband {
namespace {

/// Of an update by signs, on axis within_replica, as every process of it counts them.
Index update_bytes(const LayerMatrix& matrix, const MeshShape& mesh, const OptimizerOptions& options,
                   Index element_bytes) {
  const bool selects = selects_slices(options.kind);
  const CutMatrix is_signed = selects ? selected_part(matrix, options) : matrix.cut;
  Index bytes = sign_bytes(is_signed, options.sign, element_bytes);
  if (selects) bytes += slice_norm_bytes(matrix.info, mesh, options);
  if (options.kind == OptimizerKind::kNorMuon || options.kind == OptimizerKind::kNorDion2)
    bytes += row_scaling_bytes(is_signed);
  if (options.kind == OptimizerKind::kSpecGd) bytes += inner_product_bytes(is_signed);
  return bytes;
}

std::vector<PlannedTransfer> of_matrix(const LayerMatrix& matrix, const MeshShape& mesh,
                                       const MeshPosition& position, const OptimizerOptions& options,
                                       DType computed) {
  const ParameterInfo& info = matrix.info;
  const Index factor_rank = matrix.factor_rank;
  const ReplicaTraffic traffic = replica_traffic(options, computed);
  // Of the factor with the rows of the matrix, and of the one with its columns.
  const Index kept_rows = matrix.cut.kept_rows(true, position).size();
  const Index kept_cols = matrix.cut.kept_rows(false, position).size();
  const Index block_elements = matrix.cut.rows_of(position).size() * matrix.cut.cols_of(position).size();
  const PlannedTransfer dense{"replica", Purpose::kDense, block_elements * traffic.dense_element_bytes};
  switch (options.kind) {
    case OptimizerKind::kDion:
    case OptimizerKind::kPowerSgd:
      if (travels_dense(traffic, info.rows, info.cols, factor_rank)) return {dense};
      return {{"replica", Purpose::kFactor,
               (kept_rows + kept_cols) * factor_rank * traffic.factor_element_bytes}};
    case OptimizerKind::kAcpSgd: {
      const Index row_bytes = factor_rank * traffic.factor_element_bytes;
      return {{"replica", Purpose::kFactor, kept_rows * row_bytes, {.period = 2, .offset = 0}},
              {"replica", Purpose::kFactor, kept_cols * row_bytes, {.period = 2, .offset = 1}}};
    }
    case OptimizerKind::kGalore: {
      const StepPhase of_basis = basis_steps(info, options.galore_interval);
      StepPhase others = of_basis;
      others.others = true;
      const Index rows = matrix.tall() ? kept_rows : kept_cols;
      const Index basis = std::min(info.rows, info.cols) * factor_rank * traffic.dense_element_bytes;
      const int owner = basis_owner(info, mesh) % (mesh.shard * mesh.tensor);
      return {{"replica", Purpose::kFactor, rows * factor_rank * traffic.factor_element_bytes, others},
              {"replica", Purpose::kDense, dense.bytes, of_basis},
              {"replica", Purpose::kFactor,
               position.tensor + mesh.tensor * position.shard == owner ? basis : 0, of_basis}};
    }
    case OptimizerKind::kMuon:
    case OptimizerKind::kNorMuon:
    case OptimizerKind::kMuonBp:
    case OptimizerKind::kDion2:
    case OptimizerKind::kNorDion2:
    case OptimizerKind::kSpecGd: {
      const StepPhase phase =
          options.kind == OptimizerKind::kMuonBp ? whole_sign_steps(options) : StepPhase{};
      return {dense,
              {"within_replica", Purpose::kUpdate,
               update_bytes(matrix, mesh, options, traffic.dense_element_bytes), phase}};
    }
    case OptimizerKind::kSpectra:  // and a norm, where the matrix is cut
      return {
          dense,
          {"within_replica", Purpose::kUpdate, mesh.shard * mesh.tensor > 1 ? dtype_bytes(DType::kF64) : 0}};
    case OptimizerKind::kAdamW:
    case OptimizerKind::kSgd:
    case OptimizerKind::kLion:
      break;
  }
  throw InvalidArgument(cat("optimizer.kind: found ", static_cast<int>(options.kind),
                            ", expected one that updates whole matrices"));
}

}  // namespace

std::vector<PlannedTransfer> planned_transfers(const ParameterInfo& info, std::span<const Index> factor_ranks,
                                               const MeshShape& mesh, const MeshPosition& position,
                                               const OptimizerOptions& options, DType computed) {
  if (!has_matrix_optimizer(options.kind) || !is_layer_matrix(info.role))
    return {{"replica", Purpose::kDense,
             state_place(info, "m", 0, mesh, position).elements.size() * dtype_bytes(computed)}};
  std::vector<PlannedTransfer> transfers;
  for (const LayerMatrix& matrix : cut_matrices(info, mesh, factor_ranks))
    std::ranges::move(of_matrix(matrix, mesh, position, options, computed), std::back_inserter(transfers));
  return transfers;
}

PlannedTraffic::PlannedTraffic(std::span<const ParameterInfo> parameters,
                               std::span<const std::vector<Index>> factor_ranks, const MeshShape& mesh,
                               const OptimizerOptions& options, DType computed) {
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    for (int process = 0; process < mesh.shard * mesh.tensor; ++process) {
      for (const PlannedTransfer& transfer : planned_transfers(
               parameters[i], factor_ranks[i], mesh, mesh_position(mesh, process), options, computed)) {
        StepBytes& bytes = line(transfer.phase);
        if (transfer.purpose == Purpose::kFactor) bytes.factor += transfer.bytes;
        if (transfer.purpose == Purpose::kDense) bytes.dense += transfer.bytes;
        if (transfer.purpose == Purpose::kUpdate && process == 0) bytes.update += transfer.bytes;
      }
    }
  }
}

StepBytes& PlannedTraffic::line(StepPhase phase) {
  const auto found = std::ranges::find(lines_, phase, &Line::phase);
  return found != lines_.end() ? found->bytes : lines_.emplace_back(Line{phase, {}}).bytes;
}

StepBytes PlannedTraffic::of(Index step) const {
  StepBytes sum;
  for (const auto& [phase, bytes] : lines_) {
    if (!phase.contains(step)) continue;
    sum.factor += bytes.factor;
    sum.dense += bytes.dense;
    sum.update += bytes.update;
  }
  return sum;
}

StepBytes PlannedTraffic::mean(Index first, Index last) const {
  StepBytes sum;
  for (Index step = first; step < last; ++step) {
    const StepBytes bytes = of(step);
    sum.factor += bytes.factor;
    sum.dense += bytes.dense;
    sum.update += bytes.update;
  }
  const Index steps = std::max(Index{1}, last - first);
  const auto rounded = [steps](Index bytes) { return (bytes + steps / 2) / steps; };
  return {rounded(sum.factor), rounded(sum.dense), rounded(sum.update)};
}

Index PlannedTraffic::period() const {
  Index period = 1;
  for (const Line& line : lines_) {
    if (line.phase.period > 0) period = std::lcm(period, line.phase.period);
  }
  return period;
}

}  // namespace lowband
