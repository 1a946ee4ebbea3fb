#pragma once

#include "runtime/bfloat16.h"
#include "runtime/cuda/buffer.h"
#include "runtime/cuda/matrix.h"
#include "runtime/cuda/stream.h"
#include "runtime/elementwise_math.h"

#include <cstdint>
#include <vector>

namespace lowband {

// Passes over device memory, one each: what they cost is what they read and write. All pointers are to device
// memory and do not overlap unless they are equal; extents may be zero.
// Stream: enqueued, not waited for. Determinism: the same bits in every run, whatever the device does beside.

/// M <- beta M + alpha G, and `rounded` <- M as bf16 where it is not null: momentum, and what a product of
/// bf16 numbers reads next. With beta = 0 the old M is not read.
void accumulate(float alpha, const float* g, float beta, float* m, BFloat16* rounded, Index elements,
                const CudaStream& stream);

/// to <- scale from. From, To: float or BFloat16, rounded as by `to_bfloat16`.
template <class From, class To>
void convert(float scale, const From* from, To* to, Index elements, const CudaStream& stream);

/// w <- decay w - eta (scale x): a weight update from what came over the wire, unpacked on the way.
/// Wire: float or BFloat16; `scale` is 1 / (number of replicas), applied in float.
template <class Wire>
void unpack_and_update(float decay, float eta, float scale, const Wire* x, float* w, Index elements,
                       const CudaStream& stream);

/// One step of each weight; Gradient: float or BFloat16.
template <class Gradient>
void update(const AdamWStep<float>& step, const Gradient* g, float* m, float* v, float* w, Index elements,
            const CudaStream& stream);
template <class Gradient>
void update(const LionStep<float>& step, const Gradient* g, float* m, float* w, Index elements,
            const CudaStream& stream);
template <class Gradient>
void update(const SgdStep<float>& step, const Gradient* g, float* v, float* w, Index elements,
            const CudaStream& stream);

/// *found <- 1 where an element is not finite; left as it is otherwise.
template <class T>
void find_non_finite(const T* x, Index elements, std::int32_t* found, const CudaStream& stream);

/// The upper triangle of each square matrix <- its lower one.
template <class T>
void mirror_lower(DeviceMatrix<T> square, const CudaStream& stream);

/// x <- u / (safety sqrt(*sum_of_squares) + epsilon), the divisor in double. T: float or BFloat16.
template <class T>
void divide_by_norm(const float* u, const double* sum_of_squares, double safety, double epsilon, T* x,
                    Index elements, const CudaStream& stream);

/// Q_j <- R_j / (sqrt(sums_of_squares[j]) + epsilon). Shapes: Q, R are one matrix each, equal, Q may be R.
void normalise_columns(DeviceMatrix<const float> r, const double* sums_of_squares, float epsilon,
                       DeviceMatrix<float> q, const CudaStream& stream);

/// Sums in double, in an order that follows from the shape, without allocation.
class DeviceSums {
 public:
  /// For matrices of at most `most_columns` columns.
  DeviceSums(Index most_columns, const CudaStream& stream);

  /// *sum <- sum of x^2. T: float or BFloat16.
  template <class T>
  void sum_of_squares(const T* x, Index elements, double* sum);
  /// sums[j] <- sum over i of A_ij^2, of one matrix.
  void column_sums_of_squares(DeviceMatrix<const float> a, double* sums);

 private:
  const CudaStream* stream_;
  DeviceBuffer<double> partial_;
};

/// Where a tensor lies in a buffer that goes over the wire.
struct WireSegment {
  float* data;  // device memory
  Index elements;
  Index offset;  // in elements of the buffer
};

/// Tensors side by side in one buffer: all of them in one pass.
class WireSegments {
 public:
  /// Copies the table to the device. Ownership: borrows the tensors and the stream.
  WireSegments(const std::vector<WireSegment>& segments, const CudaStream& stream);

  /// wire <- tensors. Wire: float or BFloat16.
  template <class Wire>
  void pack(Wire* wire) const;
  /// tensors <- scale wire
  template <class Wire>
  void unpack(float scale, const Wire* wire) const;

 private:
  const CudaStream* stream_;
  DeviceBuffer<WireSegment> table_;
  Index largest_ = 0;
};

}  // namespace lowband
