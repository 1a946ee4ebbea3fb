#pragma once

#include "runtime/cuda/elements.cuh"
#include "runtime/elementwise_math.h"

namespace lowband {

/// A row-major matrix in a block's shared memory. Its rows are a little longer than it is wide, so that
/// threads that go down a column do not meet in one bank.
template <class T>
struct Tile {
  T* data;
  int stride;
  __device__ T& operator()(int i, int j) const { return data[i * stride + j]; }
};

/// Lays out tiles one behind the other; from address 0 on the host, to learn how many bytes they take.
class TileMemory {
 public:
  LB_HOST_DEVICE explicit TileMemory(void* begin) : begin_(static_cast<char*>(begin)) {}
  template <class T>
  LB_HOST_DEVICE Tile<T> tile(int rows, int cols) {
    const int stride = cols + 1;
    Tile<T> tile{begin_ == nullptr ? nullptr : reinterpret_cast<T*>(begin_ + bytes_), stride};
    bytes_ += Index{rows} * stride * Index{sizeof(T)};
    return tile;
  }
  LB_HOST_DEVICE Index bytes() const { return bytes_; }

 private:
  char* begin_;
  Index bytes_ = 0;
};

/// C <- op(A) op(B), or C <- C + op(A) op(B) where `add`, by all kElementThreads threads of a block, which
/// have to meet before A and B are read and before C is.
///
/// Shapes: op(A) is (m, k), op(B) is (k, n).
template <bool kTransposeA, bool kTransposeB>
__device__ void multiply(int m, int n, int k, const Tile<float>& a, const Tile<float>& b, bool add,
                         const Tile<float>& c) {
  for (int e = static_cast<int>(threadIdx.x); e < m * n; e += kElementThreads) {
    const int i = e / n, j = e % n;
    float sum = add ? c(i, j) : 0;
    for (int l = 0; l < k; ++l)
      sum = fmaf(kTransposeA ? a(l, i) : a(i, l), kTransposeB ? b(j, l) : b(l, j), sum);
    c(i, j) = sum;
  }
}

}  // namespace lowband
