#pragma once

#include "runtime/bfloat16.h"
#include "runtime/cuda/buffer.h"
#include "runtime/cuda/matrix.h"
#include "runtime/cuda/stream.h"
#include "runtime/elementwise_math.h"
#include "runtime/random.h"

#include <cstdint>

namespace lowband {

// The passes of runtime/passes.h over matrices with any row stride, of which each call takes one (count 1);
// kernels.h has those over contiguous memory. Shapes of one call are equal; extents may be zero.
// Stream: enqueued, not waited for. Element by element the host's bits.

/// Under which condition work writes anything: without a flag always, otherwise where (*flag != 0) == value
/// when its turn comes. The flag lies on the device.
struct Guard {
  const std::uint8_t* flag = nullptr;
  bool value = false;
  LB_HOST_DEVICE bool closed() const { return flag != nullptr && (*flag != 0) != value; }
};

/// A stream for guarded work; a stream alone is for work that is not.
struct GuardedStream {
  const CudaStream& stream;
  Guard guard = {};
  // NOLINTNEXTLINE(google-explicit-constructor): see above
  GuardedStream(const CudaStream& stream_, Guard guard_ = {}) : stream(stream_), guard(guard_) {}
};

/// number / divisor, of a number on the device; without one whatever it stands for stays as it is.
struct DeviceScalar {
  const double* number = nullptr;
  double divisor = 1;
  LB_HOST_DEVICE float value() const { return static_cast<float>(*number / divisor); }
};

/// X <- value
void fill(float value, DeviceMatrix<float> x, const GuardedStream& stream);

/// Y <- alpha X + beta Y, as fma(beta, Y, alpha X), or fma(alpha, X, Y) with beta = 1; with beta = 0 the old
/// Y is not read. Y may be X.
void add(float alpha, DeviceMatrix<const float> x, float beta, DeviceMatrix<float> y,
         const GuardedStream& stream);

/// Likewise, alpha of the device.
void add(const DeviceScalar& alpha, DeviceMatrix<const float> x, float beta, DeviceMatrix<float> y,
         const GuardedStream& stream);

/// to <- from, rows of elements of one or four bytes.
template <class T>
void copy(DeviceMatrix<const T> from, DeviceMatrix<T> to, const GuardedStream& stream);

/// X_ij <- factors[i * by_row + j * by_column] X_ij, of the device: one of by_row, by_column is 1.
void scale_by(const float* factors, bool by_row, DeviceMatrix<float> x, const GuardedStream& stream);

/// to <- from. From, To: float or BFloat16, rounded as by `to_bfloat16`.
template <class From, class To>
void convert(DeviceMatrix<const From> from, DeviceMatrix<To> to, const GuardedStream& stream);

/// to <- from, between float and double.
void widen(DeviceMatrix<const float> from, DeviceMatrix<double> to, const GuardedStream& stream);
void narrow(DeviceMatrix<const double> from, DeviceMatrix<float> to, const GuardedStream& stream);

void update(const AdamWStep<float>& step, DeviceMatrix<const float> g, DeviceMatrix<float> m,
            DeviceMatrix<float> v, DeviceMatrix<float> w, const GuardedStream& stream);
void update(const AdamDirection<float>& step, DeviceMatrix<const float> g, DeviceMatrix<float> m1,
            DeviceMatrix<float> m2, DeviceMatrix<float> n, const GuardedStream& stream);
void update(const LionStep<float>& step, const DeviceScalar& gradient_scale, DeviceMatrix<const float> g,
            DeviceMatrix<float> m, DeviceMatrix<float> w, const GuardedStream& stream);
void update(const SgdStep<float>& step, const DeviceScalar& gradient_scale, DeviceMatrix<const float> g,
            DeviceMatrix<float> v, DeviceMatrix<float> w, const GuardedStream& stream);
/// *t <- *t + 1, then the step of update t; `step`: room for one.
void update(const AdamWRule<float>& rule, const DeviceScalar& gradient_scale, float* t,
            AdamWStep<float>* step, DeviceMatrix<const float> g, DeviceMatrix<float> m, DeviceMatrix<float> v,
            DeviceMatrix<float> w, const GuardedStream& stream);

/// X <- X / (safety sqrt(*square) + epsilon) ;  X_ij <- X_ij / (norms[j] + epsilon), as products with the
/// rounded quotients.
void divide_by_norm(const double* square, double safety, double epsilon, DeviceMatrix<float> x,
                    const GuardedStream& stream);
void divide_columns(const double* norms, float epsilon, DeviceMatrix<float> x, const GuardedStream& stream);

/// The columns j of X with redrawn[j] = 1 <- those rows from `first_row` on of unit vectors of `column_rows`
/// Gaussian numbers, of which i is number i x.cols + j of `random`.
void redraw_columns(const float* redrawn, const RandomStream& random, Index column_rows, Index first_row,
                    DeviceMatrix<float> x, const GuardedStream& stream);

/// two[0], two[1] <- alpha, beta, or 0, 1 where the guard is closed: a product with these leaves C as it is.
void scalars_of_product(float alpha, float beta, float* two, const GuardedStream& stream);

/// sums[i] <- sum over j of X_ij^2 in double. `usable`: NaN where an element or its square is no finite
/// float. A block for each row, so few long rows are slow: see sum_of_squares.
void sums_of_squares_of_rows(DeviceMatrix<const float> x, double* sums, const CudaStream& stream);

/// U_k <- row or column places[k] of X ;  row or column places[k] of X += alpha U_k, `places` of the device.
void take_slices(bool of_rows, const Index* places, DeviceMatrix<const float> x, DeviceMatrix<float> u,
                 const GuardedStream& stream);
void add_to_slices(float alpha, DeviceMatrix<const float> u, bool of_rows, const Index* places,
                   DeviceMatrix<float> x, const GuardedStream& stream);

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
