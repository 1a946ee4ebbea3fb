#include "optimizers/state_place.h"

#include "optimizers/layer_matrix.h"

#include <algorithm>
#include <charconv>
#include <optional>

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

/// "left[3]": the letter, and the block, 0 where there is none.
struct BlockLetter {
  std::string_view letter;
  std::size_t block = 0;
};

BlockLetter block_letter(std::string_view text) {
  const std::size_t bracket = text.find('[');
  BlockLetter found{.letter = text.substr(0, bracket)};
  if (bracket != std::string_view::npos)
    std::from_chars(text.data() + bracket + 1, text.data() + text.size(), found.block);
  return found;
}

/// Of a matrix optimizer; nothing for another letter.
std::optional<PiecePlace> matrix_state_place(const LayerMatrix& matrix, std::string_view letter,
                                             Index piece_cols, const MeshPosition& position) {
  const Index m = matrix.info.rows, n = matrix.info.cols;
  const Range rows = matrix.cut.rows_of(position), cols = matrix.cut.cols_of(position);
  const auto kept = [&](bool of_rows) {
    return whole_block(of_rows ? m : n, piece_cols, matrix.cut.kept_rows(of_rows, position), all(piece_cols));
  };
  if (letter == "M" || letter == "e" || letter == "u") return whole_block(m, n, rows, cols);
  if (letter == "Q" || letter == "basis") return kept(!matrix.tall());
  if (letter == "left") return kept(true);
  if (letter == "right" || letter == "V") return kept(false);
  if (letter == "m1" || letter == "m2") return kept(matrix.tall());
  if (letter == "row_v") return whole_block(m, 1, matrix.cut.kept_rows(true, position), all(1));
  return std::nullopt;
}

}  // namespace

PiecePlace parameter_place(const ParameterInfo& info, const MeshShape& mesh, const MeshPosition& position) {
  const MatrixLayout layout(info.rows, info.cols, info.cut, mesh.tensor, mesh.shard);
  return whole_block(info.rows, info.cols, layout.tensor_rows(position.tensor),
                     layout.tensor_cols(position.tensor));
}

PiecePlace state_place(const ParameterInfo& info, std::string_view letter, Index piece_cols,
                       const MeshShape& mesh, const MeshPosition& position) {
  if (letter == "m" || letter == "v") {
    PiecePlace place = parameter_place(info, mesh, position);
    place.elements = split_range(place.elements.size(), mesh.shard, position.shard);
    return place;
  }
  const auto [plain_letter, block] = block_letter(letter);
  if (plain_letter == "t") return whole_block(1, 1, all(1), all(1));
  const std::vector<LayerMatrix> matrices = cut_matrices(info, mesh, {});
  LB_EXPECTS(block < matrices.size(), "optimizer state: found ", info.name, ".", letter, ", expected one of ",
             matrices.size(), " blocks");
  const auto place = matrix_state_place(matrices[block], plain_letter, piece_cols, position);
  LB_EXPECTS(place, "optimizer state: found ", info.name, ".", letter,
             ", expected a letter whose place is known: M, e, u, Q, basis, left, right, V, m1, m2, m, v, "
             "row_v or t");
  return *place;
}

bool differs_between_replicas(std::string_view letter) {
  const std::string_view plain = block_letter(letter).letter;
  return plain == "M" || plain == "e";
}

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
