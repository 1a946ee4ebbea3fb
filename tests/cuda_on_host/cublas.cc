// The calls of cublasLt.h.
#include "runtime/bfloat16.h"
#include "runtime/buffer.h"
#include "runtime/linalg.h"
#include "tests/cuda_on_host/algorithms.h"
#include "tests/cuda_on_host/block.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include <cublasLt.h>

struct cublasLtContext {};
struct cublasLtMatmulPreferenceOpaque_t {
  std::uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_MASK;
};
struct cublasLtMatmulDescOpaque_t {
  cublasComputeType_t compute;
  cublasOperation_t op_a = CUBLAS_OP_N, op_b = CUBLAS_OP_N;
  std::int32_t pointer_mode = CUBLASLT_POINTER_MODE_HOST;
};
struct cublasLtMatrixLayoutOpaque_t {
  cudaDataType_t type;
  lowband::Index rows, cols, stride;  // column-major
  std::int32_t count = 1;
  std::int64_t matrix_stride = 0;
};

namespace lowband {
namespace {

constexpr int kAlgorithms = 3;
thread_local int used_algorithm = 0, fast_algorithm = 0;
thread_local std::chrono::microseconds delay{0};

using Layout = cublasLtMatrixLayoutOpaque_t;

// A column-major matrix is the transpose of a row-major one. Number b of `layout`, converted to Real.
template <class Real, class Stored>
Buffer<Real> transpose_of(const Layout& layout, const void* data, std::int32_t b) {
  const auto* const begin = static_cast<const Stored*>(data) + b * layout.matrix_stride;
  Buffer<Real> copy(layout.rows * layout.cols);
  for (Index j = 0; j < layout.cols; ++j) {
    for (Index i = 0; i < layout.rows; ++i) {
      if constexpr (std::is_same_v<Stored, BFloat16>) {
        copy[j * layout.rows + i] = to_float(begin[j * layout.stride + i]);
      } else {
        copy[j * layout.rows + i] = begin[j * layout.stride + i];
      }
    }
  }
  return copy;
}

// D <- alpha op(A) op(B) + beta C, all column-major: D^T <- alpha op(B)^T op(A)^T + beta C^T.
template <class In, class Out, class Real>
void multiply(const cublasLtMatmulDescOpaque_t& product, bool rounds_partial_sums, Real alpha, const void* a,
              const Layout& a_layout, const void* b, const Layout& b_layout, Real beta, const void* c,
              const Layout& c_layout, void* d, const Layout& d_layout) {
  const auto op_of = [](cublasOperation_t op) { return op == CUBLAS_OP_N ? Op::kNone : Op::kTranspose; };
  for (std::int32_t matrix = 0; matrix < d_layout.count; ++matrix) {
    Buffer<Real> left = transpose_of<Real, In>(b_layout, b, matrix);
    Buffer<Real> right = transpose_of<Real, In>(a_layout, a, matrix);
    Buffer<Real> result = beta == 0 ? Buffer<Real>(d_layout.rows * d_layout.cols)
                                    : transpose_of<Real, Out>(c_layout, c, matrix);
    const MatrixView<const Real> x = left.matrix(0, b_layout.cols, b_layout.rows);
    const MatrixView<const Real> y = right.matrix(0, a_layout.cols, a_layout.rows);
    const Op op_x = op_of(product.op_b), op_y = op_of(product.op_a);
    const Index inner = op_x == Op::kNone ? x.cols : x.rows;
    const Index part = rounds_partial_sums && inner > 1 ? (inner + 1) / 2 : inner;
    for (Index begin = 0; begin < inner; begin += part) {
      const Index own = std::min(part, inner - begin);
      gemm<Real>(op_x, op_y, alpha,
                 op_x == Op::kNone ? x.block(0, x.rows, begin, own) : x.block(begin, own, 0, x.cols),
                 op_y == Op::kNone ? y.block(begin, own, 0, y.cols) : y.block(0, y.rows, begin, own),
                 begin == 0 ? beta : Real{1}, result.matrix(0, d_layout.cols, d_layout.rows));
      if constexpr (std::is_same_v<Out, BFloat16>) {
        for (Index e = 0; e < result.size(); ++e) result[e] = to_float(to_bfloat16(result[e]));
      }
    }
    auto* const to = static_cast<Out*>(d) + matrix * d_layout.matrix_stride;
    for (Index j = 0; j < d_layout.cols; ++j) {
      for (Index i = 0; i < d_layout.rows; ++i) {
        if constexpr (std::is_same_v<Out, BFloat16>) {
          to[j * d_layout.stride + i] = to_bfloat16(result[j * d_layout.rows + i]);
        } else {
          to[j * d_layout.stride + i] = result[j * d_layout.rows + i];
        }
      }
    }
  }
}

}  // namespace

namespace cuda_on_host {

void slow_down_algorithms_but(int algorithm, std::chrono::microseconds delay_of_others) {
  fast_algorithm = algorithm;
  delay = delay_of_others;
}
int algorithm_of_last_product() { return used_algorithm; }

}  // namespace cuda_on_host
}  // namespace lowband

using lowband::delay;
using lowband::fast_algorithm;
using lowband::kAlgorithms;
using lowband::used_algorithm;

const char* cublasLtGetStatusName(cublasStatus_t status) {
  return status == CUBLAS_STATUS_SUCCESS ? "CUBLAS_STATUS_SUCCESS" : "CUBLAS_STATUS_INVALID_VALUE";
}
const char* cublasLtGetStatusString(cublasStatus_t status) {
  return status == CUBLAS_STATUS_SUCCESS ? "success" : "an invalid value";
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  *handle = new cublasLtContext;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  delete handle;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* product, cublasComputeType_t compute,
                                        cudaDataType_t /*scale*/) {
  *product = new cublasLtMatmulDescOpaque_t{.compute = compute};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t product,
                                              cublasLtMatmulDescAttributes_t attribute, const void* value,
                                              std::size_t bytes) {
  if (attribute == CUBLASLT_MATMUL_DESC_POINTER_MODE) {
    if (bytes != sizeof product->pointer_mode) return CUBLAS_STATUS_INVALID_VALUE;
    std::memcpy(&product->pointer_mode, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
  }
  cublasOperation_t& op = attribute == CUBLASLT_MATMUL_DESC_TRANSA ? product->op_a : product->op_b;
  if (bytes != sizeof op) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(&op, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t product) {
  delete product;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType_t type,
                                          std::uint64_t rows, std::uint64_t cols, std::int64_t stride) {
  *layout = new cublasLtMatrixLayoutOpaque_t{.type = type,
                                             .rows = static_cast<lowband::Index>(rows),
                                             .cols = static_cast<lowband::Index>(cols),
                                             .stride = stride};
  return stride >= (*layout)->rows ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute, const void* value,
                                                std::size_t bytes) {
  const bool is_count = attribute == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT;
  if (bytes != (is_count ? sizeof layout->count : sizeof layout->matrix_stride))
    return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(is_count ? static_cast<void*>(&layout->count) : &layout->matrix_stride, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  delete layout;
  return CUBLAS_STATUS_SUCCESS;
}

// There are a few algorithms, which are all the same, and which no preference changes.
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  *preference = new cublasLtMatmulPreferenceOpaque_t;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* value, std::size_t bytes) {
  if (attribute == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK && bytes == sizeof preference->reductions)
    std::memcpy(&preference->reductions, value, bytes);
  const bool is_workspace = attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
  return bytes == (is_workspace ? sizeof(std::uint64_t) : sizeof(std::uint32_t))
             ? CUBLAS_STATUS_SUCCESS
             : CUBLAS_STATUS_INVALID_VALUE;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  delete preference;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t /*handle*/, cublasLtMatmulDesc_t product,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int most,
                                              cublasLtMatmulHeuristicResult_t* results, int* found) {
  const bool plain_a = product->op_a == CUBLAS_OP_N, plain_b = product->op_b == CUBLAS_OP_N;
  const bool fits = (plain_a ? a->rows : a->cols) == d->rows && (plain_b ? b->cols : b->rows) == d->cols &&
                    (plain_a ? a->cols : a->rows) == (plain_b ? b->rows : b->cols) && c->rows == d->rows &&
                    c->cols == d->cols && a->count == d->count && b->count == d->count &&
                    c->count == d->count && a->type == b->type && c->type == d->type;
  constexpr std::uint32_t kOfOutput =
      CUBLASLT_REDUCTION_SCHEME_INPLACE | CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE;
  *found = std::min(most, kAlgorithms);
  for (int i = 0; i < *found; ++i)
    results[i] = {.algo = {.data = {static_cast<std::uint64_t>(i), preference->reductions & kOfOutput}},
                  .state = fits ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE};
  return results->state;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t /*handle*/, cublasLtMatmulDesc_t product, const void* alpha,
                              const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                              cublasLtMatrixLayout_t b_layout, const void* beta, const void* c,
                              cublasLtMatrixLayout_t c_layout, void* d, cublasLtMatrixLayout_t d_layout,
                              const cublasLtMatmulAlgo_t* algorithm, void* /*workspace*/,
                              std::size_t /*workspace_bytes*/, cudaStream_t stream) {
  // In place means one matrix, described once.
  if (c == d && c_layout != d_layout) return CUBLAS_STATUS_INVALID_VALUE;
  used_algorithm = static_cast<int>(algorithm->data[0]);
  if (used_algorithm != fast_algorithm) std::this_thread::sleep_for(delay);
  // What the pointers to host memory say now is kept, should the product be recorded.
  const auto multiply = [&]<class In, class Out, class Real>() {
    const bool there = product->pointer_mode == CUBLASLT_POINTER_MODE_DEVICE;
    const Real alpha_here = there ? Real{0} : *static_cast<const Real*>(alpha);
    const Real beta_here = there ? Real{0} : *static_cast<const Real*>(beta);
    const auto work = [=, product = *product, rounds = algorithm->data[1] != 0, a_layout = *a_layout,
                       b_layout = *b_layout, c_layout = *c_layout, d_layout = *d_layout] {
      const lowband::cuda_on_host::DeviceAccess access;
      lowband::multiply<In, Out, Real>(
          product, rounds, there ? *static_cast<const Real*>(alpha) : alpha_here, a, a_layout, b, b_layout,
          there ? *static_cast<const Real*>(beta) : beta_here, c, c_layout, d, d_layout);
      return cudaSuccess;
    };
    lowband::cuda_on_host::enqueue(stream, work);
    return CUBLAS_STATUS_SUCCESS;
  };
  using lowband::BFloat16;
  const cudaDataType_t in = a_layout->type, out = d_layout->type;
  if (product->compute == CUBLAS_COMPUTE_64F && in == CUDA_R_64F && out == CUDA_R_64F)
    return multiply.operator()<double, double, double>();
  if (product->compute != CUBLAS_COMPUTE_32F) return CUBLAS_STATUS_INVALID_VALUE;
  if (in == CUDA_R_32F && out == CUDA_R_32F) return multiply.operator()<float, float, float>();
  if (in == CUDA_R_16BF && out == CUDA_R_32F) return multiply.operator()<BFloat16, float, float>();
  if (in == CUDA_R_16BF && out == CUDA_R_16BF) return multiply.operator()<BFloat16, BFloat16, float>();
  return CUBLAS_STATUS_INVALID_VALUE;
}
