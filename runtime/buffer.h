#pragma once

#include "runtime/device.h"
#include "runtime/error.h"
#include "runtime/tensor.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <span>
#include <type_traits>

namespace lowband {

/// Owns `size` zeroed elements, of host memory aligned to a 64-byte cache line, or of a device's: then the
/// host may not follow `data()`, and functions that take views do. Move-only. The device outlives it.
template <class T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  static constexpr std::size_t kAlignmentBytes = 64;

  Buffer() = default;
  explicit Buffer(Index size, Device* device = nullptr) : data_(nullptr, Release{device}), size_(size) {
    LB_EXPECTS(size >= 0, "Buffer: size is ", size, ", expected a non-negative element count");
    if (size == 0) return;
    if (device != nullptr) {
      data_.reset(static_cast<T*>(device->allocate(size * static_cast<Index>(sizeof(T)))));
      return;
    }
    void* memory =
        ::operator new (static_cast<std::size_t>(size) * sizeof(T), std::align_val_t{kAlignmentBytes});
    data_.reset(static_cast<T*>(memory));
    std::fill_n(data_.get(), size, T{});
  }

  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  Index size() const { return size_; }
  Device* device() const { return data_.get_deleter().device; }
  std::span<T> span() { return {data_.get(), static_cast<std::size_t>(size_)}; }
  std::span<const T> span() const { return {data_.get(), static_cast<std::size_t>(size_)}; }
  std::span<T> span(Index offset, Index count) {
    return span().subspan(static_cast<std::size_t>(offset), static_cast<std::size_t>(count));
  }
  std::span<const T> span(Index offset, Index count) const {
    return span().subspan(static_cast<std::size_t>(offset), static_cast<std::size_t>(count));
  }
  T& operator[](Index i) { return data_.get()[i]; }
  const T& operator[](Index i) const { return data_.get()[i]; }
  /// The first rows * cols elements from `offset` as a row-major matrix.
  MatrixView<T> matrix(Index offset, Index rows, Index cols) {
    return {data_.get() + offset, rows, cols, cols, device()};
  }
  MatrixView<const T> matrix(Index offset, Index rows, Index cols) const {
    return {data_.get() + offset, rows, cols, cols, device()};
  }
  /// All elements as one row.
  MatrixView<T> line() { return matrix(0, 1, size_); }
  MatrixView<const T> line() const { return matrix(0, 1, size_); }
  /// In host memory.
  void fill(T value) { std::fill_n(data_.get(), size_, value); }

 private:
  struct Release {
    Device* device = nullptr;
    void operator()(T* memory) const {
      if (device != nullptr) return device->release(memory);
      ::operator delete (memory, std::align_val_t{kAlignmentBytes});
    }
  };
  std::unique_ptr<T, Release> data_;
  Index size_ = 0;
};

}  // namespace lowband
