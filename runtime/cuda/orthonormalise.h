#pragma once

#include "runtime/cuda/blas.h"
#include "runtime/cuda/buffer.h"
#include "runtime/cuda/matrix.h"

#include <cstdint>

namespace lowband {

/// How the columns of a matrix became orthonormal on the device.
enum class DeviceFactorisation : std::int32_t {
  kCholesky = 0,     // two passes of Cholesky QR
  kGramSchmidt = 1,  // two passes were not accurate: columns one by one, twice each
  kNonFinite = 2,    // the input holds a NaN or an infinity and was left alone
};

/// Orthonormalises matrices of one shape, all of them at once: each becomes the factor P of its unpivoted QR
/// with positive diagonal, dead columns zero. The rules of collectives/factors/orthonormalise.h, for matrices
/// that lie on one device.
///
/// Every decision is taken by the device from what it computed: nothing waits for the host. Everything
/// between the input and the rounded result is in double, whose range takes the squares of all floats, so no
/// power of two is taken out first. Elimination goes by blocks of columns that fit into shared memory, one
/// thread block for each matrix; between blocks it is products by `blas`.
/// Ownership: borrows `blas`. Stream: that of `blas`.
/// Reference: CholeskyQR2 (Yamamoto et al. 2015) with a pivot test.
class DeviceOrthonormaliser {
 public:
  /// Shapes: `count` matrices of (rows, cols), rows >= cols >= 1. `dead_tolerance`: kDeadColumnTolerance of
  /// collectives/factors/orthonormalise.h.
  DeviceOrthonormaliser(Index count, Index rows, Index cols, double dead_tolerance, CudaBlas& blas);

  /// Shapes: as constructed, contiguous. Enqueued.
  void run(DeviceMatrix<float> p);

  /// For each matrix of the last run: its Factorisation (runtime/factorisation.h) as a number, then for each
  /// column 1 where it is dead and 0 otherwise. Shapes: (count, 1 + cols). Enqueued.
  void write_outcomes(float* outcomes) const;

  /// Of the last run, (count, cols): 1 where a column is dead.
  const DeviceBuffer<std::uint8_t>& dead() const { return dead_; }
  /// Of the last run, for each matrix: a DeviceFactorisation.
  const DeviceBuffer<std::int32_t>& factorisation() const { return factorisation_; }

 private:
  void eliminate(Index begin, Index columns);
  void pass(DeviceMatrix<const double> from, DeviceMatrix<double> to, bool second);

  Index count_, rows_, cols_;
  double dead_tolerance_;
  CudaBlas* blas_;
  Index block_ = 0;  // columns that are eliminated at once, in shared memory
  DeviceBuffer<double> wide_, other_, gram_, inverse_, diagonal_;
  DeviceBuffer<double> lower_, product_;  // of several blocks
  DeviceBuffer<std::uint8_t> dead_;
  DeviceBuffer<std::int32_t> factorisation_;
};

}  // namespace lowband
