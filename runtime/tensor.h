#pragma once

#include "runtime/types.h"

#include <span>
#include <type_traits>

namespace lowband {

/// A borrowed row-major matrix in host memory. Element (i, j) is data[i * row_stride + j].
///
/// Ownership: borrows; the owner (a Buffer) must outlive it. A view of const elements is made implicitly.
template <class T>
struct MatrixView {
  T* data = nullptr;
  Index rows = 0;
  Index cols = 0;
  Index row_stride = 0;

  MatrixView() = default;
  MatrixView(T* data_, Index rows_, Index cols_) : MatrixView(data_, rows_, cols_, cols_) {}
  MatrixView(T* data_, Index rows_, Index cols_, Index row_stride_)
      : data(data_), rows(rows_), cols(cols_), row_stride(row_stride_) {}
  // NOLINTNEXTLINE(google-explicit-constructor): a const view of the same elements
  operator MatrixView<const T>() const requires(!std::is_const_v<T>) {
    return {data, rows, cols, row_stride};
  }

  T& operator()(Index i, Index j) const { return data[i * row_stride + j]; }
  T* row(Index i) const { return data + i * row_stride; }
  Index elements() const { return rows * cols; }
  bool contiguous() const { return row_stride == cols || rows <= 1; }
  /// Rows [row, row + row_count) and columns [col, col + col_count).
  MatrixView block(Index row_begin, Index row_count, Index col_begin, Index col_count) const {
    return {data + row_begin * row_stride + col_begin, row_count, col_count, row_stride};
  }
  MatrixView row_block(Index begin, Index count) const { return block(begin, count, 0, cols); }
  /// All elements in storage order. Requires contiguous().
  std::span<T> flat() const { return {data, static_cast<std::size_t>(elements())}; }
};

}  // namespace lowband
