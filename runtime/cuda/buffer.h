#pragma once

#include "runtime/cuda/matrix.h"
#include "runtime/cuda/stream.h"
#include "runtime/error.h"
#include "runtime/types.h"

#include <span>
#include <type_traits>
#include <utility>

namespace lowband {

// Bytes, for the templates below. All enqueue on the stream and return, `cuda_allocate` and `cuda_free`
// included: the bytes exist for later work of that stream.
void* cuda_allocate(Index bytes, const CudaStream& stream);
void cuda_free(void* bytes, const CudaStream& stream) noexcept;
void cuda_zero(void* bytes, Index count, const CudaStream& stream);
/// Between any two kinds of memory. Host memory that is not pinned is copied before this returns when it is
/// the source; when it is the target, it must stay in place until the stream is over.
void cuda_copy(void* to, const void* from, Index bytes, const CudaStream& stream);
/// `rows` rows of `width` bytes; the strides are in bytes.
void cuda_copy_rows(void* to, Index to_stride, const void* from, Index from_stride, Index width, Index rows,
                    const CudaStream& stream);
/// The device to whose memory this address belongs; -1: to none.
int cuda_device_of(const void* address);
void* cuda_allocate_pinned(Index bytes);
void cuda_free_pinned(void* bytes) noexcept;

/// Owns `size` zeroed elements of device memory, in the order of one stream. Move-only.
///
/// Stream: allocated, zeroed and freed in its order, without waiting. Another stream may use the elements
/// between two events. Ownership: the stream outlives the buffer.
template <class T>
class DeviceBuffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  DeviceBuffer() = default;
  DeviceBuffer(Index size, const CudaStream& stream) : stream_(&stream), size_(size) {
    LB_EXPECTS(size >= 0, "DeviceBuffer: size is ", size, ", expected a non-negative element count");
    if (size == 0) return;
    data_ = static_cast<T*>(cuda_allocate(bytes(size), stream));
    cuda_zero(data_, bytes(size), stream);
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept { swap(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~DeviceBuffer() {
    if (data_ != nullptr) cuda_free(data_, *stream_);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  Index size() const { return size_; }
  /// The first count * rows * cols elements from `offset`.
  DeviceMatrix<T> matrix(Index offset, Index rows, Index cols, Index count = 1) {
    return {data_ + offset, rows, cols, count};
  }
  DeviceMatrix<const T> matrix(Index offset, Index rows, Index cols, Index count = 1) const {
    return {data_ + offset, rows, cols, count};
  }

  /// Enqueues a copy from host memory. Shapes: at most `size()` elements, to the first ones.
  void fill_from(std::span<const T> host) {
    LB_EXPECTS(static_cast<Index>(host.size()) <= size_, "DeviceBuffer: found ", host.size(),
               " elements to copy, expected at most ", size_);
    if (!host.empty()) cuda_copy(data_, host.data(), bytes(static_cast<Index>(host.size())), *stream_);
  }
  /// Copies the first elements to host memory and waits for the stream.
  void copy_to(std::span<T> host) const {
    LB_EXPECTS(static_cast<Index>(host.size()) <= size_, "DeviceBuffer: found room for ", host.size(),
               " elements, expected at most ", size_);
    if (host.empty()) return;
    cuda_copy(host.data(), data_, bytes(static_cast<Index>(host.size())), *stream_);
    stream_->synchronize();
  }

 private:
  static Index bytes(Index elements) { return elements * static_cast<Index>(sizeof(T)); }
  void swap(DeviceBuffer& other) noexcept {
    std::swap(stream_, other.stream_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  const CudaStream* stream_ = nullptr;
  T* data_ = nullptr;
  Index size_ = 0;
};

/// Owns `size` elements of host memory that a device copies from and to while the host does other things.
/// Not initialised. Move-only.
template <class T>
class PinnedBuffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  PinnedBuffer() = default;
  explicit PinnedBuffer(Index size) : size_(size) {
    LB_EXPECTS(size >= 0, "PinnedBuffer: size is ", size, ", expected a non-negative element count");
    if (size > 0) data_ = static_cast<T*>(cuda_allocate_pinned(size * static_cast<Index>(sizeof(T))));
  }
  PinnedBuffer(PinnedBuffer&& other) noexcept { swap(other); }
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~PinnedBuffer() {
    if (data_ != nullptr) cuda_free_pinned(data_);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  Index size() const { return size_; }
  std::span<T> span() { return {data_, static_cast<std::size_t>(size_)}; }
  std::span<const T> span() const { return {data_, static_cast<std::size_t>(size_)}; }

 private:
  void swap(PinnedBuffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  T* data_ = nullptr;
  Index size_ = 0;
};

}  // namespace lowband
