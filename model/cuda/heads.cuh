#pragma once

#include "model/attention.h"
#include "runtime/cuda/elements.cuh"
#include "runtime/error.h"

#include <cmath>

namespace lowband {

/// The columns of one head among the rows of one sequence; T may be const.
template <class T>
struct HeadRows {
  T* data;
  Index stride;
};
template <class T>
struct Heads {
  __device__ HeadRows<T> query(Index head) const { return columns(head * shape.head_dim); }
  __device__ HeadRows<T> key(Index head) const { return columns(shape.query_cols() + head * shape.head_dim); }
  __device__ HeadRows<T> value(Index head) const {
    return columns(shape.query_cols() + shape.kv_cols() + head * shape.head_dim);
  }
  __device__ HeadRows<T> columns(Index begin) const {
    return {rows + sequence * shape.sequence * stride + begin, stride};
  }
  const AttentionShape& shape;
  T* rows;
  Index stride;
  Index sequence;
};

/// row_products(sequence, head, t) <- rowsum(dO O) = rowsum(P dP). A warp for each.
template <class T>
__global__ void row_products_kernel(AttentionShape shape, const T* out, const T* d_out, float* row_products) {
  const Index row = (Index{blockIdx.x} * kElementThreads + threadIdx.x) / kWarp;
  if (row >= shape.tokens() * shape.heads) return;
  const Index t = row % shape.sequence, head = row / shape.sequence % shape.heads;
  const Index begin =
      (row / shape.sequence / shape.heads * shape.sequence + t) * shape.query_cols() + head * shape.head_dim;
  float sum = 0;
  for (Index j = threadIdx.x % kWarp; j < shape.head_dim; j += kWarp)
    sum = fmaf(widened(out[begin + j]), widened(d_out[begin + j]), sum);
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) row_products[row] = sum;
}

template <class T>
void launch_row_products(const AttentionShape& shape, const T* out, const T* d_out, float* row_products,
                         const CudaStream& stream) {
  constexpr Index kRows = kElementThreads / kWarp;
  const Index rows = shape.tokens() * shape.heads;
  launch("attention_backward, row products", stream,
         {static_cast<unsigned>((rows + kRows - 1) / kRows), kElementThreads}, row_products_kernel<T>, shape,
         out, d_out, row_products);
}

inline float checked_scale(const AttentionShape& shape) {
  LB_EXPECTS(shape.head_dim % 16 == 0 && shape.head_dim >= 16 && shape.head_dim <= 128,
             "attention on a device: found head_dim ", shape.head_dim, ", expected 16, 32, ... 128");
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape.head_dim)));
}

/// A block for every tile of `side` rows, head and sequence.
inline dim3 blocks_of_tiles(const AttentionShape& shape, Index side, Index heads) {
  return {static_cast<unsigned>((shape.sequence + side - 1) / side), static_cast<unsigned>(heads),
          static_cast<unsigned>(shape.sequences)};
}

}  // namespace lowband
