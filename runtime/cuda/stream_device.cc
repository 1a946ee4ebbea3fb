#include "runtime/cuda/stream_device.h"

#include "runtime/cuda/buffer.h"
#include "runtime/cuda/kernels.h"
#include "runtime/cuda/numbers.h"
#include "runtime/cuda/orthonormalise.h"
#include "runtime/cuda/passes.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <thread>
#include <tuple>
#include <utility>

namespace lowband {
namespace {

template <class T>
DeviceMatrix<T> on_device(MatrixView<T> view) {
  return {view.data, view.rows, view.cols, view.row_stride, 1, view.rows * view.row_stride};
}

DeviceScalar on_device(const Scalar& scalar) { return {scalar.number.data, scalar.divisor}; }

/// Pinned memory and the moment from which on it holds what was sent.
struct Landing {
  explicit Landing(Index bytes, const CudaStream& stream) : memory(bytes), landed(stream) {}
  PinnedBuffer<std::byte> memory;
  CudaEvent landed;
};

/// Landings that are free: to pin memory takes CUDA long, and may make it wait.
class Landings {
 public:
  std::unique_ptr<Landing> take(Index bytes, const CudaStream& stream) {
    const std::lock_guard lock(mutex_);
    const auto fits = [&](const auto& landing) { return landing->memory.size() >= bytes; };
    const auto found = std::ranges::find_if(free_, fits);
    if (found == free_.end()) return std::make_unique<Landing>(bytes, stream);
    std::unique_ptr<Landing> landing = std::move(*found);
    free_.erase(found);
    return landing;
  }
  void give_back(std::unique_ptr<Landing> landing) {
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(landing));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Landing>> free_;
};

class LandingArrival final : public Device::Arrival {
 public:
  LandingArrival(Landings& owner, std::unique_ptr<Landing> landing)
      : owner_(owner), landing_(std::move(landing)) {}
  ~LandingArrival() override { owner_.give_back(std::move(landing_)); }
  bool over() const override { return landing_->landed.over(); }
  const void* wait() override {
    landing_->landed.synchronize();
    return landing_->memory.data();
  }

 private:
  Landings& owner_;
  std::unique_ptr<Landing> landing_;
};

class StreamDevice : public Device {
 public:
  explicit StreamDevice(CudaBlas& blas)
      : blas_(blas),
        stream_(blas.stream()),
        partial_(kSumSlabs, blas.stream()),
        scalars_(2, blas.stream()),
        adamw_step_(1, blas.stream()),
        handover_(blas.stream()) {}

  CudaBlas& blas() const { return blas_; }
  std::string name() const override { return cat("cuda:", stream_.device()); }

  void* allocate(Index bytes) override {
    const std::lock_guard turn(mutex_);
    void* const memory = cuda_allocate(bytes, stream_);
    cuda_zero(memory, bytes, stream_);
    return memory;
  }
  void release(void* memory) noexcept override {
    const std::lock_guard turn(mutex_);
    cuda_free(memory, stream_);
  }
  bool holds(const void* memory) const override { return cuda_device_of(memory) == stream_.device(); }
  void copy(const void* from, Index from_stride, void* to, Index to_stride, Index width,
            Index rows) override {
    const std::lock_guard turn(mutex_);
    const GuardedStream stream = guarded();
    if (stream.guard.flag != nullptr)
      return copy_guarded(from, from_stride, to, to_stride, width, rows, stream);
    if (rows == 1) return cuda_copy(to, from, width, stream_);
    cuda_copy_rows(to, to_stride, from, from_stride, width, rows, stream_);
  }
  void synchronize() override {
    const std::lock_guard turn(mutex_);
    stream_.synchronize();
  }
  void follow(void* stream) override { order(static_cast<CUstream_st*>(stream), stream_.handle()); }
  void precede(void* stream) override { order(stream_.handle(), static_cast<CUstream_st*>(stream)); }

  std::unique_ptr<Arrival> send_to_host(const void* from, Index bytes) override {
    const std::lock_guard turn(mutex_);
    expect_unguarded("send_to_host");
    std::unique_ptr<Landing> landing = landings_.take(bytes, stream_);
    cuda_copy(landing->memory.data(), from, bytes, stream_);
    landing->landed.record(stream_);
    return std::make_unique<LandingArrival>(landings_, std::move(landing));
  }

  void begin_where(const std::uint8_t* flag, bool value) override {
    const std::lock_guard turn(mutex_);
    expect_unguarded("begin_where");
    guards_[std::this_thread::get_id()] = {flag, value};
  }
  void end_where() noexcept override {
    const std::lock_guard turn(mutex_);
    guards_.erase(std::this_thread::get_id());
  }

  void zero(void* memory, Index bytes) override {
    const std::lock_guard turn(mutex_);
    expect_unguarded("zero");
    cuda_zero(memory, bytes, stream_);
  }
  void fill(float value, MatrixView<float> x) override {
    const std::lock_guard turn(mutex_);
    lowband::fill(value, on_device(x), guarded());
  }
  void add(float alpha, MatrixView<const float> x, float beta, MatrixView<float> y) override {
    const std::lock_guard turn(mutex_);
    lowband::add(alpha, on_device(x), beta, on_device(y), guarded());
  }
  void add(const Scalar& alpha, MatrixView<const float> x, float beta, MatrixView<float> y) override {
    const std::lock_guard turn(mutex_);
    lowband::add(on_device(alpha), on_device(x), beta, on_device(y), guarded());
  }
  void scale_rows(std::span<const float> factors, MatrixView<float> x) override {
    scale_by(factors, true, x);
  }
  void scale_columns(std::span<const float> factors, MatrixView<float> x) override {
    scale_by(factors, false, x);
  }
  void round(MatrixView<const float> x, MatrixView<BFloat16> y) override {
    const std::lock_guard turn(mutex_);
    convert<float, BFloat16>(on_device(x), on_device(y), guarded());
  }
  void widen(MatrixView<const BFloat16> x, MatrixView<float> y) override {
    const std::lock_guard turn(mutex_);
    convert<BFloat16, float>(on_device(x), on_device(y), guarded());
  }
  void update(const AdamWStep<float>& step, MatrixView<const float> g, MatrixView<float> m,
              MatrixView<float> v, MatrixView<float> w) override {
    const std::lock_guard turn(mutex_);
    lowband::update(step, on_device(g), on_device(m), on_device(v), on_device(w), guarded());
  }
  void update(const AdamWRule<float>& rule, const Scalar& gradient_scale, MatrixView<float> t,
              MatrixView<const float> g, MatrixView<float> m, MatrixView<float> v,
              MatrixView<float> w) override {
    const std::lock_guard turn(mutex_);
    lowband::update(rule, on_device(gradient_scale), t.data, adamw_step_.data(), on_device(g), on_device(m),
                    on_device(v), on_device(w), guarded());
  }
  void update(const AdamDirection<float>& step, MatrixView<const float> g, MatrixView<float> m1,
              MatrixView<float> m2, MatrixView<float> n) override {
    const std::lock_guard turn(mutex_);
    lowband::update(step, on_device(g), on_device(m1), on_device(m2), on_device(n), guarded());
  }
  void update(const LionStep<float>& step, const Scalar& gradient_scale, MatrixView<const float> g,
              MatrixView<float> m, MatrixView<float> w) override {
    const std::lock_guard turn(mutex_);
    lowband::update(step, on_device(gradient_scale), on_device(g), on_device(m), on_device(w), guarded());
  }
  void update(const SgdStep<float>& step, const Scalar& gradient_scale, MatrixView<const float> g,
              MatrixView<float> v, MatrixView<float> w) override {
    const std::lock_guard turn(mutex_);
    lowband::update(step, on_device(gradient_scale), on_device(g), on_device(v), on_device(w), guarded());
  }

  void take_slices(bool of_rows, std::span<const Index> places, MatrixView<const float> x,
                   MatrixView<float> u) override {
    const std::lock_guard turn(mutex_);
    const DeviceBuffer<Index> there = copied(places);
    lowband::take_slices(of_rows, there.data(), on_device(x), on_device(u), guarded());
  }
  void add_to_slices(float alpha, MatrixView<const float> u, bool of_rows, std::span<const Index> places,
                     MatrixView<float> x) override {
    const std::lock_guard turn(mutex_);
    const DeviceBuffer<Index> there = copied(places);
    lowband::add_to_slices(alpha, on_device(u), of_rows, there.data(), on_device(x), guarded());
  }

  void inner_product(MatrixView<const float> x, MatrixView<const float> y, double* sum) override {
    const std::lock_guard turn(mutex_);
    expect_unguarded("inner_product");
    lowband::inner_product(on_device(x), on_device(y), partial_.data(), sum, stream_);
  }
  void sums_of_magnitudes(bool of_rows, MatrixView<const float> x, double* sums) override {
    const std::lock_guard turn(mutex_);
    expect_unguarded("sums_of_magnitudes");
    lowband::sums_of_magnitudes(of_rows, on_device(x), sums, stream_);
  }
  void sums_of_squares(std::span<const MatrixView<const float>> matrices, bool usable,
                       double* sums) override {
    const std::lock_guard turn(mutex_);
    expect_unguarded("sums_of_squares");
    for (std::size_t k = 0; k < matrices.size(); ++k)
      sum_of_squares(on_device(matrices[k]), usable, partial_.data(), sums + k, stream_);
  }
  void sums_of_squares_of_rows(MatrixView<const float> x, double* sums) override {
    const std::lock_guard turn(mutex_);
    expect_unguarded("sums_of_squares_of_rows");
    lowband::sums_of_squares_of_rows(on_device(x), sums, stream_);
  }
  void sums_of_squares_of_columns(std::span<const MatrixView<const float>> matrices, double* sums) override {
    const std::lock_guard turn(mutex_);
    expect_unguarded("sums_of_squares_of_columns");
    Index widest = 1;
    for (const MatrixView<const float>& matrix : matrices) widest = std::max(widest, matrix.cols);
    DeviceSums columns(widest, stream_);
    for (const MatrixView<const float>& matrix : matrices) {
      columns.column_sums_of_squares(on_device(matrix), sums);
      sums += matrix.cols;
    }
  }

  void find_nan(MatrixView<const double> x, std::uint8_t* flags) override {
    const std::lock_guard turn(mutex_);
    expect_unguarded("find_nan");
    lowband::find_nan(x.data, x.elements(), flags, stream_);
  }
  void find_equal(float value, const float* x, const std::uint8_t* flag, std::uint8_t* found) override {
    const std::lock_guard turn(mutex_);
    expect_unguarded("find_equal");
    lowband::find_equal(value, x, flag, found, stream_);
  }
  void add_unflagged(MatrixView<const Index> places, const double* x, const std::uint8_t* flags,
                     double divisor, double* sum) override {
    const std::lock_guard turn(mutex_);
    expect_unguarded("add_unflagged");
    lowband::add_unflagged(places.data, places.elements(), x, flags, divisor, sum, stream_);
  }
  void add_squares(MatrixView<const double> x, double* sum) override {
    const std::lock_guard turn(mutex_);
    expect_unguarded("add_squares");
    lowband::add_squares(x.data, x.elements(), sum, stream_);
  }
  void square_roots(MatrixView<double> x) override {
    const std::lock_guard turn(mutex_);
    expect_unguarded("square_roots");
    lowband::square_roots(x.data, x.elements(), stream_);
  }
  void clip(double limit, const double* squares, double last_divisor, double* norm_and_scale) override {
    const std::lock_guard turn(mutex_);
    expect_unguarded("clip");
    lowband::clip(limit, squares, last_divisor, norm_and_scale, stream_);
  }
  void divide_by_norm(const double* square, double safety, double epsilon, MatrixView<float> x) override {
    const std::lock_guard turn(mutex_);
    lowband::divide_by_norm(square, safety, epsilon, on_device(x), guarded());
  }
  void divide_columns(const double* norms, float epsilon, MatrixView<float> x) override {
    const std::lock_guard turn(mutex_);
    lowband::divide_columns(norms, epsilon, on_device(x), guarded());
  }
  void add_to_sketch(std::uint64_t parameter, MatrixView<const float> piece, Index row, Index col,
                     MatrixView<double> buckets) override {
    const std::lock_guard turn(mutex_);
    const Index count = buckets.elements();
    if (sketch_partial_.size() < kSketchSlabs * count)
      sketch_partial_ = DeviceBuffer<double>(kSketchSlabs * count, stream_);
    lowband::add_to_sketch(parameter, on_device(piece), row, col, count, sketch_partial_.data(), buckets.data,
                           guarded());
  }
  void redraw_columns(const float* redrawn, const RandomStream& random, Index column_rows, Index first_row,
                      MatrixView<float> x) override {
    const std::lock_guard turn(mutex_);
    lowband::redraw_columns(redrawn, random, column_rows, first_row, on_device(x), guarded());
  }

  void gemm(Op op_a, Op op_b, float alpha, MatrixView<const float> a, MatrixView<const float> b, float beta,
            MatrixView<float> c, bool symmetric) override {
    const std::lock_guard turn(mutex_);
    const DeviceMatrix<float> d = on_device(c);
    const GuardedStream stream = guarded();
    if (stream.guard.flag != nullptr) {
      scalars_of_product(alpha, beta, scalars_.data(), stream);
      blas_.gemm(op_a, op_b, scalars_.data(), on_device(a), on_device(b), d, d);
    } else if (symmetric) {
      blas_.symmetric_gemm<float>(op_a, op_b, static_cast<double>(alpha), on_device(a), on_device(b),
                                  static_cast<double>(beta), d, d);
    } else {
      blas_.gemm<float, float>(op_a, op_b, static_cast<double>(alpha), on_device(a), on_device(b),
                               static_cast<double>(beta), d, d);
    }
  }
  void gram(MatrixView<const float> p, MatrixView<double> g) override {
    const std::lock_guard turn(mutex_);
    expect_unguarded("gram");
    DeviceBuffer<double> sums(p.cols * p.cols, stream_);
    if (p.elements() > 0) {
      const DeviceBuffer<double> wide = widened(p);
      const DeviceMatrix<const double> w = wide.matrix(0, p.rows, p.cols);
      const DeviceMatrix<double> s = sums.matrix(0, p.cols, p.cols);
      blas_.gemm<double, double>(Op::kTranspose, Op::kNone, 1, w, w, 0, s, s);
    }
    constexpr auto kBytes = static_cast<Index>(sizeof(double));
    if (p.cols > 0)
      cuda_copy_rows(g.data, g.row_stride * kBytes, sums.data(), p.cols * kBytes, p.cols * kBytes, p.cols,
                     stream_);
    stream_.synchronize();
  }
  void multiply_right(MatrixView<float> p, MatrixView<const double> t) override {
    const std::lock_guard turn(mutex_);
    expect_unguarded("multiply_right");
    const DeviceBuffer<double> wide = widened(p);
    DeviceBuffer<double> factor(t.elements(), stream_), product(p.elements(), stream_);
    factor.fill_from(t.flat());
    const DeviceMatrix<double> d = product.matrix(0, p.rows, p.cols);
    blas_.gemm<double, double>(Op::kNone, Op::kNone, 1, wide.matrix(0, p.rows, p.cols),
                               std::as_const(factor).matrix(0, t.rows, t.cols), 0, d, d);
    narrow(d, on_device(p), stream_);
  }

  void orthonormalise(std::span<const MatrixView<float>> matrices, double dead_tolerance,
                      std::span<float* const> outcomes) override {
    const std::lock_guard turn(mutex_);
    expect_unguarded("orthonormalise");
    // Equal shapes together: side by side in one buffer, through all kernels at once.
    std::map<std::pair<Index, Index>, std::vector<std::size_t>> of_shape;
    for (std::size_t i = 0; i < matrices.size(); ++i)
      of_shape[{matrices[i].rows, matrices[i].cols}].push_back(i);
    for (const auto& [shape, members] : of_shape)
      orthonormalise_equal(matrices, members, dead_tolerance, outcomes);
  }

 private:
  /// Matrices of one shape that are orthonormalised together.
  struct Batch {
    Batch(Index count, Index rows, Index cols, double dead_tolerance, CudaBlas& blas)
        : elements(count * rows * cols, blas.stream()),
          outcomes(count * (1 + cols), blas.stream()),
          orthonormaliser(count, rows, cols, dead_tolerance, blas) {}
    DeviceBuffer<float> elements, outcomes;
    DeviceOrthonormaliser orthonormaliser;
  };

  // For work of the calling thread.
  GuardedStream guarded() const {
    const auto found = guards_.find(std::this_thread::get_id());
    return {stream_, found == guards_.end() ? Guard{} : found->second};
  }
  void expect_unguarded(std::string_view call) const {
    LB_EXPECTS(guarded().guard.flag == nullptr, call, ": found a call on ", name(),
               " for work under a condition, expected it outside of one");
  }

  // A kernel, since CUDA's copies know no condition; by words where everything is whole words.
  static void copy_guarded(const void* from, Index from_stride, void* to, Index to_stride, Index width,
                           Index rows, const GuardedStream& stream) {
    LB_EXPECTS(cuda_device_of(from) == stream.stream.device() && cuda_device_of(to) == stream.stream.device(),
               "copy: found memory of the host for work under a condition, expected the device's");
    const auto rows_of = [&]<class T>(T* data, Index stride) {
      constexpr auto kBytes = static_cast<Index>(sizeof(T));
      return DeviceMatrix<T>(data, rows, width / kBytes, (rows == 1 ? width : stride) / kBytes, 1, 0);
    };
    const auto copy_as = [&]<class T>(T /*element*/) {
      lowband::copy<T>(rows_of(static_cast<const T*>(from), from_stride),
                       rows_of(static_cast<T*>(to), to_stride), stream);
    };
    const bool words = (width | (rows == 1 ? 0 : from_stride | to_stride)) % Index{sizeof(float)} == 0;
    words ? copy_as(float{}) : copy_as(std::uint8_t{});
  }

  // What comes to `later` from now on begins when all of `earlier` so far is over.
  void order(CUstream_st* earlier, CUstream_st* later) {
    const std::lock_guard turn(mutex_);
    stream_.make_current();
    handover_.record(earlier);
    handover_.hold(later);
  }

  void scale_by(std::span<const float> factors, bool by_row, MatrixView<float> x) {
    const std::lock_guard turn(mutex_);
    const DeviceBuffer<float> there = copied(factors);
    lowband::scale_by(there.data(), by_row, on_device(x), guarded());
  }

  template <class T>
  DeviceBuffer<T> copied(std::span<const T> host) {
    DeviceBuffer<T> there(std::ssize(host), stream_);
    there.fill_from(host);
    return there;
  }

  DeviceBuffer<double> widened(MatrixView<const float> p) {
    DeviceBuffer<double> wide(p.elements(), stream_);
    lowband::widen(on_device(p), wide.matrix(0, p.rows, p.cols), stream_);
    return wide;
  }

  void orthonormalise_equal(std::span<const MatrixView<float>> matrices,
                            const std::vector<std::size_t>& members, double dead_tolerance,
                            std::span<float* const> outcomes) {
    const auto count = std::ssize(members);
    const Index rows = matrices[members.front()].rows, cols = matrices[members.front()].cols;
    const auto key = std::tuple(count, rows, cols, dead_tolerance);
    auto kept = batches_.find(key);
    if (kept == batches_.end()) {
      auto made = std::make_unique<Batch>(count, rows, cols, dead_tolerance, blas_);
      kept = batches_.emplace(key, std::move(made)).first;
    }
    Batch& batch = *kept->second;
    const Index bytes = rows * cols * static_cast<Index>(sizeof(float));
    const auto place = [&](std::size_t k) {
      return batch.elements.data() + static_cast<Index>(k) * rows * cols;
    };
    for (std::size_t k = 0; k < members.size(); ++k)
      cuda_copy(place(k), matrices[members[k]].data, bytes, stream_);
    batch.orthonormaliser.run(batch.elements.matrix(0, rows, cols, count));
    for (std::size_t k = 0; k < members.size(); ++k)
      cuda_copy(matrices[members[k]].data, place(k), bytes, stream_);

    batch.orthonormaliser.write_outcomes(batch.outcomes.data());
    for (std::size_t k = 0; k < members.size(); ++k)
      cuda_copy(outcomes[members[k]], batch.outcomes.data() + static_cast<Index>(k) * (1 + cols),
                (1 + cols) * static_cast<Index>(sizeof(float)), stream_);
  }

  std::mutex mutex_;
  CudaBlas& blas_;
  const CudaStream& stream_;
  DeviceBuffer<double> partial_, sketch_partial_;
  DeviceBuffer<float> scalars_;  // of a product under a condition
  DeviceBuffer<AdamWStep<float>> adamw_step_;
  std::map<std::thread::id, Guard> guards_;
  Landings landings_;
  CudaEvent handover_;
  std::map<std::tuple<Index, Index, Index, double>, std::unique_ptr<Batch>> batches_;
};

// What a StreamDevice borrows, made before it and destroyed after it.
struct OwnStream {
  explicit OwnStream(int index) : stream(index), blas(stream) {}
  CudaStream stream;
  CudaBlas blas;
};
struct OwnStreamDevice final : OwnStream, StreamDevice {
  explicit OwnStreamDevice(int index) : OwnStream(index), StreamDevice(OwnStream::blas) {}
};

}  // namespace

std::unique_ptr<Device> device_on(CudaBlas& blas) { return std::make_unique<StreamDevice>(blas); }
CudaBlas& blas_of(Device* device) {
  const auto* const of_stream = dynamic_cast<const StreamDevice*>(device);
  LB_EXPECTS(of_stream != nullptr, "device: found ", place_name(device), ", expected a CUDA device");
  return of_stream->blas();
}
std::unique_ptr<Device> open_device(int index) { return std::make_unique<OwnStreamDevice>(index); }

}  // namespace lowband
