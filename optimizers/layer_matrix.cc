#include "optimizers/layer_matrix.h"

namespace lowband {

std::string LayerMatrix::state_name(std::string_view letter) const {
  return cat(cut.name, ".", letter, info.name.substr(cut.name.size()));
}

std::vector<LayerMatrix> cut_matrices(const ParameterInfo& parameter, const MeshShape& mesh,
                                      std::span<const Index> factor_ranks) {
  const CutMatrix whole = cut_matrix(parameter, mesh);
  std::vector<LayerMatrix> matrices;
  for (ParameterInfo& info : matrices_of(parameter)) {
    const std::size_t j = matrices.size();
    Index factor_rank = 0;
    if (!factor_ranks.empty()) {
      LB_EXPECTS(j < factor_ranks.size(), "factor rank of ", info.name,
                 ": found none, expected one for each of the matrices of ", parameter.name);
      factor_rank = factor_ranks[j];
      LB_EXPECTS(factor_rank >= 1 && factor_rank <= std::min(info.rows, info.cols), "factor rank of ",
                 info.name, ": found ", factor_rank, ", expected 1 .. min(", info.rows, ", ", info.cols, ")");
    }
    const ParameterBlocks& blocks = parameter.blocks;
    CutMatrix cut = blocks.empty() ? whole : part_of(whole, blocks.of_rows, blocks.ranges[j]);
    matrices.push_back({std::move(info), std::move(cut), factor_rank});
  }
  return matrices;
}

FactorShape factor_shape(const LayerMatrix& matrix, Index factor_rank, bool transposed, ProcessMesh& mesh) {
  const CutMatrix& cut = matrix.cut;
  const Index rows = cut.rows_of(mesh.position()).size(), cols = cut.cols_of(mesh.position()).size();
  // The tensor axis cuts one dimension, the shard axis the other.
  Communicator& across_rows = cut.shard_cuts_rows ? mesh.shard() : mesh.tensor();
  Communicator& across_cols = cut.shard_cuts_rows ? mesh.tensor() : mesh.shard();
  return {.name = cut.name,
          .factor_rank = factor_rank,
          .left_rows = transposed ? cols : rows,
          .right_rows = transposed ? rows : cols,
          .across_b = transposed ? &across_rows : &across_cols,
          .across_a = transposed ? &across_cols : &across_rows};
}

}  // namespace lowband
