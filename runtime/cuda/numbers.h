#pragma once

#include "runtime/cuda/matrix.h"
#include "runtime/cuda/passes.h"
#include "runtime/cuda/stream.h"
#include "runtime/types.h"

#include <cstdint>

namespace lowband {

// The few numbers of runtime/numbers.h, on the device: one block each, whose sums have an order that follows
// from their count. Stream: enqueued, not waited for.

void find_nan(const double* x, Index count, std::uint8_t* flags, const CudaStream& stream);
void find_equal(float value, const float* x, const std::uint8_t* flag, std::uint8_t* found,
                const CudaStream& stream);
void add_unflagged(const Index* places, Index count, const double* x, const std::uint8_t* flags,
                   double divisor, double* sum, const CudaStream& stream);
void add_squares(const double* x, Index count, double* sum, const CudaStream& stream);
void square_roots(double* x, Index count, const CudaStream& stream);
void clip(double limit, const double* squares, double last_divisor, double* norm_and_scale,
          const CudaStream& stream);

/// Rows that are sketched apart.
inline constexpr int kSketchSlabs = 32;
/// Adds a piece to the sketch of optimizers/gradient_sketch.h. `partial`: room for kSketchSlabs x buckets.
void add_to_sketch(std::uint64_t parameter, DeviceMatrix<const float> piece, Index row, Index col,
                   Index bucket_count, double* partial, double* buckets, const GuardedStream& stream);

}  // namespace lowband
