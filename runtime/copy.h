#pragma once

#include "runtime/tensor.h"

#include <algorithm>

namespace lowband {

/// to <- from. Shapes: equal, any row stride; no overlap.
template <class T>
void copy(MatrixView<T> from, MatrixView<T> to) {
  for (Index i = 0; i < from.rows; ++i) std::copy_n(from.row(i), from.cols, to.row(i));
}

}  // namespace lowband
