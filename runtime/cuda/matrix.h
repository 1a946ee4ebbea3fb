#pragma once

#include "runtime/types.h"

#include <type_traits>

namespace lowband {

/// `count` borrowed row-major matrices of equal shape in device memory. Element (i, j) of matrix b is
/// data[b * matrix_stride + i * row_stride + j]; the host cannot read it.
///
/// Ownership: borrows. A view of const elements is made implicitly.
template <class T>
struct DeviceMatrix {
  T* data = nullptr;
  Index rows = 0;
  Index cols = 0;
  Index row_stride = 0;
  Index count = 1;
  Index matrix_stride = 0;

  DeviceMatrix() = default;
  /// Contiguous, one matrix behind the other.
  DeviceMatrix(T* data_, Index rows_, Index cols_, Index count_ = 1)
      : DeviceMatrix(data_, rows_, cols_, cols_, count_, rows_ * cols_) {}
  DeviceMatrix(T* data_, Index rows_, Index cols_, Index row_stride_, Index count_, Index matrix_stride_)
      : data(data_),
        rows(rows_),
        cols(cols_),
        row_stride(row_stride_),
        count(count_),
        matrix_stride(matrix_stride_) {}
  /// Of the same elements.
  template <class U>
  requires(std::is_const_v<T>&& std::is_same_v<const U, T>)
      DeviceMatrix(const DeviceMatrix<U>& other)  // NOLINT(google-explicit-constructor)
      : DeviceMatrix(other.data, other.rows, other.cols, other.row_stride, other.count, other.matrix_stride) {
  }

  Index elements() const { return count * rows * cols; }
  bool contiguous() const {
    return (row_stride == cols || rows <= 1) && (matrix_stride == rows * cols || count == 1);
  }
  /// Rows [row_begin, row_begin + row_count) and columns [col_begin, col_begin + col_count) of each.
  DeviceMatrix block(Index row_begin, Index row_count, Index col_begin, Index col_count) const {
    return {
        data + row_begin * row_stride + col_begin, row_count, col_count, row_stride, count, matrix_stride};
  }
};

}  // namespace lowband
