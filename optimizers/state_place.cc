#include "optimizers/state_place.h"

#include "collectives/factors/factor_rows.h"

#include <algorithm>

namespace lowband {
namespace {

Range all(Index extent) { return {0, extent}; }

PiecePlace whole_block(Index rows, Index cols, Range block_rows, Range block_cols) {
  return {.rows = rows,
          .cols = cols,
          .block_rows = block_rows,
          .block_cols = block_cols,
          .elements = all(block_rows.size() * block_cols.size())};
}

/// Calls `visit(in_piece, in_whole, count)` for every run of elements that lie side by side in both.
template <class Visit>
void for_each_run(const PiecePlace& place, Visit visit) {
  const Index width = place.block_cols.size();
  for (Index k = place.elements.begin; k < place.elements.end;) {
    const Index row = k / width, col = k % width;
    const Index count = std::min(width - col, place.elements.end - k);
    visit(k - place.elements.begin,
          (place.block_rows.begin + row) * place.cols + place.block_cols.begin + col, count);
    k += count;
  }
}

}  // namespace

PiecePlace parameter_place(const ParameterInfo& info, const MeshShape& mesh, const MeshPosition& position) {
  const MatrixLayout layout(info.rows, info.cols, info.cut, mesh.tensor, mesh.shard);
  return whole_block(info.rows, info.cols, layout.tensor_rows(position.tensor),
                     layout.tensor_cols(position.tensor));
}

PiecePlace state_place(const ParameterInfo& info, std::string_view letter, Index piece_cols,
                       const MeshShape& mesh, const MeshPosition& position) {
  const MatrixLayout layout(info.rows, info.cols, info.cut, mesh.tensor, mesh.shard);
  const Range rows = layout.owned_rows(position.shard, position.tensor);
  const Range cols = layout.owned_cols(position.shard, position.tensor);
  if (letter == "M" || letter == "e" || letter == "u") return whole_block(info.rows, info.cols, rows, cols);
  const bool tall = info.rows >= info.cols;
  if (letter == "Q" || letter == "basis")
    return whole_block(std::min(info.rows, info.cols), piece_cols, tall ? cols : rows, all(piece_cols));
  const bool of_h = letter == "m1" || letter == "m2";
  if (letter == "left" || letter == "right" || letter == "V" || of_h) {
    // Rows of the block; the processes of the axis that cuts the other dimension have shares of them.
    const bool of_rows = of_h ? tall : letter == "left";
    const Range block = of_rows ? rows : cols;
    const bool by_shard = of_rows != layout.shard_cuts_rows();
    const Index processes = by_shard ? mesh.shard : mesh.tensor;
    const Index process = by_shard ? position.shard : position.tensor;
    const Index begin = block.begin + first_owned_row(block.size(), processes, process);
    return whole_block(of_rows ? info.rows : info.cols, piece_cols,
                       {begin, begin + owned_row_count(block.size(), processes, process)}, all(piece_cols));
  }
  if (letter == "m" || letter == "v") {
    PiecePlace place = parameter_place(info, mesh, position);
    place.elements = split_range(place.elements.size(), mesh.shard, position.shard);
    return place;
  }
  if (letter == "row_v") return whole_block(info.rows, 1, rows, all(1));
  LB_EXPECTS(letter == "t", "optimizer state: found ", info.name, ".", letter,
             ", expected a letter whose place is known: M, e, u, Q, basis, left, right, V, m1, m2, m, v, "
             "row_v or t");
  return whole_block(1, 1, all(1), all(1));
}

bool differs_between_replicas(std::string_view letter) { return letter == "M" || letter == "e"; }

template <class Real>
void put_piece(const PiecePlace& place, std::span<const Real> piece, std::span<Real> whole) {
  for_each_run(place, [&](Index in_piece, Index in_whole, Index count) {
    std::copy_n(piece.data() + in_piece, count, whole.data() + in_whole);
  });
}

template <class Real>
void take_piece(const PiecePlace& place, std::span<const Real> whole, std::span<Real> piece) {
  for_each_run(place, [&](Index in_piece, Index in_whole, Index count) {
    std::copy_n(whole.data() + in_whole, count, piece.data() + in_piece);
  });
}

template void put_piece(const PiecePlace&, std::span<const float>, std::span<float>);
template void put_piece(const PiecePlace&, std::span<const double>, std::span<double>);
template void take_piece(const PiecePlace&, std::span<const float>, std::span<float>);
template void take_piece(const PiecePlace&, std::span<const double>, std::span<double>);

}  // namespace lowband
