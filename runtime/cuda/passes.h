#pragma once

#include "runtime/bfloat16.h"
#include "runtime/cuda/buffer.h"
#include "runtime/cuda/matrix.h"
#include "runtime/cuda/stream.h"
#include "runtime/elementwise_math.h"

namespace lowband {

// The passes of runtime/passes.h over matrices with any row stride, of which each call takes one (count 1);
// kernels.h has those over contiguous memory. Shapes of one call are equal; extents may be zero.
// Stream: enqueued, not waited for. Element by element the host's bits.

/// X <- value
void fill(float value, DeviceMatrix<float> x, const CudaStream& stream);

/// Y <- alpha X + beta Y, as fma(beta, Y, alpha X), or fma(alpha, X, Y) with beta = 1; with beta = 0 the old
/// Y is not read. Y may be X.
void add(float alpha, DeviceMatrix<const float> x, float beta, DeviceMatrix<float> y,
         const CudaStream& stream);

/// X_ij <- factors[i * by_row + j * by_column] X_ij, of the device: one of by_row, by_column is 1.
void scale_by(const float* factors, bool by_row, DeviceMatrix<float> x, const CudaStream& stream);

/// to <- from. From, To: float or BFloat16, rounded as by `to_bfloat16`.
template <class From, class To>
void convert(DeviceMatrix<const From> from, DeviceMatrix<To> to, const CudaStream& stream);

/// to <- from, between float and double.
void widen(DeviceMatrix<const float> from, DeviceMatrix<double> to, const CudaStream& stream);
void narrow(DeviceMatrix<const double> from, DeviceMatrix<float> to, const CudaStream& stream);

void update(const AdamWStep<float>& step, DeviceMatrix<const float> g, DeviceMatrix<float> m,
            DeviceMatrix<float> v, DeviceMatrix<float> w, const CudaStream& stream);
void update(const AdamDirection<float>& step, DeviceMatrix<const float> g, DeviceMatrix<float> m1,
            DeviceMatrix<float> m2, DeviceMatrix<float> n, const CudaStream& stream);
void update(const LionStep<float>& step, DeviceMatrix<const float> g, DeviceMatrix<float> m,
            DeviceMatrix<float> w, const CudaStream& stream);
void update(const SgdStep<float>& step, DeviceMatrix<const float> g, DeviceMatrix<float> v,
            DeviceMatrix<float> w, const CudaStream& stream);

/// sums[i] <- sum over j of X_ij^2 in double. `usable`: NaN where an element or its square is no finite
/// float. A block for each row, so few long rows are slow: see sum_of_squares.
void sums_of_squares_of_rows(DeviceMatrix<const float> x, double* sums, const CudaStream& stream);

/// U_k <- row or column places[k] of X ;  row or column places[k] of X += alpha U_k, `places` of the device.
void take_slices(bool of_rows, const Index* places, DeviceMatrix<const float> x, DeviceMatrix<float> u,
                 const CudaStream& stream);
void add_to_slices(float alpha, DeviceMatrix<const float> u, bool of_rows, const Index* places,
                   DeviceMatrix<float> x, const CudaStream& stream);

/// sums[i] <- sum over j of |X_ij|, or of columns, in double.
void sums_of_magnitudes(bool of_rows, DeviceMatrix<const float> x, double* sums, const CudaStream& stream);

inline constexpr int kSumSlabs = 256;
/// *sum <- sum of X_ij^2 in double, in an order that follows from the shape. `usable`: NaN where an element
/// or its square is no finite float. `partial`: room for kSumSlabs.
void sum_of_squares(DeviceMatrix<const float> x, bool usable, double* partial, double* sum,
                    const CudaStream& stream);

/// *sum <- sum of X_ij Y_ij in double, in an order that follows from the shape; `partial` likewise.
void inner_product(DeviceMatrix<const float> x, DeviceMatrix<const float> y, double* partial, double* sum,
                   const CudaStream& stream);

}  // namespace lowband
