#pragma once

#include "runtime/error.h"
#include "runtime/types.h"

namespace lowband {

struct Range {
  Index begin = 0;
  Index end = 0;
  Index size() const { return end - begin; }
  bool operator==(const Range&) const = default;
};

/// Piece `piece` of `extent` cut into `pieces` consecutive ranges whose sizes differ by at most one, the
/// larger ones first. No padding: pieces may be empty. Throws: InvalidArgument for a negative extent, pieces
/// < 1 or a piece outside 0..pieces-1.
Range split_range(Index extent, Index pieces, Index piece);

/// Which dimension of a parameter the tensor axis cuts.
enum class TensorCut : std::uint8_t { kNone, kRows, kCols };

/// Who holds what of one matrix. The tensor axis cuts dimension `cut`; the shard axis cuts the other one
/// (columns when the tensor axis cuts nothing). Pure arithmetic.
class MatrixLayout {
 public:
  MatrixLayout(Index rows, Index cols, TensorCut cut, Index tensor_pieces, Index shard_pieces);

  Index rows() const { return rows_; }
  Index cols() const { return cols_; }
  TensorCut cut() const { return cut_; }
  /// Global rows and columns of the tensor piece: what the model computes with and every shard holds.
  Range tensor_rows(Index tensor) const;
  Range tensor_cols(Index tensor) const;
  /// Global rows and columns of the piece whose optimizer state process (shard, tensor) owns.
  Range owned_rows(Index shard, Index tensor) const;
  Range owned_cols(Index shard, Index tensor) const;
  bool shard_cuts_rows() const { return cut_ == TensorCut::kCols; }

 private:
  Index rows_, cols_;
  TensorCut cut_;
  Index tensor_pieces_, shard_pieces_;
};

}  // namespace lowband
