#pragma once

#include "runtime/types.h"

#include <span>
#include <type_traits>

namespace lowband {

class Device;

/// A borrowed row-major matrix. Element (i, j) is data[i * row_stride + j], in host memory unless `device`
/// says whose memory it is: then only functions that take views may follow `data`.
///
/// Ownership: borrows; the owner (a Buffer) must outlive it. A view of const elements is made implicitly.
template <class T>
struct MatrixView {
  T* data = nullptr;
  Index rows = 0;
  Index cols = 0;
  Index row_stride = 0;
  Device* device = nullptr;

  MatrixView() = default;
  MatrixView(T* data_, Index rows_, Index cols_) : MatrixView(data_, rows_, cols_, cols_) {}
  MatrixView(T* data_, Index rows_, Index cols_, Index row_stride_, Device* device_ = nullptr)
      : data(data_), rows(rows_), cols(cols_), row_stride(row_stride_), device(device_) {}
  /// Of the same elements.
  template <class U>
  requires(std::is_const_v<T>&& std::is_same_v<const U, T>)
      MatrixView(const MatrixView<U>& other)  // NOLINT(google-explicit-constructor)
      : MatrixView(other.data, other.rows, other.cols, other.row_stride, other.device) {}

  T& operator()(Index i, Index j) const { return data[i * row_stride + j]; }
  T* row(Index i) const { return data + i * row_stride; }
  Index elements() const { return rows * cols; }
  bool contiguous() const { return row_stride == cols || rows <= 1; }
  /// Rows [row, row + row_count) and columns [col, col + col_count).
  MatrixView block(Index row_begin, Index row_count, Index col_begin, Index col_count) const {
    return {data + row_begin * row_stride + col_begin, row_count, col_count, row_stride, device};
  }
  MatrixView row_block(Index begin, Index count) const { return block(begin, count, 0, cols); }
  /// The same elements as one row. Requires contiguous().
  MatrixView line() const { return {data, 1, elements(), elements(), device}; }
  /// The rows x cols elements from `offset` on, in storage order. Requires contiguous().
  MatrixView elements_from(Index offset, Index row_count, Index col_count) const {
    return {data + offset, row_count, col_count, col_count, device};
  }
  /// All elements in storage order, for the host or a Communicator. Requires contiguous().
  std::span<T> flat() const { return {data, static_cast<std::size_t>(elements())}; }
};

/// number / divisor, rounded once, as a factor of matrices that lie where the number does: on a device the
/// host does not learn it. Ownership: borrows the number.
struct Scalar {
  MatrixView<const double> number;
  double divisor = 1;

  /// Of a number in host memory.
  template <class Real>
  Real value() const {
    return static_cast<Real>(number(0, 0) / divisor);
  }
};

}  // namespace lowband
