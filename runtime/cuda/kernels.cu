// Compiled without contraction (CMakeLists.txt): what is a fused multiply-add says so, and gives the host's
// bits.
#include "runtime/cuda/elements.cuh"
#include "runtime/cuda/kernels.h"

#include <algorithm>

namespace lowband {
namespace {

constexpr int kThreads = kElementThreads;
// Slabs of rows, or of elements, whose sums are formed apart.
constexpr int kSlabs = 256;

__global__ void accumulate_kernel(float alpha, const float* __restrict__ g, float beta, float* __restrict__ m,
                                  BFloat16* __restrict__ rounded, Index elements) {
#pragma unroll 4
  for (Index i = first_element(); i < elements; i += element_stride()) {
    const float sum = beta == 0 ? alpha * g[i] : beta * m[i] + alpha * g[i];
    m[i] = sum;
    if (rounded != nullptr) rounded[i] = to_bfloat16(sum);
  }
}

template <class From, class To>
__global__ void convert_kernel(float scale, const From* __restrict__ from, To* __restrict__ to,
                               Index elements) {
#pragma unroll 4
  for (Index i = first_element(); i < elements; i += element_stride())
    to[i] = narrowed<To>(scale * widened(from[i]));
}

template <class Wire>
__global__ void unpack_and_update_kernel(float decay, float eta, float scale, const Wire* __restrict__ x,
                                         float* __restrict__ w, Index elements) {
#pragma unroll 4
  for (Index i = first_element(); i < elements; i += element_stride())
    w[i] = decay * w[i] - eta * (scale * widened(x[i]));
}

template <class Gradient>
__global__ void adamw_kernel(AdamWStep<float> step, const Gradient* __restrict__ g, float* __restrict__ m,
                             float* __restrict__ v, float* __restrict__ w, Index elements) {
#pragma unroll 4
  for (Index i = first_element(); i < elements; i += element_stride()) step(widened(g[i]), m[i], v[i], w[i]);
}

template <class Step, class Gradient>
__global__ void one_moment_kernel(Step step, const Gradient* __restrict__ g, float* __restrict__ m,
                                  float* __restrict__ w, Index elements) {
#pragma unroll 4
  for (Index i = first_element(); i < elements; i += element_stride()) step(widened(g[i]), m[i], w[i]);
}

template <class T>
__global__ void find_non_finite_kernel(const T* __restrict__ x, Index elements, std::int32_t* found) {
  bool finite = true;
#pragma unroll 4
  for (Index i = first_element(); i < elements; i += element_stride())
    finite &= isfinite(widened(x[i]));  // no load waits for the one before
  if (!finite) *found = 1;              // whoever comes writes the same
}

// Tiles of 32 x 32, both sides of the copy along rows.
template <class T>
__global__ void mirror_lower_kernel(DeviceMatrix<T> square) {
  if (blockIdx.x > blockIdx.y) return;  // a tile on or below the diagonal, and where it goes
  __shared__ T tile[kWarp][kWarp + 1];
  T* const a = square.data + Index{blockIdx.z} * square.matrix_stride;
  const Index row = Index{blockIdx.y} * kWarp, col = Index{blockIdx.x} * kWarp;
  for (int y = static_cast<int>(threadIdx.y); y < kWarp; y += static_cast<int>(blockDim.y)) {
    const Index i = row + y, j = col + threadIdx.x;
    if (i < square.rows && j < square.cols) tile[y][threadIdx.x] = a[i * square.row_stride + j];
  }
  __syncthreads();
  for (int y = static_cast<int>(threadIdx.y); y < kWarp; y += static_cast<int>(blockDim.y)) {
    const Index i = col + y, j = row + threadIdx.x;
    if (i < square.rows && j < square.cols && j > i) a[i * square.row_stride + j] = tile[threadIdx.x][y];
  }
}

template <class T>
__global__ void divide_by_norm_kernel(const float* __restrict__ u, const double* sum_of_squares,
                                      double safety, double epsilon, T* __restrict__ x, Index elements) {
  const double factor = 1 / (safety * sqrt(*sum_of_squares) + epsilon);
#pragma unroll 4
  for (Index i = first_element(); i < elements; i += element_stride())
    x[i] = narrowed<T>(static_cast<float>(factor * static_cast<double>(u[i])));
}

__global__ void normalise_columns_kernel(DeviceMatrix<const float> r, const double* sums, float epsilon,
                                         DeviceMatrix<float> q) {
  const Index elements = r.rows * r.cols;
  for (Index e = first_element(); e < elements; e += element_stride()) {
    const Index i = e / r.cols, j = e % r.cols;
    q.data[i * q.row_stride + j] =
        r.data[i * r.row_stride + j] / (static_cast<float>(sqrt(sums[j])) + epsilon);
  }
}

// Always kSlabs blocks, so that the order follows from the number of elements alone.
template <class T>
__global__ void partial_squares_kernel(const T* __restrict__ x, Index elements, double* partial) {
  double sum = 0;
#pragma unroll 4
  for (Index i = first_element(); i < elements; i += element_stride()) {
    const double value = static_cast<double>(widened(x[i]));
    sum = fma(value, value, sum);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void add_partial_kernel(const double* partial, double* sum) {
  static_assert(kSlabs == kThreads, "a thread for each slab");
  const double total = block_sum(partial[threadIdx.x]);
  if (threadIdx.x == 0) *sum = total;
}

// Blocks of 32 columns x 8 rows: block (c, s) forms the sums of slab s for columns [32 c, 32 c + 32).
__global__ void partial_column_squares_kernel(DeviceMatrix<const float> a, double* partial) {
  __shared__ double of_row[8][kWarp];
  const Index j = Index{blockIdx.x} * kWarp + threadIdx.x;
  double sum = 0;
  if (j < a.cols) {
    for (Index i = Index{blockIdx.y} * blockDim.y + threadIdx.y; i < a.rows;
         i += Index{gridDim.y} * blockDim.y) {
      const double value = static_cast<double>(a.data[i * a.row_stride + j]);
      sum = fma(value, value, sum);
    }
  }
  of_row[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || j >= a.cols) return;
  for (int y = 1; y < 8; ++y) sum += of_row[y][threadIdx.x];
  partial[Index{blockIdx.y} * a.cols + j] = sum;
}

__global__ void add_partial_columns_kernel(const double* partial, Index cols, int slabs, double* sums) {
  const Index j = first_element();
  if (j >= cols) return;
  double sum = 0;
  for (int s = 0; s < slabs; ++s) sum += partial[s * cols + j];
  sums[j] = sum;
}

template <class Wire>
__global__ void pack_kernel(const WireSegment* table, Wire* __restrict__ wire) {
  const WireSegment segment = table[blockIdx.y];
#pragma unroll 4
  for (Index i = first_element(); i < segment.elements; i += element_stride())
    wire[segment.offset + i] = narrowed<Wire>(segment.data[i]);
}

template <class Wire>
__global__ void unpack_kernel(const WireSegment* table, float scale, const Wire* __restrict__ wire) {
  const WireSegment segment = table[blockIdx.y];
#pragma unroll 4
  for (Index i = first_element(); i < segment.elements; i += element_stride())
    segment.data[i] = scale * widened(wire[segment.offset + i]);
}

}  // namespace

void accumulate(float alpha, const float* g, float beta, float* m, BFloat16* rounded, Index elements,
                const CudaStream& stream) {
  if (elements == 0) return;
  launch("accumulate", stream, {blocks_for(elements), kThreads}, accumulate_kernel, alpha, g, beta, m,
         rounded, elements);
}

template <class From, class To>
void convert(float scale, const From* from, To* to, Index elements, const CudaStream& stream) {
  if (elements == 0) return;
  launch("convert", stream, {blocks_for(elements), kThreads}, convert_kernel<From, To>, scale, from, to,
         elements);
}

template <class Wire>
void unpack_and_update(float decay, float eta, float scale, const Wire* x, float* w, Index elements,
                       const CudaStream& stream) {
  if (elements == 0) return;
  launch("unpack_and_update", stream, {blocks_for(elements), kThreads}, unpack_and_update_kernel<Wire>, decay,
         eta, scale, x, w, elements);
}

template <class Gradient>
void update(const AdamWStep<float>& step, const Gradient* g, float* m, float* v, float* w, Index elements,
            const CudaStream& stream) {
  if (elements == 0) return;
  launch("adamw", stream, {blocks_for(elements), kThreads}, adamw_kernel<Gradient>, step, g, m, v, w,
         elements);
}

template <class Gradient>
void update(const LionStep<float>& step, const Gradient* g, float* m, float* w, Index elements,
            const CudaStream& stream) {
  if (elements == 0) return;
  launch("lion", stream, {blocks_for(elements), kThreads}, one_moment_kernel<LionStep<float>, Gradient>, step,
         g, m, w, elements);
}

template <class Gradient>
void update(const SgdStep<float>& step, const Gradient* g, float* v, float* w, Index elements,
            const CudaStream& stream) {
  if (elements == 0) return;
  launch("sgd", stream, {blocks_for(elements), kThreads}, one_moment_kernel<SgdStep<float>, Gradient>, step,
         g, v, w, elements);
}

template <class T>
void find_non_finite(const T* x, Index elements, std::int32_t* found, const CudaStream& stream) {
  if (elements == 0) return;
  launch("find_non_finite", stream, {blocks_for(elements), kThreads}, find_non_finite_kernel<T>, x, elements,
         found);
}

template <class T>
void mirror_lower(DeviceMatrix<T> square, const CudaStream& stream) {
  LB_EXPECTS(square.rows == square.cols, "mirror_lower: found (", square.rows, ", ", square.cols,
             "), expected a square matrix");
  if (square.elements() == 0) return;
  const auto tiles = static_cast<unsigned>((square.rows + kWarp - 1) / kWarp);
  launch("mirror_lower", stream, {dim3(tiles, tiles, static_cast<unsigned>(square.count)), dim3(kWarp, 8)},
         mirror_lower_kernel<T>, square);
}

template <class T>
void divide_by_norm(const float* u, const double* sum_of_squares, double safety, double epsilon, T* x,
                    Index elements, const CudaStream& stream) {
  if (elements == 0) return;
  launch("divide_by_norm", stream, {blocks_for(elements), kThreads}, divide_by_norm_kernel<T>, u,
         sum_of_squares, safety, epsilon, x, elements);
}

void normalise_columns(DeviceMatrix<const float> r, const double* sums_of_squares, float epsilon,
                       DeviceMatrix<float> q, const CudaStream& stream) {
  LB_EXPECTS(r.count == 1 && q.count == 1 && r.rows == q.rows && r.cols == q.cols,
             "normalise_columns: found R (", r.rows, ", ", r.cols, "), Q (", q.rows, ", ", q.cols,
             "), expected equal shapes of one matrix");
  if (r.elements() == 0) return;
  launch("normalise_columns", stream, {blocks_for(r.elements()), kThreads}, normalise_columns_kernel, r,
         sums_of_squares, epsilon, q);
}

DeviceSums::DeviceSums(Index most_columns, const CudaStream& stream)
    : stream_(&stream), partial_(kSlabs * std::max<Index>(1, most_columns), stream) {}

template <class T>
void DeviceSums::sum_of_squares(const T* x, Index elements, double* sum) {
  launch("sum_of_squares", *stream_, {kSlabs, kThreads}, partial_squares_kernel<T>, x, elements,
         partial_.data());
  launch("sum_of_squares, second pass", *stream_, {1, kThreads}, add_partial_kernel, partial_.data(), sum);
}

void DeviceSums::column_sums_of_squares(DeviceMatrix<const float> a, double* sums) {
  LB_EXPECTS(a.count == 1 && a.cols * kSlabs <= partial_.size(), "column_sums_of_squares: found ", a.count,
             " matrices of ", a.cols, " columns, expected one of at most ", partial_.size() / kSlabs);
  if (a.cols == 0) return;
  const int slabs = static_cast<int>(std::clamp<Index>(a.rows / 32, 1, kSlabs));
  const dim3 blocks(static_cast<unsigned>((a.cols + kWarp - 1) / kWarp), static_cast<unsigned>(slabs));
  launch("column_sums_of_squares", *stream_, {blocks, dim3(kWarp, 8)}, partial_column_squares_kernel, a,
         partial_.data());
  const auto column_blocks = static_cast<unsigned>((a.cols + kThreads - 1) / kThreads);
  launch("column_sums_of_squares, second pass", *stream_, {column_blocks, kThreads},
         add_partial_columns_kernel, partial_.data(), a.cols, slabs, sums);
}

WireSegments::WireSegments(const std::vector<WireSegment>& segments, const CudaStream& stream)
    : stream_(&stream), table_(static_cast<Index>(segments.size()), stream) {
  LB_EXPECTS(segments.size() <= 65'535, "WireSegments: found ", segments.size(),
             " segments, expected at most 65535, a launch's blocks in its second direction");
  table_.fill_from(segments);
  for (const WireSegment& segment : segments) largest_ = std::max(largest_, segment.elements);
}

template <class Wire>
void WireSegments::pack(Wire* wire) const {
  if (largest_ == 0) return;
  const dim3 blocks(blocks_for(largest_), static_cast<unsigned>(table_.size()));
  launch("pack", *stream_, {blocks, kThreads}, pack_kernel<Wire>, table_.data(), wire);
}

template <class Wire>
void WireSegments::unpack(float scale, const Wire* wire) const {
  if (largest_ == 0) return;
  const dim3 blocks(blocks_for(largest_), static_cast<unsigned>(table_.size()));
  launch("unpack", *stream_, {blocks, kThreads}, unpack_kernel<Wire>, table_.data(), scale, wire);
}

#define LB_INSTANTIATE(T)                                                                              \
  template void unpack_and_update<T>(float, float, float, const T*, float*, Index, const CudaStream&); \
  template void update<T>(const AdamWStep<float>&, const T*, float*, float*, float*, Index,            \
                          const CudaStream&);                                                          \
  template void update<T>(const LionStep<float>&, const T*, float*, float*, Index, const CudaStream&); \
  template void update<T>(const SgdStep<float>&, const T*, float*, float*, Index, const CudaStream&);  \
  template void find_non_finite<T>(const T*, Index, std::int32_t*, const CudaStream&);                 \
  template void mirror_lower<T>(DeviceMatrix<T>, const CudaStream&);                                   \
  template void divide_by_norm<T>(const float*, const double*, double, double, T*, Index,              \
                                  const CudaStream&);                                                  \
  template void DeviceSums::sum_of_squares<T>(const T*, Index, double*);                               \
  template void WireSegments::pack<T>(T*) const;                                                       \
  template void WireSegments::unpack<T>(float, const T*) const;
LB_INSTANTIATE(float)
LB_INSTANTIATE(BFloat16)
#undef LB_INSTANTIATE
template void convert<float, float>(float, const float*, float*, Index, const CudaStream&);
template void convert<float, BFloat16>(float, const float*, BFloat16*, Index, const CudaStream&);
template void convert<BFloat16, float>(float, const BFloat16*, float*, Index, const CudaStream&);

}  // namespace lowband
