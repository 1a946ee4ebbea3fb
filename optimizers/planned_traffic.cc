#include "optimizers/planned_traffic.h"

#include "collectives/factors/factor_rows.h"
#include "optimizers/dion2.h"
#include "optimizers/galore.h"
#include "optimizers/muonbp.h"
#include "optimizers/row_scaling.h"
#include "optimizers/signed_matrices.h"
#include "optimizers/spec_gd.h"
#include "sharding/layout.h"

#include <algorithm>
#include <numeric>

namespace lowband {
namespace {

/// What one process holds of a parameter, and sends of it along the replica axis.
class Piece {
 public:
  Piece(const ParameterInfo& info, const MeshShape& mesh, const MeshPosition& position)
      : mesh_(mesh),
        position_(position),
        layout_(info.rows, info.cols, info.cut, mesh.tensor, mesh.shard),
        rows_(layout_.owned_rows(position.shard, position.tensor)),
        cols_(layout_.owned_cols(position.shard, position.tensor)) {}

  /// Of a matrix that a matrix optimizer treats: the owned block.
  Index block_elements() const { return rows_.size() * cols_.size(); }

  /// Of everything else: the shard axis cuts the tensor piece into consecutive elements.
  Index consecutive_elements() const {
    const Index piece =
        layout_.tensor_rows(position_.tensor).size() * layout_.tensor_cols(position_.tensor).size();
    return split_range(piece, mesh_.shard, position_.shard).size();
  }

  /// Rows that this process sends of the factor with the rows of the matrix, and of the one with its columns.
  /// Each is summed over the axis that cuts the other dimension, whose processes share its rows.
  Index row_factor_rows() const { return owned(rows_.size(), !layout_.shard_cuts_rows()); }
  Index col_factor_rows() const { return owned(cols_.size(), layout_.shard_cuts_rows()); }

 private:
  Index owned(Index rows, bool by_shard) const {
    return by_shard ? owned_row_count(rows, mesh_.shard, position_.shard)
                    : owned_row_count(rows, mesh_.tensor, position_.tensor);
  }

  MeshShape mesh_;
  MeshPosition position_;
  MatrixLayout layout_;
  Range rows_, cols_;
};

/// Of an update by signs, on axis within_replica, as every process of it counts them.
Index update_bytes(const ParameterInfo& info, const MeshShape& mesh, const OptimizerOptions& options,
                   Index element_bytes) {
  Index bytes = selects_slices(options.kind) ? slice_norm_bytes(info, mesh, options) : 0;
  for (const SignedMatrix& matrix : signed_matrices(info, mesh, options)) {
    bytes += sign_bytes(matrix.cut, options.sign, element_bytes);
    if (options.kind == OptimizerKind::kNorMuon || options.kind == OptimizerKind::kNorDion2)
      bytes += row_scaling_bytes(matrix.cut);
    if (options.kind == OptimizerKind::kSpecGd) bytes += inner_product_bytes(matrix.cut);
  }
  return bytes;
}

std::vector<PlannedTransfer> of_matrix(const ParameterInfo& info, Index factor_rank, const MeshShape& mesh,
                                       const MeshPosition& position, const OptimizerOptions& options,
                                       DType computed) {
  const Piece piece(info, mesh, position);
  const ReplicaTraffic traffic = replica_traffic(options, computed);
  const PlannedTransfer dense{"replica", Purpose::kDense,
                              piece.block_elements() * traffic.dense_element_bytes};
  switch (options.kind) {
    case OptimizerKind::kDion:
    case OptimizerKind::kPowerSgd:
      if (travels_dense(traffic, info.rows, info.cols, factor_rank)) return {dense};
      return {
          {"replica", Purpose::kFactor,
           (piece.row_factor_rows() + piece.col_factor_rows()) * factor_rank * traffic.factor_element_bytes}};
    case OptimizerKind::kAcpSgd: {
      const Index row_bytes = factor_rank * traffic.factor_element_bytes;
      return {{"replica", Purpose::kFactor, piece.row_factor_rows() * row_bytes, {.period = 2, .offset = 0}},
              {"replica", Purpose::kFactor, piece.col_factor_rows() * row_bytes, {.period = 2, .offset = 1}}};
    }
    case OptimizerKind::kGalore: {
      const StepPhase of_basis = basis_steps(info, options.galore_interval);
      StepPhase others = of_basis;
      others.others = true;
      const Index rows = info.rows >= info.cols ? piece.row_factor_rows() : piece.col_factor_rows();
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
               update_bytes(info, mesh, options, traffic.dense_element_bytes), phase}};
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

std::vector<PlannedTransfer> planned_transfers(const ParameterInfo& info, Index factor_rank,
                                               const MeshShape& mesh, const MeshPosition& position,
                                               const OptimizerOptions& options, DType computed) {
  if (has_matrix_optimizer(options.kind) && is_layer_matrix(info.role))
    return of_matrix(info, factor_rank, mesh, position, options, computed);
  return {{"replica", Purpose::kDense,
           Piece(info, mesh, position).consecutive_elements() * dtype_bytes(computed)}};
}

PlannedTraffic::PlannedTraffic(std::span<const ParameterInfo> parameters, std::span<const Index> factor_ranks,
                               const MeshShape& mesh, const OptimizerOptions& options, DType computed) {
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
