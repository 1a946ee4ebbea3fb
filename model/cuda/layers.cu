#include "model/cuda/layers.h"
#include "runtime/cuda/elements.cuh"
#include "runtime/elementwise_math.h"

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <numeric>
#include <type_traits>

namespace lowband {
namespace {

constexpr int kThreads = kElementThreads;
constexpr int kWarps = kThreads / kWarp;
// Rows per partial sum of a gain's gradient, as on the host.
constexpr Index kRowBlock = 64;

unsigned blocks_of(Index things, Index per_block) {
  return static_cast<unsigned>((things + per_block - 1) / per_block);
}

// Kernels for rows have a warp for each, eight to a block.
__device__ Index own_row() { return Index{blockIdx.x} * kWarps + threadIdx.x / kWarp; }
__device__ Index first_col() { return threadIdx.x % kWarp; }

template <class T>
__global__ void rms_norm_kernel(DeviceMatrix<const float> x, const float* gain, float epsilon, T* y,
                                float* s) {
  const Index t = own_row(), cols = x.cols;
  if (t >= x.rows) return;
  const float* const row = x.data + t * cols;
  float squares = 0;
  for (Index j = first_col(); j < cols; j += kWarp) squares = fmaf(row[j], row[j], squares);
  const float scale = 1 / sqrtf(warp_sum(squares) / static_cast<float>(cols) + epsilon);
  if (first_col() == 0) s[t] = scale;
  for (Index j = first_col(); j < cols; j += kWarp) y[t * cols + j] = narrowed<T>(gain[j] * row[j] * scale);
}

// d_x <- d_x + s (gain d_y - x s^2 mean(gain d_y x))
template <class T>
__global__ void rms_norm_input_kernel(DeviceMatrix<const float> x, const float* gain, const float* s,
                                      const float* d_y, float* d_x, T* rounded) {
  const Index t = own_row(), cols = x.cols, begin = t * cols;
  if (t >= x.rows) return;
  float along = 0;
  for (Index j = first_col(); j < cols; j += kWarp)
    along = fmaf(gain[j] * d_y[begin + j], x.data[begin + j], along);
  const float back = warp_sum(along) / static_cast<float>(cols) * s[t] * s[t];
  for (Index j = first_col(); j < cols; j += kWarp) {
    const float sum = d_x[begin + j] + s[t] * (gain[j] * d_y[begin + j] - x.data[begin + j] * back);
    d_x[begin + j] = sum;
    rounded[begin + j] = narrowed<T>(sum);
  }
}

// scratch(block, j) <- sum over the rows of the block of d_y x s
__global__ void partial_gain_kernel(DeviceMatrix<const float> x, const float* s, const float* d_y,
                                    float* scratch) {
  const Index j = first_element(), begin = Index{blockIdx.y} * kRowBlock;
  if (j >= x.cols) return;
  float sum = 0;
  for (Index t = begin; t < x.rows && t < begin + kRowBlock; ++t)
    sum = fmaf(d_y[t * x.cols + j] * s[t], x.data[t * x.cols + j], sum);
  scratch[Index{blockIdx.y} * x.cols + j] = sum;
}

__global__ void add_gain_kernel(const float* scratch, Index blocks, Index cols, float* d_gain) {
  const Index j = first_element();
  if (j >= cols) return;
  float sum = d_gain[j];
  for (Index block = 0; block < blocks; ++block) sum += scratch[block * cols + j];
  d_gain[j] = sum;
}

// Neighbours that a thread reads and writes at once.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T x[kWidth];
};
// work(their number): 16 bytes where rows of `cols` elements divide into them and begin with one, else one
// element.
template <class T, class Work>
void for_packs(Index cols, std::initializer_list<const T*> begins, const Work& work) {
  constexpr int kMost = 16 / static_cast<int>(sizeof(T));
  const bool aligned = std::all_of(begins.begin(), begins.end(), [](const T* begin) {
    return reinterpret_cast<std::uintptr_t>(begin) % 16 == 0;
  });
  if (cols % kMost == 0 && aligned) return work(std::integral_constant<int, kMost>{});
  work(std::integral_constant<int, 1>{});
}
// Threads of a block that has `things` to do.
unsigned threads_for(int things) {
  return static_cast<unsigned>(std::clamp((things + kWarp - 1) / kWarp * kWarp, kWarp, kThreads));
}

// A block for a row; packs are half / kWidth of each half of a head.
template <class T, int kWidth>
__global__ void rotate_kernel(const float* cosine, const float* sine, Index sequence, int packs, int heads,
                              bool backward, DeviceMatrix<T> x) {
  using Both = Pack<T, kWidth>;
  const Index t = Index{blockIdx.y} * sequence + blockIdx.x;
  if (t >= x.rows) return;
  auto* const row = reinterpret_cast<Both*>(x.data + t * x.row_stride);
  const Index angles = Index{blockIdx.x} * packs * kWidth;
  for (int e = static_cast<int>(threadIdx.x); e < heads * packs; e += static_cast<int>(blockDim.x)) {
    const int head = e / packs, j = e % packs;
    Both* const pair = row + head * 2 * packs + j;
    Both left = pair[0], right = pair[packs];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float c = cosine[angles + j * kWidth + i], along = sine[angles + j * kWidth + i];
      const float s = backward ? -along : along, l = widened(left.x[i]), r = widened(right.x[i]);
      left.x[i] = narrowed<T>(l * c - r * s);
      right.x[i] = narrowed<T>(r * c + l * s);
    }
    pair[0] = left;
    pair[packs] = right;
  }
}

// A block for a row, which has `packs` of g and behind them as many of u.
template <class T, int kWidth>
__global__ void swiglu_kernel(const T* gate_up, int packs, T* h) {
  using Some = Pack<T, kWidth>;
  const auto* const row = reinterpret_cast<const Some*>(gate_up) + Index{blockIdx.x} * 2 * packs;
  auto* const to = reinterpret_cast<Some*>(h) + Index{blockIdx.x} * packs;
  for (int e = static_cast<int>(threadIdx.x); e < packs; e += static_cast<int>(blockDim.x)) {
    const Some g = row[e], u = row[packs + e];
    Some result;
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      result.x[i] = narrowed<T>(Swiglu<float>(widened(g.x[i]), widened(u.x[i])).value);
    to[e] = result;
  }
}

template <class T, int kWidth>
__global__ void swiglu_backward_kernel(const T* gate_up, const T* d_h, int packs, T* d_gate_up) {
  using Some = Pack<T, kWidth>;
  const auto* const row = reinterpret_cast<const Some*>(gate_up) + Index{blockIdx.x} * 2 * packs;
  const auto* const from = reinterpret_cast<const Some*>(d_h) + Index{blockIdx.x} * packs;
  auto* const to = reinterpret_cast<Some*>(d_gate_up) + Index{blockIdx.x} * 2 * packs;
  for (int e = static_cast<int>(threadIdx.x); e < packs; e += static_cast<int>(blockDim.x)) {
    const Some g = row[e], u = row[packs + e], d = from[e];
    Some d_g, d_u;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const Swiglu<float> at(widened(g.x[i]), widened(u.x[i]));
      d_g.x[i] = narrowed<T>(widened(d.x[i]) * at.slope_g);
      d_u.x[i] = narrowed<T>(widened(d.x[i]) * at.slope_u);
    }
    to[e] = d_g;
    to[packs + e] = d_u;
  }
}

__global__ void embed_kernel(const std::int32_t* tokens, Range owned, const float* weight,
                             DeviceMatrix<float> x) {
  const Index elements = x.rows * x.cols;
  for (Index e = first_element(); e < elements; e += element_stride()) {
    const Index id = tokens[e / x.cols];
    const bool here = owned.begin <= id && id < owned.end;
    x.data[e] = here ? weight[(id - owned.begin) * x.cols + e % x.cols] : 0;
  }
}

// A block for every token in the order of ids; the first of each id adds all of that id.
__global__ void embed_backward_kernel(const std::int32_t* tokens, const std::int32_t* by_id, Range owned,
                                      DeviceMatrix<const float> d_x, float* d_weight) {
  const Index first = blockIdx.x, id = tokens[by_id[first]];
  if (id < owned.begin || id >= owned.end) return;
  if (first > 0 && tokens[by_id[first - 1]] == id) return;
  float* const row = d_weight + (id - owned.begin) * d_x.cols;
  for (Index j = threadIdx.x; j < d_x.cols; j += kThreads) {
    float sum = row[j];
    for (Index i = first; i < d_x.rows && tokens[by_id[i]] == id; ++i)
      sum += d_x.data[by_id[i] * d_x.cols + j];
    row[j] = sum;
  }
}

// The largest x of the block, for all its threads; once in a kernel.
__device__ float block_max(float x) {
  __shared__ float of_warp[kWarps];
  x = warp_max(x);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  float largest = of_warp[0];
  for (const float of_one : of_warp) largest = fmaxf(largest, of_one);
  return largest;
}

// A block for every token.
__global__ void cross_entropy_message_kernel(DeviceMatrix<const float> logits, Range owned,
                                             const std::int32_t* targets, float* message) {
  const Index t = blockIdx.x, target = targets[t];
  const float* const row = logits.data + t * logits.row_stride;
  float largest = -INFINITY;
  for (Index j = threadIdx.x; j < logits.cols; j += kThreads) largest = fmaxf(largest, row[j]);
  largest = block_max(largest);
  float sum = 0;
  for (Index j = threadIdx.x; j < logits.cols; j += kThreads) sum += expf(row[j] - largest);
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  message[3 * t] = largest;
  message[3 * t + 1] = sum;
  message[3 * t + 2] = owned.begin <= target && target < owned.end ? row[target - owned.begin] : 0.0F;
}

// m = max_j m_j,  Z = sum_j s_j exp(m_j - m),  loss = log Z + m - target,
// d = *gradient_scale (exp(l - m) / Z - [target])
template <class T>
__global__ void cross_entropy_kernel(DeviceMatrix<const float> logits, Range owned,
                                     const std::int32_t* targets, const float* gathered, int processes,
                                     const double* gradient_scale, double* losses, DeviceMatrix<T> d_logits) {
  const Index t = blockIdx.x, tokens = logits.rows, cols = logits.cols;
  const auto piece = [&](Index j, Index i) {
    return static_cast<double>(gathered[(j * tokens + t) * 3 + i]);
  };
  double largest = piece(0, 0), sum = 0, target = 0;
  for (Index j = 1; j < processes; ++j) largest = fmax(largest, piece(j, 0));
  for (Index j = 0; j < processes; ++j) {
    sum += piece(j, 1) * exp(piece(j, 0) - largest);
    target += piece(j, 2);
  }
  if (threadIdx.x == 0) losses[t] = log(sum) + largest - target;
  if (d_logits.data == nullptr) return;
  const auto shift = static_cast<float>(largest), scale = static_cast<float>(*gradient_scale / sum);
  const auto one = static_cast<float>(*gradient_scale);
  const Index own_target = targets[t] - owned.begin;
  for (Index j = threadIdx.x; j < cols; j += kThreads) {
    const float d = scale * expf(logits.data[t * logits.row_stride + j] - shift);
    d_logits.data[t * d_logits.row_stride + j] = narrowed<T>(j == own_target ? d - one : d);
  }
}

__global__ void sum_kernel(const double* x, Index count, double* sum) {
  double own = 0;
  for (Index i = threadIdx.x; i < count; i += kThreads) own += x[i];
  own = block_sum(own);
  if (threadIdx.x == 0) *sum = own;
}

}  // namespace

template <class T>
void device_rms_norm(DeviceMatrix<const float> x, const float* gain, float epsilon, DeviceMatrix<T> y,
                     float* s, const CudaStream& stream) {
  launch("rms_norm", stream, {blocks_of(x.rows, kWarps), kThreads}, rms_norm_kernel<T>, x, gain, epsilon,
         y.data, s);
}

Index device_rms_norm_scratch(Index tokens, Index width) {
  return (tokens + kRowBlock - 1) / kRowBlock * width;
}

template <class T>
void device_rms_norm_backward(DeviceMatrix<const float> x, const float* gain, const float* s,
                              DeviceMatrix<const float> d_y, float* d_gain, DeviceMatrix<float> d_x,
                              DeviceMatrix<T> rounded, float* scratch, const CudaStream& stream) {
  launch("rms_norm_backward", stream, {blocks_of(x.rows, kWarps), kThreads}, rms_norm_input_kernel<T>, x,
         gain, s, d_y.data, d_x.data, rounded.data);
  const unsigned col_blocks = blocks_of(x.cols, kThreads), row_blocks = blocks_of(x.rows, kRowBlock);
  launch("rms_norm_backward, parts of the gain", stream, {dim3(col_blocks, row_blocks), kThreads},
         partial_gain_kernel, x, s, d_y.data, scratch);
  launch("rms_norm_backward, gain", stream, {col_blocks, kThreads}, add_gain_kernel, scratch,
         Index{row_blocks}, x.cols, d_gain);
}

template <class T>
void device_rotate(const float* cosine, const float* sine, Index sequence, Index half, Index heads,
                   bool backward, DeviceMatrix<T> x, const CudaStream& stream) {
  const dim3 blocks(static_cast<unsigned>(std::min(sequence, x.rows)), blocks_of(x.rows, sequence));
  for_packs<T>(std::gcd(half, x.row_stride), {x.data}, [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    const int packs = static_cast<int>(half) / kWidth, all = packs * static_cast<int>(heads);
    launch("rotate", stream, {blocks, threads_for(all)}, rotate_kernel<T, kWidth>, cosine, sine, sequence,
           packs, static_cast<int>(heads), backward, x);
  });
}

template <class T>
void device_swiglu(DeviceMatrix<const T> gate_up, DeviceMatrix<T> h, const CudaStream& stream) {
  for_packs<T>(h.cols, {gate_up.data, h.data}, [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    const int packs = static_cast<int>(h.cols) / kWidth;
    launch("swiglu", stream, {static_cast<unsigned>(h.rows), threads_for(packs)}, swiglu_kernel<T, kWidth>,
           gate_up.data, packs, h.data);
  });
}

template <class T>
void device_swiglu_backward(DeviceMatrix<const T> gate_up, DeviceMatrix<const T> d_h,
                            DeviceMatrix<T> d_gate_up, const CudaStream& stream) {
  for_packs<T>(d_h.cols, {gate_up.data, d_h.data, d_gate_up.data}, [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    const int packs = static_cast<int>(d_h.cols) / kWidth;
    launch("swiglu_backward", stream, {static_cast<unsigned>(d_h.rows), threads_for(packs)},
           swiglu_backward_kernel<T, kWidth>, gate_up.data, d_h.data, packs, d_gate_up.data);
  });
}

void device_embed(const std::int32_t* tokens, Range owned, DeviceMatrix<const float> weight,
                  DeviceMatrix<float> x, const CudaStream& stream) {
  launch("embed", stream, {blocks_for(x.elements()), kThreads}, embed_kernel, tokens, owned, weight.data, x);
}

void device_embed_backward(const std::int32_t* tokens, const std::int32_t* by_id, Range owned,
                           DeviceMatrix<const float> d_x, DeviceMatrix<float> d_weight,
                           const CudaStream& stream) {
  launch("embed_backward", stream, {static_cast<unsigned>(d_x.rows), kThreads}, embed_backward_kernel, tokens,
         by_id, owned, d_x, d_weight.data);
}

void device_cross_entropy_message(DeviceMatrix<const float> logits, Range owned, const std::int32_t* targets,
                                  float* message, const CudaStream& stream) {
  launch("cross_entropy_message", stream, {static_cast<unsigned>(logits.rows), kThreads},
         cross_entropy_message_kernel, logits, owned, targets, message);
}

template <class T>
void device_cross_entropy(DeviceMatrix<const float> logits, Range owned, const std::int32_t* targets,
                          const float* gathered, int processes, const double* gradient_scale, double* losses,
                          DeviceMatrix<T> d_logits, const CudaStream& stream) {
  launch("cross_entropy", stream, {static_cast<unsigned>(logits.rows), kThreads}, cross_entropy_kernel<T>,
         logits, owned, targets, gathered, processes, gradient_scale, losses, d_logits);
}

void device_sum(const double* losses, Index count, double* sum, const CudaStream& stream) {
  launch("sum", stream, {1, kThreads}, sum_kernel, losses, count, sum);
}

#define LB_INSTANTIATE(T)                                                                                 \
  template void device_rms_norm(DeviceMatrix<const float>, const float*, float, DeviceMatrix<T>, float*,  \
                                const CudaStream&);                                                       \
  template void device_rms_norm_backward(DeviceMatrix<const float>, const float*, const float*,           \
                                         DeviceMatrix<const float>, float*, DeviceMatrix<float>,          \
                                         DeviceMatrix<T>, float*, const CudaStream&);                     \
  template void device_rotate(const float*, const float*, Index, Index, Index, bool, DeviceMatrix<T>,     \
                              const CudaStream&);                                                         \
  template void device_swiglu(DeviceMatrix<const T>, DeviceMatrix<T>, const CudaStream&);                 \
  template void device_swiglu_backward(DeviceMatrix<const T>, DeviceMatrix<const T>, DeviceMatrix<T>,     \
                                       const CudaStream&);                                                \
  template void device_cross_entropy(DeviceMatrix<const float>, Range, const std::int32_t*, const float*, \
                                     int, const double*, double*, DeviceMatrix<T>, const CudaStream&);
LB_INSTANTIATE(float)
LB_INSTANTIATE(BFloat16)
#undef LB_INSTANTIATE

}  // namespace lowband
