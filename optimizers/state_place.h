#pragma once

#include "sharding/parameter.h"
#include "sharding/process_mesh.h"

#include <span>
#include <string_view>

namespace lowband {

/// Where the piece of one process lies in a whole tensor: consecutive elements of a block of rows and
/// columns.
struct PiecePlace {
  Index rows = 0;  // of the whole
  Index cols = 0;
  Range block_rows, block_cols;
  Range elements;  // of the block, row by row
};

/// The tensor-axis piece of a parameter, which the shard axis does not cut.
PiecePlace parameter_place(const ParameterInfo& info, const MeshShape& mesh, const MeshPosition& position);

/// The piece "<parameter>.<letter>" of Optimizer::state() that the process at `position` holds:
///   M, e, u   (m, n), the owned block of a matrix
///   left      (m, r), of ACP-SGD: a share of the rows of the owned block, those that have the same rows and
///             other columns keeping the rest; r is `piece_cols`
///   Q, basis  (min(m, n), r), as left where m < n, otherwise as right
///   m1, m2    (max(m, n), r), of GaLore: as left where m >= n, otherwise as right
///   right, V  (n, r), of ACP-SGD, and (n, k), of Spectra: likewise of its columns
///   m, v      (m, n), of an elementwise optimizer: consecutive elements of the tensor-axis piece
///   row_v     (m, 1), of NorMuon and NorDion2: as left
///   t         (1, 1)
/// Of block i of a parameter with blocks the letter is followed by "[i]", and m x n is the shape of the
/// block. Throws: InvalidArgument for another letter.
PiecePlace state_place(const ParameterInfo& info, std::string_view letter, Index piece_cols,
                       const MeshShape& mesh, const MeshPosition& position);

/// Whether each replica has its own: M and e, what is kept of what was not sent. Everything else is equal.
bool differs_between_replicas(std::string_view letter);

template <class Real>
void put_piece(const PiecePlace& place, std::span<const Real> piece, std::span<Real> whole);
template <class Real>
void take_piece(const PiecePlace& place, std::span<const Real> whole, std::span<Real> piece);

}  // namespace lowband
