// Compiled without contraction (CMakeLists.txt): the host's bits, save for the order of sums.
#include "runtime/cuda/elements.cuh"
#include "runtime/cuda/numbers.h"
#include "runtime/sketch_hash.h"

#include <algorithm>

namespace lowband {
namespace {

constexpr int kThreads = kElementThreads;

__global__ void find_nan_kernel(const double* x, Index count, std::uint8_t* flags) {
  for (Index k = first_element(); k < count; k += element_stride()) flags[k] = isnan(x[k]);
}

__global__ void find_equal_kernel(float value, const float* x, const std::uint8_t* flag,
                                  std::uint8_t* found) {
  *found = *flag != 0 || *x == value;
}

__global__ void add_unflagged_kernel(const Index* places, Index count, const double* x,
                                     const std::uint8_t* flags, double divisor, double* sum) {
  double own = 0;
  for (Index k = threadIdx.x; k < count; k += blockDim.x) {
    if (flags[places[k]] == 0) own += x[places[k]];
  }
  own = block_sum(own);
  if (threadIdx.x == 0) *sum += own / divisor;
}

__global__ void add_squares_kernel(const double* x, Index count, double* sum) {
  double own = 0;
  for (Index k = threadIdx.x; k < count; k += blockDim.x) own += x[k] * x[k];
  own = block_sum(own);
  if (threadIdx.x == 0) *sum += own;
}

__global__ void square_roots_kernel(double* x, Index count) {
  for (Index k = first_element(); k < count; k += element_stride()) x[k] = sqrt(x[k]);
}

__global__ void clip_kernel(double limit, const double* squares, double last_divisor,
                            double* norm_and_scale) {
  const double norm = sqrt(squares[0] + squares[1] + squares[2] / last_divisor);
  norm_and_scale[0] = norm;
  norm_and_scale[1] = norm > limit ? limit / norm : 1.0;
}

// A thread for each bucket and slab of rows. In a segment of a row at most one column meets a bucket:
// (offset + c) mod buckets = bucket, where the segment begins at a multiple of buckets.
__global__ void sketch_kernel(Guard guard, std::uint64_t parameter, DeviceMatrix<const float> piece,
                              Index row, Index col, Index buckets, double* partial) {
  const Index bucket = first_element();
  if (guard.closed() || bucket >= buckets) return;
  double sum = 0;
  for (Index i = blockIdx.y; i < piece.rows; i += gridDim.y) {
    for (Index segment = col / buckets; segment * buckets < col + piece.cols; ++segment) {
      const SketchSegment place(parameter, row + i, segment, buckets);
      const Index c = segment * buckets + (bucket - place.offset + buckets) % buckets;
      if (c < col || c >= col + piece.cols) continue;
      const float sign = sketch_sign(place.key, static_cast<std::uint32_t>(c));
      sum += static_cast<double>(sign * piece.data[i * piece.row_stride + (c - col)]);
    }
  }
  partial[Index{blockIdx.y} * buckets + bucket] = sum;
}

__global__ void add_slabs_of_sketch_kernel(Guard guard, const double* partial, int slabs, Index buckets,
                                           double* sums) {
  const Index bucket = first_element();
  if (guard.closed() || bucket >= buckets) return;
  double sum = sums[bucket];
  for (int s = 0; s < slabs; ++s) sum += partial[s * buckets + bucket];
  sums[bucket] = sum;
}

}  // namespace

void find_nan(const double* x, Index count, std::uint8_t* flags, const CudaStream& stream) {
  if (count == 0) return;
  launch("find_nan", stream, {blocks_for(count), kThreads}, find_nan_kernel, x, count, flags);
}

void find_equal(float value, const float* x, const std::uint8_t* flag, std::uint8_t* found,
                const CudaStream& stream) {
  launch("find_equal", stream, {1, 1}, find_equal_kernel, value, x, flag, found);
}

void add_unflagged(const Index* places, Index count, const double* x, const std::uint8_t* flags,
                   double divisor, double* sum, const CudaStream& stream) {
  if (count == 0) return;
  launch("add_unflagged", stream, {1, kThreads}, add_unflagged_kernel, places, count, x, flags, divisor, sum);
}

void add_squares(const double* x, Index count, double* sum, const CudaStream& stream) {
  if (count == 0) return;
  launch("add_squares", stream, {1, kThreads}, add_squares_kernel, x, count, sum);
}

void square_roots(double* x, Index count, const CudaStream& stream) {
  if (count == 0) return;
  launch("square_roots", stream, {blocks_for(count), kThreads}, square_roots_kernel, x, count);
}

void clip(double limit, const double* squares, double last_divisor, double* norm_and_scale,
          const CudaStream& stream) {
  launch("clip", stream, {1, 1}, clip_kernel, limit, squares, last_divisor, norm_and_scale);
}

void add_to_sketch(std::uint64_t parameter, DeviceMatrix<const float> piece, Index row, Index col,
                   Index bucket_count, double* partial, double* buckets, const GuardedStream& stream) {
  if (piece.elements() == 0) return;
  const auto across = static_cast<unsigned>((bucket_count + kThreads - 1) / kThreads);
  const int slabs = static_cast<int>(std::min<Index>(piece.rows, kSketchSlabs));
  launch("add_to_sketch", stream.stream, {dim3(across, static_cast<unsigned>(slabs)), kThreads},
         sketch_kernel, stream.guard, parameter, piece, row, col, bucket_count, partial);
  launch("add_to_sketch, second pass", stream.stream, {across, kThreads}, add_slabs_of_sketch_kernel,
         stream.guard, partial, slabs, bucket_count, buckets);
}

}  // namespace lowband
