#include "sharding/layout.h"

#include <algorithm>

namespace lowband {

Range split_range(Index extent, Index pieces, Index piece) {
  LB_EXPECTS(extent >= 0, "split_range: found extent ", extent, ", expected at least 0");
  LB_EXPECTS(pieces >= 1, "split_range: found ", pieces, " pieces, expected at least 1");
  LB_EXPECTS(piece >= 0 && piece < pieces, "split_range: found piece ", piece, ", expected 0 to ",
             pieces - 1);
  // The first extent % pieces ranges are one element longer.
  const Index shorter = extent / pieces;
  const Index longer_ranges = extent % pieces;
  const Index begin = piece * shorter + std::min(piece, longer_ranges);
  return {begin, begin + shorter + (piece < longer_ranges ? 1 : 0)};
}

MatrixLayout::MatrixLayout(Index rows, Index cols, TensorCut cut, Index tensor_pieces, Index shard_pieces)
    : rows_(rows), cols_(cols), cut_(cut), tensor_pieces_(tensor_pieces), shard_pieces_(shard_pieces) {
  LB_EXPECTS(rows >= 0 && cols >= 0, "matrix layout: found ", rows, " x ", cols,
             ", expected extents of at least 0");
  LB_EXPECTS(tensor_pieces >= 1, "matrix layout: found ", tensor_pieces,
             " tensor pieces, expected at least 1");
  LB_EXPECTS(shard_pieces >= 1, "matrix layout: found ", shard_pieces, " shard pieces, expected at least 1");
}

Range MatrixLayout::tensor_rows(Index tensor) const {
  const Range piece = split_range(rows_, tensor_pieces_, tensor);
  return cut_ == TensorCut::kRows ? piece : Range{0, rows_};
}

Range MatrixLayout::tensor_cols(Index tensor) const {
  const Range piece = split_range(cols_, tensor_pieces_, tensor);
  return cut_ == TensorCut::kCols ? piece : Range{0, cols_};
}

Range MatrixLayout::owned_rows(Index shard, Index tensor) const {
  const Range piece = split_range(rows_, shard_pieces_, shard);
  return shard_cuts_rows() ? piece : tensor_rows(tensor);
}

Range MatrixLayout::owned_cols(Index shard, Index tensor) const {
  const Range piece = split_range(cols_, shard_pieces_, shard);
  return shard_cuts_rows() ? tensor_cols(tensor) : piece;
}

}  // namespace lowband
