#pragma once

#include "runtime/bfloat16.h"
#include "runtime/cuda/matrix.h"
#include "runtime/cuda/stream.h"
#include "runtime/linalg.h"

#include <cstdint>
#include <memory>

namespace lowband {

/// Who names the algorithm for the products of a shape. kMeasured: of those that cuBLASLt's heuristic names
/// the one that is fastest here and now; which it is may change from run to run, and the bits with it.
enum class PlanChoice : std::uint8_t { kHeuristic, kMeasured };

/// cuBLASLt on one stream: its handle, its workspace, and for every shape met so far its algorithm.
///
/// The first product of a shape asks for the algorithm, later ones do nothing but launch: no allocation, no
/// synchronisation. A choice that is measured waits, and cannot be made while the stream records a graph.
/// Ownership: borrows the stream. Threads: one at a time.
/// Throws: CudaError naming the call, its code and its text.
class CudaBlas {
 public:
  explicit CudaBlas(const CudaStream& stream, PlanChoice choice = PlanChoice::kHeuristic);
  /// On the stream of `other`, with its handle and workspace, which it shares, and algorithms of its own.
  CudaBlas(const CudaBlas& other, PlanChoice choice);
  ~CudaBlas();
  CudaBlas(const CudaBlas&) = delete;
  CudaBlas& operator=(const CudaBlas&) = delete;

  const CudaStream& stream() const { return *stream_; }

  /// D <- alpha op(A) op(B) + beta C, for each of the matrices. With beta = 0, C is not read.
  ///
  /// Shapes: op(A) is (m, k), op(B) is (k, n), C and D are (m, n); positive extents, equal counts. D may be
  /// C and overlaps nothing else.
  /// DType: In, Out: float, float; double, double; BFloat16, float; BFloat16, BFloat16. Sums are formed in
  /// float, those of double in double; never in TF32. Stream: enqueued.
  template <class In, class Out>
  void gemm(Op op_a, Op op_b, double alpha, DeviceMatrix<const In> a, DeviceMatrix<const In> b, double beta,
            DeviceMatrix<const Out> c, DeviceMatrix<Out> d);
  /// Likewise with alpha = scalars[0] and beta = scalars[1], of the device when its turn comes.
  void gemm(Op op_a, Op op_b, const float* scalars, DeviceMatrix<const float> a, DeviceMatrix<const float> b,
            DeviceMatrix<const float> c, DeviceMatrix<float> d);

  /// D <- alpha op(A) op(B) + beta C where the result is symmetric: of a large one only the blocks on and
  /// below the diagonal are computed, the others copied. Shapes: as above, one matrix.
  template <class T>
  void symmetric_gemm(Op op_a, Op op_b, double alpha, DeviceMatrix<const T> a, DeviceMatrix<const T> b,
                      double beta, DeviceMatrix<const T> c, DeviceMatrix<T> d);

  /// Shapes for which an algorithm is kept.
  Index plans() const;

 private:
  template <class In, class Out, class Scale>
  void multiply(Op op_a, Op op_b, bool scalars_there, const Scale* alpha, DeviceMatrix<const In> a,
                DeviceMatrix<const In> b, const Scale* beta, DeviceMatrix<const Out> c, DeviceMatrix<Out> d);

  struct State;
  struct Shared;
  const CudaStream* stream_;
  PlanChoice choice_;
  std::shared_ptr<Shared> shared_;
  std::unique_ptr<State> state_;
};

}  // namespace lowband
