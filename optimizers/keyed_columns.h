#pragma once

#include "runtime/copy.h"
#include "runtime/random.h"

#include <vector>

namespace lowband {

/// Column j of a (rows, cols) matrix of standard normal numbers from `stream`, scaled to unit length. The
/// same on every process, which draws the whole column although it may need some of its rows only.
std::vector<double> keyed_unit_column(const RandomStream& stream, Index rows, Index cols, Index j);

/// Elements [first, first + to.rows) of such a column, into the column `to`, wherever it lies.
template <class Real>
void copy_column(const std::vector<double>& column, Index first, MatrixView<Real> to) {
  Buffer<Real> part(to.rows);
  for (Index row = 0; row < to.rows; ++row)
    part[row] = static_cast<Real>(column[static_cast<std::size_t>(first + row)]);
  copy<Real>(part.matrix(0, to.rows, 1), to);
}

/// The columns j of X with redrawn_j = 1 <- rows [first, first + X.rows) of unit columns of a
/// (rows, X.cols) matrix as above. Shapes: redrawn is one row of numbers, where X lies. Waits for nothing.
template <class Real>
void redraw_columns(MatrixView<const Real> redrawn, const RandomStream& stream, Index rows, Index first,
                    MatrixView<Real> x);

}  // namespace lowband
