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

  /// Of the block of the process at `position`.
  Range rows_of(const MeshPosition& position) const {
    return row_pieces[static_cast<std::size_t>(shard_cuts_rows ? position.shard : position.tensor)];
  }
  Range cols_of(const MeshPosition& position) const {
    return col_pieces[static_cast<std::size_t>(shard_cuts_rows ? position.tensor : position.shard)];
  }
  /// Of a factor with the rows of the matrix (otherwise its columns), those that the process at `position`
  /// keeps: a share of those of its block. Processes with the same rows and other columns keep the rest.
  Range kept_rows(bool of_rows, const MeshPosition& position) const;

  Index rows() const { return row_pieces.back().end; }
  Index cols() const { return col_pieces.back().end; }
  Index elements() const { return rows() * cols(); }
  Index short_side() const { return std::min(rows(), cols()); }
  Index processes() const { return static_cast<Index>(row_pieces.size() * col_pieces.size()); }
};

/// A parameter in the blocks that processes own (MatrixLayout). Throws: InvalidArgument naming it, when the
/// tensor axis does not cut it although it has several processes.
CutMatrix cut_matrix(const ParameterInfo& info, const MeshShape& mesh);

/// The part of `whole` with the given rows, or columns, in increasing order.
CutMatrix part_of(const CutMatrix& whole, bool of_rows, const std::vector<Range>& ranges);

/// `count` consecutive indices, of which piece p has `counts[p]`.
std::vector<Range> consecutive_pieces(const std::vector<Index>& counts);

}  // namespace lowband
