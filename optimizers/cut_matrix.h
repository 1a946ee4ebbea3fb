#pragma once

#include "sharding/parameter.h"
#include "sharding/process_mesh.h"

#include <algorithm>
#include <string>
#include <vector>

namespace lowband {

/// A matrix in blocks on the processes of a replica: one axis of the mesh cuts its rows into consecutive
/// pieces, the other its columns.
struct CutMatrix {
  std::string name;               // of what is sent for it
  std::vector<Range> row_pieces;  // by position along the axis that cuts rows; pieces may be empty
  std::vector<Range> col_pieces;
  bool shard_cuts_rows = false;  // and the tensor axis columns; otherwise the other way round
  bool rows_cut = false;         // several row pieces may have rows
  bool cols_cut = false;

  Index rows() const { return row_pieces.back().end; }
  Index cols() const { return col_pieces.back().end; }
  Index elements() const { return rows() * cols(); }
  Index short_side() const { return std::min(rows(), cols()); }
  Index processes() const { return static_cast<Index>(row_pieces.size() * col_pieces.size()); }
};

/// A parameter in the blocks that processes own (MatrixLayout).
CutMatrix cut_matrix(const ParameterInfo& info, const MeshShape& mesh);

/// The part of `whole` with the given rows, or columns, in increasing order.
CutMatrix part_of(const CutMatrix& whole, bool of_rows, const std::vector<Range>& ranges);

/// `count` consecutive indices, of which piece p has `counts[p]`.
std::vector<Range> consecutive_pieces(const std::vector<Index>& counts);

}  // namespace lowband
