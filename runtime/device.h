#pragma once

#include "runtime/bfloat16.h"
#include "runtime/elementwise_math.h"
#include "runtime/error.h"
#include "runtime/factorisation.h"
#include "runtime/random.h"
#include "runtime/tensor.h"

#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace lowband {

enum class Op : std::uint8_t { kNone, kTranspose };

/// One CUDA device as the driver describes it.
struct CudaDevice {
  std::string name;
  std::string compute_capability;  // "9.0"
  double memory_gib = 0;
};

/// What the CUDA side of this binary found. Never throws: a missing driver is a fact to report, not an error.
struct CudaStatus {
  bool built_in = false;
  std::string toolkit_version;  // of cudart at build time, empty when not built in
  std::string cublas_version;   // empty when not built in
  std::string reason;           // why `devices` is empty, one sentence
  std::vector<CudaDevice> devices;
};
CudaStatus cuda_status();

/// A processor with memory of its own and one queue of work: what the functions on views (runtime/passes.h,
/// linalg.h, low_rank.h, copy.h) call when their views lie there. They check shapes; these functions do not.
///
/// Work runs in the order of the calls. A call waits only where it says so: `synchronize`, `gram`, and `copy`
/// to memory that is not pinned; so what a step decides has to be decided by numbers in the device's memory.
/// DType: float, as optimizers store it on a device; sums are formed in double.
/// Determinism: the same bits in every run. Element by element those of the host; sums run in another order.
/// Threads: any; their calls take turns. Throws: CudaError.
class Device {
 public:
  Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  virtual ~Device() = default;

  /// "cuda:0", for messages.
  virtual std::string name() const = 0;

  /// Zeroed; freed in the order of the queue.
  virtual void* allocate(Index bytes) = 0;
  virtual void release(void* memory) noexcept = 0;
  /// Whether this is an address of its memory.
  virtual bool holds(const void* memory) const = 0;
  /// `rows` rows of `width` bytes, from and to anywhere; the strides are in bytes too.
  virtual void copy(const void* from, Index from_stride, void* to, Index to_stride, Index width,
                    Index rows) = 0;
  /// Waits until all work is over.
  virtual void synchronize() = 0;
  /// `stream`: another queue of this device, a cudaStream_t; null is CUDA's default one. Work that is given
  /// to this Device from now on begins when all that is in `stream` so far is over; or the other way round,
  /// work that comes to `stream` from now on begins when all of this Device so far is over. Neither waits.
  virtual void follow(void* stream) = 0;
  virtual void precede(void* stream) = 0;

  /// Bytes on their way to host memory.
  class Arrival {
   public:
    Arrival() = default;
    Arrival(const Arrival&) = delete;
    Arrival& operator=(const Arrival&) = delete;
    virtual ~Arrival() = default;
    /// Whether they are there. Does not wait.
    virtual bool over() const = 0;
    /// Waits for them; valid as long as this.
    virtual const void* wait() = 0;
  };
  /// What is at `from` when all work so far is over. Ownership: the device outlives it.
  virtual std::unique_ptr<Arrival> send_to_host(const void* from, Index bytes) = 0;

  /// Until `end_where`, work of the calling thread leaves all memory as it is unless (*flag != 0) == value
  /// when its turn comes; see `unless` below. Not nested. Of copies within this memory, passes over elements,
  /// `gemm` and `add_to_sketch`; InvalidArgument for what else writes, but for `allocate`.
  virtual void begin_where(const std::uint8_t* flag, bool value) = 0;
  virtual void end_where() noexcept = 0;

  /// `bytes` bytes <- 0
  virtual void zero(void* memory, Index bytes) = 0;
  /// x <- value
  virtual void fill(float value, MatrixView<float> x) = 0;
  /// y <- alpha x + beta y; with beta = 0 the old y is not read.
  virtual void add(float alpha, MatrixView<const float> x, float beta, MatrixView<float> y) = 0;
  virtual void add(const Scalar& alpha, MatrixView<const float> x, float beta, MatrixView<float> y) = 0;
  /// X_ij <- factors_i X_ij or factors_j X_ij; `factors` of the host, copied before this returns.
  virtual void scale_rows(std::span<const float> factors, MatrixView<float> x) = 0;
  virtual void scale_columns(std::span<const float> factors, MatrixView<float> x) = 0;
  virtual void round(MatrixView<const float> x, MatrixView<BFloat16> y) = 0;
  virtual void widen(MatrixView<const BFloat16> x, MatrixView<float> y) = 0;
  virtual void update(const AdamWStep<float>& step, MatrixView<const float> g, MatrixView<float> m,
                      MatrixView<float> v, MatrixView<float> w) = 0;
  /// t <- t + 1, then the step of update t.
  virtual void update(const AdamWRule<float>& rule, const Scalar& gradient_scale, MatrixView<float> t,
                      MatrixView<const float> g, MatrixView<float> m, MatrixView<float> v,
                      MatrixView<float> w) = 0;
  virtual void update(const AdamDirection<float>& step, MatrixView<const float> g, MatrixView<float> m1,
                      MatrixView<float> m2, MatrixView<float> n) = 0;
  /// Without a number, `gradient_scale` is the step's own.
  virtual void update(const LionStep<float>& step, const Scalar& gradient_scale, MatrixView<const float> g,
                      MatrixView<float> m, MatrixView<float> w) = 0;
  virtual void update(const SgdStep<float>& step, const Scalar& gradient_scale, MatrixView<const float> g,
                      MatrixView<float> v, MatrixView<float> w) = 0;

  /// U_k <- row or column places[k] of X ;  row or column places[k] of X += alpha U_k. `places` of the host,
  /// copied before this returns.
  virtual void take_slices(bool of_rows, std::span<const Index> places, MatrixView<const float> x,
                           MatrixView<float> u) = 0;
  virtual void add_to_slices(float alpha, MatrixView<const float> u, bool of_rows,
                             std::span<const Index> places, MatrixView<float> x) = 0;

  // Sums; the results in this memory.
  virtual void inner_product(MatrixView<const float> x, MatrixView<const float> y, double* sum) = 0;
  virtual void sums_of_magnitudes(bool of_rows, MatrixView<const float> x, double* sums) = 0;
  /// The sum of squares of each matrix. `usable`: NaN where an element or its square is no finite float.
  virtual void sums_of_squares(std::span<const MatrixView<const float>> matrices, bool usable,
                               double* sums) = 0;
  virtual void sums_of_squares_of_rows(MatrixView<const float> x, double* sums) = 0;
  /// Of all columns, matrix after matrix.
  virtual void sums_of_squares_of_columns(std::span<const MatrixView<const float>> matrices,
                                          double* sums) = 0;

  // Numbers that decide something, as runtime/numbers.h has them; all in this memory.
  virtual void find_nan(MatrixView<const double> x, std::uint8_t* flags) = 0;
  virtual void find_equal(float value, const float* x, const std::uint8_t* flag, std::uint8_t* found) = 0;
  virtual void add_unflagged(MatrixView<const Index> places, const double* x, const std::uint8_t* flags,
                             double divisor, double* sum) = 0;
  virtual void add_squares(MatrixView<const double> x, double* sum) = 0;
  virtual void square_roots(MatrixView<double> x) = 0;
  virtual void clip(double limit, const double* squares, double last_divisor, double* norm_and_scale) = 0;
  virtual void divide_by_norm(const double* square, double safety, double epsilon, MatrixView<float> x) = 0;
  virtual void divide_columns(const double* norms, float epsilon, MatrixView<float> x) = 0;
  virtual void add_to_sketch(std::uint64_t parameter, MatrixView<const float> piece, Index row, Index col,
                             MatrixView<double> buckets) = 0;
  virtual void redraw_columns(const float* redrawn, const RandomStream& stream, Index column_rows,
                              Index first_row, MatrixView<float> x) = 0;

  /// C <- alpha op(A) op(B) + beta C, none empty. `symmetric`: the result is, and half of it may be copied.
  virtual void gemm(Op op_a, Op op_b, float alpha, MatrixView<const float> a, MatrixView<const float> b,
                    float beta, MatrixView<float> c, bool symmetric) = 0;
  /// G <- P^T P in double, G of the host. Waits.
  virtual void gram(MatrixView<const float> p, MatrixView<double> g) = 0;
  /// P <- P T, T (columns, columns) of the host, product in double.
  virtual void multiply_right(MatrixView<float> p, MatrixView<const double> t) = 0;

  /// Each matrix <- the factor of its unpivoted QR with positive diagonal, dead columns zero (see
  /// collectives/factors/orthonormalise.h). outcomes[i], of this memory: the Factorisation of matrix i as a
  /// number, then for each column 1 where it is dead and 0 otherwise.
  ///
  /// Shapes: contiguous, rows >= columns >= 1.
  virtual void orthonormalise(std::span<const MatrixView<float>> matrices, double dead_tolerance,
                              std::span<float* const> outcomes) = 0;
};

/// CUDA device `index` as a Device, with a stream of its own.
/// Throws: CudaError when CUDA is not built in or there is no such device.
std::unique_ptr<Device> open_device(int index = 0);

/// Calls `body` unless `flag` is set (or where it is), which it is when it is not 0.
///
/// A flag in host memory decides here and now. One on a device decides when its turn comes, for the work of
/// `body` on that device alone: `body` itself is called in any case, and must not change what the host holds.
template <class Body>
void only_where(MatrixView<const std::uint8_t> flag, bool value, const Body& body) {
  if (flag.device == nullptr) {
    if ((*flag.data != 0) == value) body();
    return;
  }
  struct Scope {
    Scope(Device* device_, const std::uint8_t* flag_, bool value_) : device(device_) {
      device->begin_where(flag_, value_);
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
    ~Scope() { device->end_where(); }
    Device* device;
  } const scope(flag.device, flag.data, value);
  body();
}
template <class Body>
void unless(MatrixView<const std::uint8_t> flag, const Body& body) {
  only_where(flag, false, body);
}
template <class Body>
void where(MatrixView<const std::uint8_t> flag, const Body& body) {
  only_where(flag, true, body);
}

/// Whether a Device computes in Real.
template <class Real>
inline constexpr bool kOnDevices = std::is_same_v<Real, float>;

/// For messages.
inline std::string place_name(const Device* device) {
  return device == nullptr ? "the host" : device->name();
}

/// The device whose memory all views lie in; null when it is the host's.
/// Throws: InvalidArgument naming `function`, for views in different places and for a Real that devices do
/// not compute in.
template <class Real, class View, class... Views>
Device* computing_device(const char* function, const View& view, const Views&... others) {
  [[maybe_unused]] const auto expect_same = [&](const Device* other) {
    LB_EXPECTS(other == view.device, function, ": found matrices on ", place_name(view.device), " and on ",
               place_name(other), ", expected one place");
  };
  (expect_same(others.device), ...);
  LB_EXPECTS(view.device == nullptr || kOnDevices<Real>, function, ": found a matrix of doubles on ",
             place_name(view.device), ", expected float");
  return view.device;
}

}  // namespace lowband
