#include "runtime/cuda/stream_device.h"

#include "runtime/cuda/buffer.h"
#include "runtime/cuda/kernels.h"
#include "runtime/cuda/orthonormalise.h"
#include "runtime/cuda/passes.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

namespace lowband {
namespace {

template <class T>
DeviceMatrix<T> on_device(MatrixView<T> view) {
  return {view.data, view.rows, view.cols, view.row_stride, 1, view.rows * view.row_stride};
}

class StreamDevice : public Device {
 public:
  explicit StreamDevice(CudaBlas& blas)
      : blas_(blas), stream_(blas.stream()), partial_(kSumSlabs, blas.stream()), handover_(blas.stream()) {}

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
    if (rows == 1) return cuda_copy(to, from, width, stream_);
    cuda_copy_rows(to, to_stride, from, from_stride, width, rows, stream_);
  }
  void synchronize() override {
    const std::lock_guard turn(mutex_);
    stream_.synchronize();
  }
  void follow(void* stream) override { order(static_cast<CUstream_st*>(stream), stream_.handle()); }
  void precede(void* stream) override { order(stream_.handle(), static_cast<CUstream_st*>(stream)); }

  void fill(float value, MatrixView<float> x) override {
    const std::lock_guard turn(mutex_);
    lowband::fill(value, on_device(x), stream_);
  }
  void add(float alpha, MatrixView<const float> x, float beta, MatrixView<float> y) override {
    const std::lock_guard turn(mutex_);
    lowband::add(alpha, on_device(x), beta, on_device(y), stream_);
  }
  void scale_rows(std::span<const float> factors, MatrixView<float> x) override {
    scale_by(factors, true, x);
  }
  void scale_columns(std::span<const float> factors, MatrixView<float> x) override {
    scale_by(factors, false, x);
  }
  void round(MatrixView<const float> x, MatrixView<BFloat16> y) override {
    const std::lock_guard turn(mutex_);
    convert<float, BFloat16>(on_device(x), on_device(y), stream_);
  }
  void widen(MatrixView<const BFloat16> x, MatrixView<float> y) override {
    const std::lock_guard turn(mutex_);
    convert<BFloat16, float>(on_device(x), on_device(y), stream_);
  }
  void update(const AdamWStep<float>& step, MatrixView<const float> g, MatrixView<float> m,
              MatrixView<float> v, MatrixView<float> w) override {
    const std::lock_guard turn(mutex_);
    lowband::update(step, on_device(g), on_device(m), on_device(v), on_device(w), stream_);
  }
  void update(const AdamDirection<float>& step, MatrixView<const float> g, MatrixView<float> m1,
              MatrixView<float> m2, MatrixView<float> n) override {
    const std::lock_guard turn(mutex_);
    lowband::update(step, on_device(g), on_device(m1), on_device(m2), on_device(n), stream_);
  }
  void update(const LionStep<float>& step, MatrixView<const float> g, MatrixView<float> m,
              MatrixView<float> w) override {
    const std::lock_guard turn(mutex_);
    lowband::update(step, on_device(g), on_device(m), on_device(w), stream_);
  }
  void update(const SgdStep<float>& step, MatrixView<const float> g, MatrixView<float> v,
              MatrixView<float> w) override {
    const std::lock_guard turn(mutex_);
    lowband::update(step, on_device(g), on_device(v), on_device(w), stream_);
  }

  void take_slices(bool of_rows, std::span<const Index> places, MatrixView<const float> x,
                   MatrixView<float> u) override {
    const std::lock_guard turn(mutex_);
    const DeviceBuffer<Index> there = copied(places);
    lowband::take_slices(of_rows, there.data(), on_device(x), on_device(u), stream_);
  }
  void add_to_slices(float alpha, MatrixView<const float> u, bool of_rows, std::span<const Index> places,
                     MatrixView<float> x) override {
    const std::lock_guard turn(mutex_);
    const DeviceBuffer<Index> there = copied(places);
    lowband::add_to_slices(alpha, on_device(u), of_rows, there.data(), on_device(x), stream_);
  }

  double inner_product(MatrixView<const float> x, MatrixView<const float> y) override {
    const std::lock_guard turn(mutex_);
    DeviceBuffer<double> found(1, stream_);
    lowband::inner_product(on_device(x), on_device(y), partial_.data(), found.data(), stream_);
    double sum = 0;
    found.copy_to({&sum, 1});
    return sum;
  }
  void sums_of_magnitudes(bool of_rows, MatrixView<const float> x, std::span<double> sums) override {
    const std::lock_guard turn(mutex_);
    DeviceBuffer<double> found(std::ssize(sums), stream_);
    lowband::sums_of_magnitudes(of_rows, on_device(x), found.data(), stream_);
    found.copy_to(sums);
  }
  void sums_of_squares(std::span<const MatrixView<const float>> matrices, bool usable,
                       std::span<double> sums) override {
    const std::lock_guard turn(mutex_);
    DeviceBuffer<double> found(std::ssize(matrices), stream_);
    for (std::size_t k = 0; k < matrices.size(); ++k)
      sum_of_squares(on_device(matrices[k]), usable, partial_.data(), found.data() + k, stream_);
    found.copy_to(sums);
  }
  void sums_of_squares_of_rows(MatrixView<const float> x, std::span<double> sums) override {
    const std::lock_guard turn(mutex_);
    DeviceBuffer<double> found(x.rows, stream_);
    lowband::sums_of_squares_of_rows(on_device(x), found.data(), stream_);
    found.copy_to(sums);
  }
  void sums_of_squares_of_columns(std::span<const MatrixView<const float>> matrices,
                                  std::span<double> sums) override {
    const std::lock_guard turn(mutex_);
    Index widest = 1;
    for (const MatrixView<const float>& matrix : matrices) widest = std::max(widest, matrix.cols);
    DeviceSums columns(widest, stream_);
    DeviceBuffer<double> found(std::ssize(sums), stream_);
    double* of_matrix = found.data();
    for (const MatrixView<const float>& matrix : matrices) {
      columns.column_sums_of_squares(on_device(matrix), of_matrix);
      of_matrix += matrix.cols;
    }
    found.copy_to(sums);
  }

  void gemm(Op op_a, Op op_b, float alpha, MatrixView<const float> a, MatrixView<const float> b, float beta,
            MatrixView<float> c, bool symmetric) override {
    const std::lock_guard turn(mutex_);
    const DeviceMatrix<float> d = on_device(c);
    if (symmetric) {
      blas_.symmetric_gemm<float>(op_a, op_b, static_cast<double>(alpha), on_device(a), on_device(b),
                                  static_cast<double>(beta), d, d);
    } else {
      blas_.gemm<float, float>(op_a, op_b, static_cast<double>(alpha), on_device(a), on_device(b),
                               static_cast<double>(beta), d, d);
    }
  }
  void gram(MatrixView<const float> p, MatrixView<double> g) override {
    const std::lock_guard turn(mutex_);
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
    const DeviceBuffer<double> wide = widened(p);
    DeviceBuffer<double> factor(t.elements(), stream_), product(p.elements(), stream_);
    factor.fill_from(t.flat());
    const DeviceMatrix<double> d = product.matrix(0, p.rows, p.cols);
    blas_.gemm<double, double>(Op::kNone, Op::kNone, 1, wide.matrix(0, p.rows, p.cols),
                               std::as_const(factor).matrix(0, t.rows, t.cols), 0, d, d);
    narrow(d, on_device(p), stream_);
  }

  std::vector<Orthonormalised> orthonormalise(std::span<const MatrixView<float>> matrices,
                                              double dead_tolerance) override {
    const std::lock_guard turn(mutex_);
    // Equal shapes together: side by side in one buffer, through all kernels at once.
    std::map<std::pair<Index, Index>, std::vector<std::size_t>> of_shape;
    for (std::size_t i = 0; i < matrices.size(); ++i)
      of_shape[{matrices[i].rows, matrices[i].cols}].push_back(i);
    std::vector<Orthonormalised> outcomes(matrices.size());
    for (const auto& [shape, members] : of_shape)
      orthonormalise_equal(matrices, members, dead_tolerance, outcomes);
    return outcomes;
  }

 private:
  /// Matrices of one shape that are orthonormalised together.
  struct Batch {
    Batch(Index count, Index rows, Index cols, double dead_tolerance, CudaBlas& blas)
        : elements(count * rows * cols, blas.stream()),
          orthonormaliser(count, rows, cols, dead_tolerance, blas) {}
    DeviceBuffer<float> elements;
    DeviceOrthonormaliser orthonormaliser;
  };

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
    lowband::scale_by(there.data(), by_row, on_device(x), stream_);
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
                            std::vector<Orthonormalised>& outcomes) {
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

    std::vector<std::uint8_t> dead(static_cast<std::size_t>(count * cols));
    std::vector<std::int32_t> factorisation(members.size());
    batch.orthonormaliser.dead().copy_to(dead);
    batch.orthonormaliser.factorisation().copy_to(factorisation);
    for (std::size_t k = 0; k < members.size(); ++k) {
      const auto begin = dead.begin() + static_cast<Index>(k) * cols;
      outcomes[members[k]] = {static_cast<Factorisation>(factorisation[k]), {begin, begin + cols}};
    }
  }

  std::mutex mutex_;
  CudaBlas& blas_;
  const CudaStream& stream_;
  DeviceBuffer<double> partial_;
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
