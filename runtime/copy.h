#pragma once

#include "runtime/buffer.h"
#include "runtime/device.h"
#include "runtime/tensor.h"

#include <algorithm>
#include <type_traits>

namespace lowband {

/// to <- from. Shapes: equal, any row stride; no overlap. From and to any place; what comes to the host from
/// a device, or goes the other way, is there on return.
template <class T>
void copy(std::type_identity_t<MatrixView<const T>> from, MatrixView<T> to) {
  Device* const device = from.device != nullptr ? from.device : to.device;
  if (device == nullptr) {
    for (Index i = 0; i < from.rows; ++i) std::copy_n(from.row(i), from.cols, to.row(i));
    return;
  }
  if (from.elements() == 0) return;
  constexpr auto kBytes = static_cast<Index>(sizeof(T));
  if (from.contiguous() && to.contiguous()) {
    device->copy(from.data, 0, to.data, 0, from.elements() * kBytes, 1);
  } else {
    device->copy(from.data, from.row_stride * kBytes, to.data, to.row_stride * kBytes, from.cols * kBytes,
                 from.rows);
  }
  if (from.device == nullptr || to.device == nullptr) device->synchronize();
}

/// A matrix for what only the host can do: itself, or a copy of what lies on a device.
template <class T>
class OnHost {
 public:
  explicit OnHost(MatrixView<const T> a) : view_(a) {
    if (a.device == nullptr) return;
    copy_ = Buffer<T>(a.elements());
    copy<T>(a, writable());
    view_ = writable();
  }
  MatrixView<const T> view() const { return view_; }
  /// The copy, where there is one.
  MatrixView<T> writable() { return copy_.matrix(0, view_.rows, view_.cols); }

 private:
  Buffer<T> copy_;
  MatrixView<const T> view_;
};

}  // namespace lowband
