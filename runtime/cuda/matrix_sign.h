#pragma once

#include "runtime/bfloat16.h"
#include "runtime/cuda/blas.h"
#include "runtime/cuda/buffer.h"
#include "runtime/cuda/kernels.h"
#include "runtime/cuda/matrix.h"

#include <span>
#include <vector>

namespace lowband {

/// The matrix sign (orthonormal polar factor) of matrices of one shape, by an odd polynomial iteration on the
/// device: the arithmetic of optimizers/matrix_sign.h, where the polynomials come from.
///
/// T: float, or BFloat16, in which X, its Gram matrix and the polynomial are then rounded after every product
/// (all sums in float).
/// Ownership: borrows `blas`. Stream: that of `blas`; enqueued, no synchronisation.
template <class T>
class DeviceMatrixSign {
 public:
  /// One step X <- a X + (b A + c A^2) X with A the Gram matrix of the short side.
  struct Step {
    double a, b, c;
  };

  DeviceMatrixSign(std::span<const Step> steps, double safety, double epsilon, Index rows, Index cols,
                   CudaBlas& blas);

  /// X <- sign U, from X_0 = U / (safety |U|_F + epsilon). Shapes: one contiguous matrix each. A zero matrix
  /// stays zero.
  void compute(DeviceMatrix<const float> u, DeviceMatrix<T> x);

 private:
  std::vector<Step> steps_;
  double safety_, epsilon_;
  Index rows_, cols_;
  CudaBlas* blas_;
  DeviceSums sums_;
  DeviceBuffer<double> sum_of_squares_;
  DeviceBuffer<T> gram_, polynomial_, next_;
};

}  // namespace lowband
