#include "runtime/cuda/blas.h"

#include "runtime/cuda/buffer.h"
#include "runtime/cuda/check.cuh"
#include "runtime/cuda/kernels.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <map>
#include <span>
#include <type_traits>
#include <vector>

#include <cublasLt.h>

namespace lowband {
namespace {

// What NVIDIA's documentation of cublasSetWorkspace recommends for Hopper.
constexpr Index kWorkspaceBytes = 32 * 1024 * 1024;

// A symmetric product of this side or more is formed by blocks of this many rows. Two of them leave out a
// quarter of the work and still give every multiprocessor a tile of 256 x 128. By arithmetic, not measured.
constexpr Index kSymmetricRows = 2048;
constexpr Index kSymmetricFrom = 4096;

// Where the algorithm is measured: candidates, and runs of each that are timed together.
constexpr int kCandidates = 8;
constexpr int kTimedRuns = 3;

void check_blas(cublasStatus_t status, std::string_view call) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw CudaError(cat(call, ": code ", static_cast<int>(status), ", ", cublasLtGetStatusName(status), ": ",
                      cublasLtGetStatusString(status)));
}

template <class T>
constexpr cudaDataType_t kDataType = std::is_same_v<T, float>    ? CUDA_R_32F
                                     : std::is_same_v<T, double> ? CUDA_R_64F
                                                                 : CUDA_R_16BF;

// Owners of cuBLASLt's descriptions.
struct Destroy {
  void operator()(cublasLtMatmulDescOpaque_t* x) const { cublasLtMatmulDescDestroy(x); }
  void operator()(cublasLtMatrixLayoutOpaque_t* x) const { cublasLtMatrixLayoutDestroy(x); }
  void operator()(cublasLtMatmulPreferenceOpaque_t* x) const { cublasLtMatmulPreferenceDestroy(x); }
  void operator()(cublasLtContext* x) const { cublasLtDestroy(x); }
};
using Product = std::unique_ptr<cublasLtMatmulDescOpaque_t, Destroy>;
using Layout = std::unique_ptr<cublasLtMatrixLayoutOpaque_t, Destroy>;
using Preference = std::unique_ptr<cublasLtMatmulPreferenceOpaque_t, Destroy>;

struct Plan {
  Product product;
  Layout first, second, c, d;
  cublasLtMatmulAlgo_t algorithm{};
};

// Everything that an algorithm may depend on.
using Key = std::array<Index, 21>;

// The largest power of two up to 256 that divides the address.
std::uint32_t alignment_of(const void* address) {
  const auto bits = reinterpret_cast<std::uintptr_t>(address) | 256;
  return static_cast<std::uint32_t>(bits & (~bits + 1));
}

// A row-major matrix as cuBLASLt sees it: column-major and transposed.
template <class T>
Layout layout_of(DeviceMatrix<const T> a) {
  cublasLtMatrixLayout_t layout = nullptr;
  check_blas(cublasLtMatrixLayoutCreate(&layout, kDataType<T>, static_cast<std::uint64_t>(a.cols),
                                        static_cast<std::uint64_t>(a.rows), a.row_stride),
             "cublasLtMatrixLayoutCreate");
  Layout owner(layout);
  const auto count = static_cast<std::int32_t>(a.count);
  const std::int64_t stride = a.matrix_stride;
  check_blas(
      cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count),
      "cublasLtMatrixLayoutSetAttribute");
  check_blas(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride,
                                              sizeof stride),
             "cublasLtMatrixLayoutSetAttribute");
  return owner;
}

Product product_of(cublasComputeType_t compute, cudaDataType_t scale, bool scalars_there, Op op_first,
                   Op op_second) {
  cublasLtMatmulDesc_t product = nullptr;
  check_blas(cublasLtMatmulDescCreate(&product, compute, scale), "cublasLtMatmulDescCreate");
  Product owner(product);
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, Op op) {
    const cublasOperation_t value = op == Op::kNone ? CUBLAS_OP_N : CUBLAS_OP_T;
    check_blas(cublasLtMatmulDescSetAttribute(product, attribute, &value, sizeof value),
               "cublasLtMatmulDescSetAttribute");
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, op_first);
  set(CUBLASLT_MATMUL_DESC_TRANSB, op_second);
  const std::int32_t mode = scalars_there ? CUBLASLT_POINTER_MODE_DEVICE : CUBLASLT_POINTER_MODE_HOST;
  check_blas(cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_POINTER_MODE, &mode, sizeof mode),
             "cublasLtMatmulDescSetAttribute");
  return owner;
}

struct Alignments {
  std::uint32_t first, second, c, d;
};

// What the heuristic names, at most `most`, the one first that it thinks best.
std::vector<cublasLtMatmulAlgo_t> candidates(cublasLtHandle_t handle, const Alignments& alignments,
                                             bool rounds_output, const Plan& plan, int most,
                                             const std::string& what) {
  cublasLtMatmulPreference_t preference = nullptr;
  check_blas(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
  const Preference owner(preference);
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    check_blas(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value),
               "cublasLtMatmulPreferenceSetAttribute");
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<std::uint64_t>(kWorkspaceBytes));
  // An algorithm that splits the inner dimension may add up its parts in the type of the output: not in bf16.
  if (rounds_output)
    set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
        static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignments.first);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignments.second);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignments.c);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignments.d);
  std::vector<cublasLtMatmulHeuristicResult_t> results(static_cast<std::size_t>(most));
  int found = 0;
  check_blas(
      cublasLtMatmulAlgoGetHeuristic(handle, plan.product.get(), plan.first.get(), plan.second.get(),
                                     plan.c.get(), plan.d.get(), preference, most, results.data(), &found),
      cat("cublasLtMatmulAlgoGetHeuristic for ", what));
  if (found == 0) throw CudaError(cat("cuBLASLt has no algorithm for ", what));
  check_blas(results.front().state, cat("cublasLtMatmulAlgoGetHeuristic for ", what));
  std::vector<cublasLtMatmulAlgo_t> algorithms;
  for (const auto& result : std::span(results).first(static_cast<std::size_t>(found))) {
    if (result.state == CUBLAS_STATUS_SUCCESS) algorithms.push_back(result.algo);
  }
  return algorithms;
}

// The one of `algorithms` whose `run(algorithm)` is over first, each called once before it is timed. One that
// fails is left out, unless it is the first.
template <class Run>
cublasLtMatmulAlgo_t fastest(const std::vector<cublasLtMatmulAlgo_t>& algorithms, const CudaStream& stream,
                             Run run) {
  CudaEvent begin(stream), end(stream);
  cublasLtMatmulAlgo_t best = algorithms.front();
  double least_seconds = std::numeric_limits<double>::infinity();
  for (std::size_t i = 0; i < algorithms.size(); ++i) {
    const cublasStatus_t status = run(algorithms[i]);
    if (i == 0) check_blas(status, "cublasLtMatmul");
    if (status != CUBLAS_STATUS_SUCCESS) continue;
    begin.record(stream);
    for (int k = 0; k < kTimedRuns; ++k) check_blas(run(algorithms[i]), "cublasLtMatmul");
    end.record(stream);
    const double seconds = end.seconds_since(begin);
    if (seconds >= least_seconds) continue;
    least_seconds = seconds;
    best = algorithms[i];
  }
  return best;
}

template <class T>
std::string shape(DeviceMatrix<T> a) {
  return cat(a.count, " x (", a.rows, ", ", a.cols, ")");
}

}  // namespace

struct CudaBlas::Shared {
  std::unique_ptr<cublasLtContext, Destroy> handle;
  DeviceBuffer<std::uint8_t> workspace;
};
struct CudaBlas::State {
  std::map<Key, Plan> plans;
};

CudaBlas::CudaBlas(const CudaStream& stream, PlanChoice choice)
    : stream_(&stream),
      choice_(choice),
      shared_(std::make_shared<Shared>()),
      state_(std::make_unique<State>()) {
  stream.make_current();
  cublasLtHandle_t handle = nullptr;
  check_blas(cublasLtCreate(&handle), "cublasLtCreate");
  shared_->handle.reset(handle);
  shared_->workspace = DeviceBuffer<std::uint8_t>(kWorkspaceBytes, stream);
}
CudaBlas::CudaBlas(const CudaBlas& other, PlanChoice choice)
    : stream_(other.stream_), choice_(choice), shared_(other.shared_), state_(std::make_unique<State>()) {}

CudaBlas::~CudaBlas() = default;

Index CudaBlas::plans() const { return static_cast<Index>(state_->plans.size()); }

// Row-major D = op(A) op(B) is column-major D^T = op(B)^T op(A)^T: the operands change places.
template <class In, class Out, class Scale>
void CudaBlas::multiply(Op op_a, Op op_b, bool scalars_there, const Scale* alpha, DeviceMatrix<const In> a,
                        DeviceMatrix<const In> b, const Scale* beta, DeviceMatrix<const Out> c,
                        DeviceMatrix<Out> d) {
  const Index rows = op_a == Op::kNone ? a.rows : a.cols, inner = op_a == Op::kNone ? a.cols : a.rows;
  const Index inner_b = op_b == Op::kNone ? b.rows : b.cols, cols = op_b == Op::kNone ? b.cols : b.rows;
  const auto what = [&] {
    return cat("A ", shape(a), op_a == Op::kNone ? "" : "^T", ", B ", shape(b), op_b == Op::kNone ? "" : "^T",
               ", C ", shape(c), ", D ", shape(d));
  };
  const bool fits = rows == d.rows && cols == d.cols && rows == c.rows && cols == c.cols &&
                    inner == inner_b && a.count == d.count && b.count == d.count && c.count == d.count;
  LB_EXPECTS(fits && d.elements() > 0 && inner > 0, "gemm: found ", what(),
             ", expected op(A) (m, k), op(B) (k, n), C and D (m, n), none empty, equal counts");

  // cuBLASLt computes in place where C and D are described by one layout.
  const bool in_place = c.data == d.data;
  LB_EXPECTS(!in_place || (c.row_stride == d.row_stride && c.matrix_stride == d.matrix_stride),
             "gemm: found C in the place of D with strides ", c.row_stride, ", ", c.matrix_stride,
             ", expected those of D, ", d.row_stride, ", ", d.matrix_stride);

  stream_->make_current();
  const Alignments alignments{alignment_of(b.data), alignment_of(a.data), alignment_of(c.data),
                              alignment_of(d.data)};
  const Key key{kDataType<In>,
                kDataType<Out>,
                Index{scalars_there},
                static_cast<Index>(op_a),
                static_cast<Index>(op_b),
                rows,
                cols,
                inner,
                d.count,
                a.row_stride,
                b.row_stride,
                c.row_stride,
                d.row_stride,
                a.matrix_stride,
                b.matrix_stride,
                c.matrix_stride,
                d.matrix_stride,
                alignments.first,
                alignments.second,
                alignments.c,
                alignments.d};
  const auto enqueue = [&](const Plan& plan, const cublasLtMatmulAlgo_t& algorithm, Out* to) {
    return cublasLtMatmul(shared_->handle.get(), plan.product.get(), alpha, b.data, plan.first.get(), a.data,
                          plan.second.get(), beta, c.data, (in_place ? plan.d : plan.c).get(), to,
                          plan.d.get(), &algorithm, shared_->workspace.data(),
                          static_cast<std::size_t>(kWorkspaceBytes), stream_->handle());
  };
  auto kept = state_->plans.find(key);
  if (kept == state_->plans.end()) {
    Plan plan;
    plan.product = product_of(std::is_same_v<In, double> ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F,
                              kDataType<Scale>, scalars_there, op_b, op_a);
    plan.first = layout_of<In>(b);
    plan.second = layout_of<In>(a);
    plan.c = layout_of<Out>(c);
    plan.d = layout_of<Out>(d);
    const bool measured = choice_ == PlanChoice::kMeasured;
    const auto named = candidates(shared_->handle.get(), alignments, std::is_same_v<Out, BFloat16>, plan,
                                  measured ? kCandidates : 1, what());
    plan.algorithm = named.front();
    if (measured && named.size() > 1) {
      // Runs leave D alone, which may be C: into memory as aligned as D.
      const Index offset = static_cast<Index>(alignments.d % 256 / sizeof(Out));
      DeviceBuffer<Out> scratch(offset + (d.count - 1) * d.matrix_stride + d.rows * d.row_stride, *stream_);
      plan.algorithm = fastest(named, *stream_, [&](const cublasLtMatmulAlgo_t& algorithm) {
        return enqueue(plan, algorithm, scratch.data() + offset);
      });
    }
    kept = state_->plans.emplace(key, std::move(plan)).first;
  }
  check_blas(enqueue(kept->second, kept->second.algorithm, d.data), "cublasLtMatmul");
}

template <class In, class Out>
void CudaBlas::gemm(Op op_a, Op op_b, double alpha, DeviceMatrix<const In> a, DeviceMatrix<const In> b,
                    double beta, DeviceMatrix<const Out> c, DeviceMatrix<Out> d) {
  using Scale = std::conditional_t<std::is_same_v<In, double>, double, float>;
  const auto scale_alpha = static_cast<Scale>(alpha), scale_beta = static_cast<Scale>(beta);
  multiply<In, Out, Scale>(op_a, op_b, false, &scale_alpha, a, b, &scale_beta, c, d);
}

void CudaBlas::gemm(Op op_a, Op op_b, const float* scalars, DeviceMatrix<const float> a,
                    DeviceMatrix<const float> b, DeviceMatrix<const float> c, DeviceMatrix<float> d) {
  multiply<float, float, float>(op_a, op_b, true, scalars, a, b, scalars + 1, c, d);
}

template <class T>
void CudaBlas::symmetric_gemm(Op op_a, Op op_b, double alpha, DeviceMatrix<const T> a,
                              DeviceMatrix<const T> b, double beta, DeviceMatrix<const T> c,
                              DeviceMatrix<T> d) {
  LB_EXPECTS(d.count == 1 && d.rows == d.cols, "symmetric_gemm: found D ", shape(d),
             ", expected one square matrix");
  if (d.rows < kSymmetricFrom) return gemm<T, T>(op_a, op_b, alpha, a, b, beta, c, d);
  for (Index begin = 0; begin < d.rows; begin += kSymmetricRows) {
    const Index rows = std::min(kSymmetricRows, d.rows - begin), cols = begin + rows;
    const auto left = op_a == Op::kNone ? a.block(begin, rows, 0, a.cols) : a.block(0, a.rows, begin, rows);
    const auto right = op_b == Op::kNone ? b.block(0, b.rows, 0, cols) : b.block(0, cols, 0, b.cols);
    gemm<T, T>(op_a, op_b, alpha, left, right, beta, c.block(begin, rows, 0, cols),
               d.block(begin, rows, 0, cols));
  }
  mirror_lower<T>(d, *stream_);
}

#define LB_INSTANTIATE(In, Out)                                                                         \
  template void CudaBlas::gemm<In, Out>(Op, Op, double, DeviceMatrix<const In>, DeviceMatrix<const In>, \
                                        double, DeviceMatrix<const Out>, DeviceMatrix<Out>);
LB_INSTANTIATE(float, float)
LB_INSTANTIATE(double, double)
LB_INSTANTIATE(BFloat16, float)
LB_INSTANTIATE(BFloat16, BFloat16)
#undef LB_INSTANTIATE
template void CudaBlas::symmetric_gemm<float>(Op, Op, double, DeviceMatrix<const float>,
                                              DeviceMatrix<const float>, double, DeviceMatrix<const float>,
                                              DeviceMatrix<float>);
template void CudaBlas::symmetric_gemm<BFloat16>(Op, Op, double, DeviceMatrix<const BFloat16>,
                                                 DeviceMatrix<const BFloat16>, double,
                                                 DeviceMatrix<const BFloat16>, DeviceMatrix<BFloat16>);

}  // namespace lowband
