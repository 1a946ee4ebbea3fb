// Compiled without contraction (CMakeLists.txt): what is a fused multiply-add says so, and gives the host's
// bits.
#include "runtime/cuda/elements.cuh"
#include "runtime/cuda/passes.h"

#include <algorithm>
#include <cfloat>

namespace lowband {
namespace {

constexpr int kThreads = kElementThreads;

// Blocks go along rows first and over the rows second, so that no thread divides by the number of columns.
template <class Body>
__global__ void elements_kernel(Index rows, Index cols, Guard guard, Body body) {
  if (guard.closed()) return;
  if constexpr (requires { body.prepare(); }) body.prepare();
  for (Index i = blockIdx.y; i < rows; i += gridDim.y) {
#pragma unroll 4
    for (Index j = first_element(); j < cols; j += element_stride()) body(i, j);
  }
}

// body(i, j) for all elements of equal matrices; as one row where all of them are contiguous.
template <class Body>
void for_each_element(const char* name, Index rows, Index cols, bool one_row, const GuardedStream& to,
                      Body body) {
  if (rows * cols == 0) return;
  if (one_row) {
    cols *= rows;
    rows = 1;
  }
  constexpr Index kMostBlocks = 16'384, kMostRows = 65'535;
  const Index across = std::min<Index>(blocks_for(cols), kMostBlocks);
  const Index down = std::clamp<Index>(kMostBlocks / across, 1, std::min(rows, kMostRows));
  const dim3 blocks(static_cast<unsigned>(across), static_cast<unsigned>(down));
  launch(name, to.stream, {blocks, kThreads}, elements_kernel<Body>, rows, cols, to.guard, body);
}

template <class T>
struct Elements {
  T* data;
  Index row_stride;
  __device__ T& operator()(Index i, Index j) const { return data[i * row_stride + j]; }
};
template <class T>
Elements<T> elements(DeviceMatrix<T> x) {
  return {x.data, x.row_stride};
}

struct Fill {
  float value;
  Elements<float> x;
  __device__ void operator()(Index i, Index j) const { x(i, j) = value; }
};

// What a body takes from the device: `prepare` is called before its first element.
struct Add {
  float alpha, beta;
  Elements<const float> x;
  Elements<float> y;
  DeviceScalar alpha_there = {};
  __device__ void prepare() {
    if (alpha_there.number != nullptr) alpha = alpha_there.value();
  }
  __device__ void operator()(Index i, Index j) const {
    float& sum = y(i, j);
    if (beta == 0) {
      sum = alpha * x(i, j);
    } else if (beta == 1) {
      sum = fmaf(alpha, x(i, j), sum);
    } else {
      sum = fmaf(beta, sum, alpha * x(i, j));
    }
  }
};

template <class T>
struct Copy {
  Elements<const T> from;
  Elements<T> to;
  __device__ void operator()(Index i, Index j) const { to(i, j) = from(i, j); }
};

struct DivideByNorm {
  const double* square;
  double safety, epsilon;
  Elements<float> x;
  float factor = 0;
  __device__ void prepare() { factor = static_cast<float>(1 / (safety * sqrt(*square) + epsilon)); }
  __device__ void operator()(Index i, Index j) const { x(i, j) = factor * x(i, j); }
};

struct DivideColumns {
  const double* norms;
  float epsilon;
  Elements<float> x;
  __device__ void operator()(Index i, Index j) const {
    x(i, j) *= 1.0F / (static_cast<float>(norms[j]) + epsilon);
  }
};

struct ScaleBy {
  const float* factors;
  bool by_row;
  Elements<float> x;
  __device__ void operator()(Index i, Index j) const { x(i, j) *= factors[by_row ? i : j]; }
};

template <class From, class To>
struct Convert {
  Elements<const From> from;
  Elements<To> to;
  __device__ void operator()(Index i, Index j) const {
    if constexpr (std::is_same_v<To, double> || std::is_same_v<From, double>) {
      to(i, j) = static_cast<To>(from(i, j));
    } else {
      to(i, j) = narrowed<To>(widened(from(i, j)));
    }
  }
};

template <class Step>
struct TwoMoments {
  Step step;
  Elements<const float> g;
  Elements<float> m, v, w;
  const Step* step_there = nullptr;
  __device__ void prepare() {
    if (step_there != nullptr) step = *step_there;
  }
  __device__ void operator()(Index i, Index j) const { step(g(i, j), m(i, j), v(i, j), w(i, j)); }
};

template <class Step>
struct OneMoment {
  Step step;
  Elements<const float> g;
  Elements<float> m, w;
  DeviceScalar scale_there = {};
  __device__ void prepare() {
    if (scale_there.number != nullptr) step.gradient_scale = scale_there.value();
  }
  __device__ void operator()(Index i, Index j) const { step(g(i, j), m(i, j), w(i, j)); }
};

struct TakeSlices {
  bool of_rows;
  const Index* places;
  Elements<const float> x;
  Elements<float> u;
  __device__ void operator()(Index i, Index j) const {
    u(i, j) = x(of_rows ? places[i] : i, of_rows ? j : places[j]);
  }
};

struct AddToSlices {
  float alpha;
  Elements<const float> u;
  bool of_rows;
  const Index* places;
  Elements<float> x;
  __device__ void operator()(Index i, Index j) const {
    float& element = x(of_rows ? places[i] : i, of_rows ? j : places[j]);
    element = fmaf(alpha, u(i, j), element);
  }
};

__device__ double square(float x) {
  const auto wide = static_cast<double>(x);
  return wide * wide;
}

__global__ void row_squares_kernel(DeviceMatrix<const float> x, double* sums) {
  for (Index i = blockIdx.x; i < x.rows; i += gridDim.x) {
    double sum = 0;
    for (Index j = threadIdx.x; j < x.cols; j += blockDim.x) sum += square(x.data[i * x.row_stride + j]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[i] = sum;
  }
}

__global__ void row_magnitudes_kernel(DeviceMatrix<const float> x, double* sums) {
  for (Index i = blockIdx.x; i < x.rows; i += gridDim.x) {
    double sum = 0;
    for (Index j = threadIdx.x; j < x.cols; j += blockDim.x)
      sum += static_cast<double>(fabsf(x.data[i * x.row_stride + j]));
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[i] = sum;
  }
}

// A block for 32 columns, whose 8 rows of threads take every eighth row of X.
__global__ void column_magnitudes_kernel(DeviceMatrix<const float> x, double* sums) {
  __shared__ double of_row[8][kWarp];
  const Index j = Index{blockIdx.x} * kWarp + threadIdx.x;
  double sum = 0;
  if (j < x.cols) {
#pragma unroll 4
    for (Index i = threadIdx.y; i < x.rows; i += 8)
      sum += static_cast<double>(fabsf(x.data[i * x.row_stride + j]));
  }
  of_row[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || j >= x.cols) return;
  for (int y = 1; y < 8; ++y) sum += of_row[y][threadIdx.x];
  sums[j] = sum;
}

// Block s takes rows s, s + kSumSlabs, ... or, of one row, that slab of its elements.
__global__ void inner_product_kernel(DeviceMatrix<const float> x, DeviceMatrix<const float> y,
                                     double* partial) {
  const bool one_row = x.rows == 1;
  double sum = 0;
  for (Index i = one_row ? 0 : blockIdx.x; i < x.rows; i += gridDim.x) {
    const float* const a = x.data + i * x.row_stride;
    const float* const b = y.data + i * y.row_stride;
    const Index begin = one_row ? first_element() : threadIdx.x;
    const Index stride = one_row ? element_stride() : blockDim.x;
#pragma unroll 4
    for (Index j = begin; j < x.cols; j += stride)
      sum += static_cast<double>(a[j]) * static_cast<double>(b[j]);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// Block s takes rows s, s + kSumSlabs, ... or, of one row, that slab of its elements.
__global__ void squares_kernel(DeviceMatrix<const float> x, float largest, double* partial) {
  const bool one_row = x.rows == 1;
  double sum = 0;
  bool usable = true;
  for (Index i = one_row ? 0 : blockIdx.x; i < x.rows; i += gridDim.x) {
    const float* const row = x.data + i * x.row_stride;
    const Index begin = one_row ? first_element() : threadIdx.x;
    const Index stride = one_row ? element_stride() : blockDim.x;
#pragma unroll 4
    for (Index j = begin; j < x.cols; j += stride) {
      sum += square(row[j]);
      usable = usable && fabsf(row[j]) <= largest;
    }
  }
  if (!usable) sum = nan("");
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void add_slabs_kernel(const double* partial, double* sum) {
  static_assert(kSumSlabs == kThreads, "a thread for each slab");
  const double total = block_sum(partial[threadIdx.x]);
  if (threadIdx.x == 0) *sum = total;
}

__global__ void adamw_step_kernel(Guard guard, AdamWRule<float> rule, DeviceScalar gradient_scale, float* t,
                                  AdamWStep<float>* step) {
  if (guard.closed()) return;
  *t += 1;
  *step = rule.step(static_cast<double>(*t), gradient_scale.value());
}

// A block for each column. The numbers are drawn twice: the norm needs all of them, and they are rare.
__global__ void redraw_columns_kernel(Guard guard, const float* redrawn, RandomStream stream,
                                      Index column_rows, Index first_row, DeviceMatrix<float> x) {
  if (guard.closed()) return;
  for (Index j = blockIdx.x; j < x.cols; j += gridDim.x) {
    if (redrawn[j] == 0) continue;
    double sum = 0;
    for (Index i = threadIdx.x; i < column_rows; i += blockDim.x) {
      const double number = stream.normal(i * x.cols + j);
      sum += number * number;
    }
    const double norm = sqrt(block_sum(sum));
    for (Index i = threadIdx.x; i < x.rows; i += blockDim.x)
      x.data[i * x.row_stride + j] = static_cast<float>(stream.normal((first_row + i) * x.cols + j) / norm);
  }
}

__global__ void scalars_of_product_kernel(Guard guard, float alpha, float beta, float* two) {
  two[0] = guard.closed() ? 0.0F : alpha;
  two[1] = guard.closed() ? 1.0F : beta;
}

}  // namespace

void fill(float value, DeviceMatrix<float> x, const GuardedStream& stream) {
  for_each_element("fill", x.rows, x.cols, x.contiguous(), stream, Fill{value, elements(x)});
}

void add(float alpha, DeviceMatrix<const float> x, float beta, DeviceMatrix<float> y,
         const GuardedStream& stream) {
  for_each_element("add", y.rows, y.cols, x.contiguous() && y.contiguous(), stream,
                   Add{alpha, beta, elements(x), elements(y)});
}

void add(const DeviceScalar& alpha, DeviceMatrix<const float> x, float beta, DeviceMatrix<float> y,
         const GuardedStream& stream) {
  for_each_element("add", y.rows, y.cols, x.contiguous() && y.contiguous(), stream,
                   Add{0, beta, elements(x), elements(y), alpha});
}

template <class T>
void copy(DeviceMatrix<const T> from, DeviceMatrix<T> to, const GuardedStream& stream) {
  for_each_element("copy", to.rows, to.cols, from.contiguous() && to.contiguous(), stream,
                   Copy<T>{elements(from), elements(to)});
}

void scale_by(const float* factors, bool by_row, DeviceMatrix<float> x, const GuardedStream& stream) {
  for_each_element("scale_by", x.rows, x.cols, false, stream, ScaleBy{factors, by_row, elements(x)});
}

template <class From, class To>
void convert(DeviceMatrix<const From> from, DeviceMatrix<To> to, const GuardedStream& stream) {
  for_each_element("convert", to.rows, to.cols, from.contiguous() && to.contiguous(), stream,
                   Convert<From, To>{elements(from), elements(to)});
}

void widen(DeviceMatrix<const float> from, DeviceMatrix<double> to, const GuardedStream& stream) {
  convert<float, double>(from, to, stream);
}
void narrow(DeviceMatrix<const double> from, DeviceMatrix<float> to, const GuardedStream& stream) {
  convert<double, float>(from, to, stream);
}

void update(const AdamWStep<float>& step, DeviceMatrix<const float> g, DeviceMatrix<float> m,
            DeviceMatrix<float> v, DeviceMatrix<float> w, const GuardedStream& stream) {
  const bool one_row = g.contiguous() && m.contiguous() && v.contiguous() && w.contiguous();
  for_each_element("adamw", w.rows, w.cols, one_row, stream,
                   TwoMoments<AdamWStep<float>>{step, elements(g), elements(m), elements(v), elements(w)});
}

void update(const AdamDirection<float>& step, DeviceMatrix<const float> g, DeviceMatrix<float> m1,
            DeviceMatrix<float> m2, DeviceMatrix<float> n, const GuardedStream& stream) {
  const bool one_row = g.contiguous() && m1.contiguous() && m2.contiguous() && n.contiguous();
  for_each_element(
      "adam_direction", n.rows, n.cols, one_row, stream,
      TwoMoments<AdamDirection<float>>{step, elements(g), elements(m1), elements(m2), elements(n)});
}

void update(const AdamWRule<float>& rule, const DeviceScalar& gradient_scale, float* t,
            AdamWStep<float>* step, DeviceMatrix<const float> g, DeviceMatrix<float> m, DeviceMatrix<float> v,
            DeviceMatrix<float> w, const GuardedStream& stream) {
  launch("adamw, its numbers", stream.stream, {1, 1}, adamw_step_kernel, stream.guard, rule, gradient_scale,
         t, step);
  const bool one_row = g.contiguous() && m.contiguous() && v.contiguous() && w.contiguous();
  for_each_element(
      "adamw", w.rows, w.cols, one_row, stream,
      TwoMoments<AdamWStep<float>>{{}, elements(g), elements(m), elements(v), elements(w), step});
}

void update(const LionStep<float>& step, const DeviceScalar& gradient_scale, DeviceMatrix<const float> g,
            DeviceMatrix<float> m, DeviceMatrix<float> w, const GuardedStream& stream) {
  for_each_element("lion", w.rows, w.cols, g.contiguous() && m.contiguous() && w.contiguous(), stream,
                   OneMoment<LionStep<float>>{step, elements(g), elements(m), elements(w), gradient_scale});
}

void update(const SgdStep<float>& step, const DeviceScalar& gradient_scale, DeviceMatrix<const float> g,
            DeviceMatrix<float> v, DeviceMatrix<float> w, const GuardedStream& stream) {
  for_each_element("sgd", w.rows, w.cols, g.contiguous() && v.contiguous() && w.contiguous(), stream,
                   OneMoment<SgdStep<float>>{step, elements(g), elements(v), elements(w), gradient_scale});
}

void divide_by_norm(const double* square, double safety, double epsilon, DeviceMatrix<float> x,
                    const GuardedStream& stream) {
  for_each_element("divide_by_norm", x.rows, x.cols, x.contiguous(), stream,
                   DivideByNorm{square, safety, epsilon, elements(x)});
}

void divide_columns(const double* norms, float epsilon, DeviceMatrix<float> x, const GuardedStream& stream) {
  for_each_element("divide_columns", x.rows, x.cols, false, stream,
                   DivideColumns{norms, epsilon, elements(x)});
}

void redraw_columns(const float* redrawn, const RandomStream& random, Index column_rows, Index first_row,
                    DeviceMatrix<float> x, const GuardedStream& stream) {
  if (x.cols == 0) return;
  const auto blocks = static_cast<unsigned>(std::min<Index>(x.cols, 65'535));
  launch("redraw_columns", stream.stream, {blocks, kThreads}, redraw_columns_kernel, stream.guard, redrawn,
         random, column_rows, first_row, x);
}

void scalars_of_product(float alpha, float beta, float* two, const GuardedStream& stream) {
  launch("scalars_of_product", stream.stream, {1, 1}, scalars_of_product_kernel, stream.guard, alpha, beta,
         two);
}

void sums_of_squares_of_rows(DeviceMatrix<const float> x, double* sums, const CudaStream& stream) {
  if (x.rows == 0) return;
  const auto blocks = static_cast<unsigned>(std::min<Index>(x.rows, 65'535));
  launch("sums_of_squares_of_rows", stream, {blocks, kThreads}, row_squares_kernel, x, sums);
}

void sum_of_squares(DeviceMatrix<const float> x, bool usable, double* partial, double* sum,
                    const CudaStream& stream) {
  if (x.contiguous()) x = {x.data, 1, x.rows * x.cols};
  // An infinite limit is exceeded by NaN alone, which makes the sum NaN by itself.
  const float largest = usable ? sqrtf(FLT_MAX) : INFINITY;
  launch("sum_of_squares", stream, {kSumSlabs, kThreads}, squares_kernel, x, largest, partial);
  launch("sum_of_squares, second pass", stream, {1, kThreads}, add_slabs_kernel, partial, sum);
}

void take_slices(bool of_rows, const Index* places, DeviceMatrix<const float> x, DeviceMatrix<float> u,
                 const GuardedStream& stream) {
  for_each_element("take_slices", u.rows, u.cols, false, stream,
                   TakeSlices{of_rows, places, elements(x), elements(u)});
}

void add_to_slices(float alpha, DeviceMatrix<const float> u, bool of_rows, const Index* places,
                   DeviceMatrix<float> x, const GuardedStream& stream) {
  for_each_element("add_to_slices", u.rows, u.cols, false, stream,
                   AddToSlices{alpha, elements(u), of_rows, places, elements(x)});
}

void sums_of_magnitudes(bool of_rows, DeviceMatrix<const float> x, double* sums, const CudaStream& stream) {
  if ((of_rows ? x.rows : x.cols) == 0) return;
  if (of_rows) {
    const auto blocks = static_cast<unsigned>(std::min<Index>(x.rows, 65'535));
    launch("sums_of_magnitudes of rows", stream, {blocks, kThreads}, row_magnitudes_kernel, x, sums);
  } else {
    const auto blocks = static_cast<unsigned>((x.cols + kWarp - 1) / kWarp);
    launch("sums_of_magnitudes of columns", stream, {blocks, dim3(kWarp, 8)}, column_magnitudes_kernel, x,
           sums);
  }
}

void inner_product(DeviceMatrix<const float> x, DeviceMatrix<const float> y, double* partial, double* sum,
                   const CudaStream& stream) {
  if (x.contiguous() && y.contiguous()) {
    x = {x.data, 1, x.rows * x.cols};
    y = {y.data, 1, y.rows * y.cols};
  }
  launch("inner_product", stream, {kSumSlabs, kThreads}, inner_product_kernel, x, y, partial);
  launch("inner_product, second pass", stream, {1, kThreads}, add_slabs_kernel, partial, sum);
}

template void copy<std::uint8_t>(DeviceMatrix<const std::uint8_t>, DeviceMatrix<std::uint8_t>,
                                 const GuardedStream&);
template void copy<float>(DeviceMatrix<const float>, DeviceMatrix<float>, const GuardedStream&);
template void convert<float, BFloat16>(DeviceMatrix<const float>, DeviceMatrix<BFloat16>,
                                       const GuardedStream&);
template void convert<BFloat16, float>(DeviceMatrix<const BFloat16>, DeviceMatrix<float>,
                                       const GuardedStream&);

}  // namespace lowband
