#include "optimizers/signed_matrices.h"

#include "optimizers/dion2.h"

namespace lowband {
namespace {

ParameterBlocks blocks_of(const ParameterInfo& info, const OptimizerOptions& options) {
  const bool heads_are_rows =
      info.role == Role::kQuery || info.role == Role::kKey || info.role == Role::kValue;
  if (!info.blocks.empty() || options.blocks != BlockStructure::kPerHead ||
      !(heads_are_rows || info.role == Role::kOutput))
    return info.blocks;
  const Index extent = heads_are_rows ? info.rows : info.cols;
  LB_EXPECTS(extent % options.head_dim == 0, "optimizer.blocks: found per_head with ", extent,
             heads_are_rows ? " rows" : " columns", " of ", info.name,
             ", expected a multiple of head_dim = ", options.head_dim);
  ParameterBlocks heads{.of_rows = heads_are_rows};
  for (Index begin = 0; begin < extent; begin += options.head_dim)
    heads.ranges.push_back({{begin, begin + options.head_dim}});
  return heads;
}

}  // namespace

std::vector<SignedMatrix> signed_matrices(const ParameterInfo& info, const MeshShape& mesh,
                                          const OptimizerOptions& options) {
  const std::vector<Range> all_rows{{0, info.rows}}, all_cols{{0, info.cols}};
  if (!selects_slices(options.kind)) {
    const CutMatrix whole = cut_matrix(info, mesh);
    const ParameterBlocks blocks = blocks_of(info, options);
    if (blocks.empty()) return {{whole, all_rows, all_cols}};
    validate_blocks(info);
    std::vector<SignedMatrix> matrices;
    for (const std::vector<Range>& block : blocks.ranges)
      matrices.push_back({part_of(whole, blocks.of_rows, block), blocks.of_rows ? block : all_rows,
                          blocks.of_rows ? all_cols : block});
    return matrices;
  }
  ParameterInfo selected = info;
  Index& slices = slices_are_rows(info, options) ? selected.rows : selected.cols;
  slices = selected_slices(slices, options);
  return {{cut_matrix(selected, mesh), {}, {}}};
}

}  // namespace lowband
