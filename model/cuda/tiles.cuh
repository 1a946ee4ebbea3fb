#pragma once

#include "runtime/cuda/elements.cuh"
#include "runtime/elementwise_math.h"

#include <type_traits>

#include <cuda_bf16.h>
#include <mma.h>

namespace lowband {

/// A row-major matrix in a block's shared memory. Its rows are a little longer than it is wide, so that
/// threads that go down a column do not meet in one bank; and begin where tensor cores can read.
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
    const int stride = cols + 8;  // tensor cores read from multiples of 32 bytes: 16 rows of 8 more elements
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
/// Shapes: op(A) is (m, k), op(B) is (k, n), multiples of 16. DType: BFloat16, by tensor cores with sums in
/// float; float, by multiply-adds.
template <bool kTransposeA, bool kTransposeB, class T>
__device__ void multiply(int m, int n, int k, const Tile<T>& a, const Tile<T>& b, bool add,
                         const Tile<float>& c) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    namespace wmma = nvcuda::wmma;
    using LayoutA = std::conditional_t<kTransposeA, wmma::col_major, wmma::row_major>;
    using LayoutB = std::conditional_t<kTransposeB, wmma::col_major, wmma::row_major>;
    const auto elements = [](const Tile<T>& tile, int i, int j) {
      return reinterpret_cast<const __nv_bfloat16*>(&tile(i, j));
    };
    const int tiles_across = n / 16;
    for (int tile = static_cast<int>(threadIdx.x) / kWarp; tile < m / 16 * tiles_across;
         tile += kElementThreads / kWarp) {
      const int i = tile / tiles_across * 16, j = tile % tiles_across * 16;
      wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
      if (add) {
        wmma::load_matrix_sync(sum, &c(i, j), static_cast<unsigned>(c.stride), wmma::mem_row_major);
      } else {
        wmma::fill_fragment(sum, 0.0F);
      }
      for (int l = 0; l < k; l += 16) {
        wmma::fragment<wmma::matrix_a, 16, 16, 16, __nv_bfloat16, LayoutA> left;
        wmma::fragment<wmma::matrix_b, 16, 16, 16, __nv_bfloat16, LayoutB> right;
        wmma::load_matrix_sync(left, kTransposeA ? elements(a, l, i) : elements(a, i, l),
                               static_cast<unsigned>(a.stride));
        wmma::load_matrix_sync(right, kTransposeB ? elements(b, j, l) : elements(b, l, j),
                               static_cast<unsigned>(b.stride));
        wmma::mma_sync(sum, left, right, sum);
      }
      wmma::store_matrix_sync(&c(i, j), sum, static_cast<unsigned>(c.stride), wmma::mem_row_major);
    }
  } else {
    for (int e = static_cast<int>(threadIdx.x); e < m * n; e += kElementThreads) {
      const int i = e / n, j = e % n;
      float sum = add ? c(i, j) : 0;
      for (int l = 0; l < k; ++l)
        sum = fmaf(kTransposeA ? a(l, i) : a(i, l), kTransposeB ? b(j, l) : b(l, j), sum);
      c(i, j) = sum;
    }
  }
}

}  // namespace lowband
