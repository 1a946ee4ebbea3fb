#include "optimizers/cut_matrix.h"

#include "collectives/factors/factor_rows.h"
#include "sharding/layout.h"

namespace lowband {

CutMatrix cut_matrix(const ParameterInfo& info, const MeshShape& mesh) {
  LB_EXPECTS(
      info.cut != TensorCut::kNone || mesh.tensor == 1, "optimizer: ", info.name,
      " is not cut along the tensor axis, expected rows or columns cut with mesh.tensor = ", mesh.tensor);
  const MatrixLayout layout(info.rows, info.cols, info.cut, mesh.tensor, mesh.shard);
  CutMatrix cut{.name = info.name, .row_pieces = {}, .col_pieces = {}};
  cut.shard_cuts_rows = layout.shard_cuts_rows();
  for (int shard = 0; shard < mesh.shard; ++shard)
    (cut.shard_cuts_rows ? cut.row_pieces : cut.col_pieces)
        .push_back(cut.shard_cuts_rows ? layout.owned_rows(shard, 0) : layout.owned_cols(shard, 0));
  for (int tensor = 0; tensor < mesh.tensor; ++tensor)
    (cut.shard_cuts_rows ? cut.col_pieces : cut.row_pieces)
        .push_back(cut.shard_cuts_rows ? layout.owned_cols(0, tensor) : layout.owned_rows(0, tensor));
  cut.rows_cut = cut.row_pieces.size() > 1;
  cut.cols_cut = cut.col_pieces.size() > 1;
  return cut;
}

Range CutMatrix::kept_rows(bool of_rows, const MeshPosition& position) const {
  const Range block = of_rows ? rows_of(position) : cols_of(position);
  const bool by_shard = of_rows != shard_cuts_rows;
  const auto processes = std::ssize(of_rows ? col_pieces : row_pieces);
  const Index process = by_shard ? position.shard : position.tensor;
  const Index begin = block.begin + first_owned_row(block.size(), processes, process);
  return {begin, begin + owned_row_count(block.size(), processes, process)};
}

CutMatrix part_of(const CutMatrix& whole, bool of_rows, const std::vector<Range>& ranges) {
  CutMatrix part = whole;
  std::vector<Index> counts;
  for (const Range& piece : of_rows ? whole.row_pieces : whole.col_pieces) {
    Index& count = counts.emplace_back(0);
    for (const Range& range : ranges)
      count += std::max(Index{0}, std::min(range.end, piece.end) - std::max(range.begin, piece.begin));
  }
  (of_rows ? part.row_pieces : part.col_pieces) = consecutive_pieces(counts);
  (of_rows ? part.rows_cut : part.cols_cut) =
      std::ranges::count_if(counts, [](Index count) { return count > 0; }) > 1;
  return part;
}

std::vector<Range> consecutive_pieces(const std::vector<Index>& counts) {
  std::vector<Range> pieces;
  for (const Index count : counts) {
    const Index begin = pieces.empty() ? 0 : pieces.back().end;
    pieces.push_back({begin, begin + count});
  }
  return pieces;
}

}  // namespace lowband
