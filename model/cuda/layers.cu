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
// Rows per partial sum of a gain's gradient.
constexpr Index kRowBlock = 16;

unsigned blocks_of(Index things, Index per_block) {
  return static_cast<unsigned>((things + per_block - 1) / per_block);
}

// Kernels for rows have a warp for each, eight to a block.
__device__ Index own_row() { return Index{blockIdx.x} * kWarps + threadIdx.x / kWarp; }
__device__ Index first_col() { return threadIdx.x % kWarp; }

// Neighbours that a thread reads and writes at once.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T x[kWidth];
};
// work(their number): 16 bytes where rows of `cols` elements divide into them and begin with one, else one
// element.
template <class T, class Work>
void for_packs(Index cols, std::initializer_list<const void*> begins, const Work& work) {
  constexpr int kMost = 16 / static_cast<int>(sizeof(T));
  const bool aligned = std::all_of(begins.begin(), begins.end(), [](const void* begin) {
    return reinterpret_cast<std::uintptr_t>(begin) % 16 == 0;
  });
  if (cols % kMost == 0 && aligned) return work(std::integral_constant<int, kMost>{});
  work(std::integral_constant<int, 1>{});
}
// Threads of a block that has `things` to do.
unsigned threads_for(int things) {
  return static_cast<unsigned>(std::clamp((things + kWarp - 1) / kWarp * kWarp, kWarp, kThreads));
}

template <class T, int kWidth>
__global__ void rms_norm_kernel(DeviceMatrix<const float> x, const float* gain, float epsilon, T* y,
                                float* s) {
  using Some = Pack<float, kWidth>;
  const Index t = own_row();
  if (t >= x.rows) return;
  const int packs = static_cast<int>(x.cols) / kWidth, first = static_cast<int>(first_col());
  const auto* const row = reinterpret_cast<const Some*>(x.data) + t * packs;
  const auto* const gains = reinterpret_cast<const Some*>(gain);
  auto* const to = reinterpret_cast<Pack<T, kWidth>*>(y) + t * packs;
  float squares = 0;
  for (int p = first; p < packs; p += kWarp) {
    const Some some = row[p];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) squares = fmaf(some.x[i], some.x[i], squares);
  }
  const float scale = 1 / sqrtf(warp_sum(squares) / static_cast<float>(x.cols) + epsilon);
  if (first == 0) s[t] = scale;
  for (int p = first; p < packs; p += kWarp) {
    const Some some = row[p], factor = gains[p];
    Pack<T, kWidth> result;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) result.x[i] = narrowed<T>(factor.x[i] * some.x[i] * scale);
    to[p] = result;
  }
}

// d_x <- d_x + s (gain d_y - x s^2 mean(gain d_y x)),  scratch(block, j) <- sum over the rows of the block of
// d_y x s. A warp for a row; its lanes add up d_y x s of their columns in shared memory of the warp's own.
template <class T, int kWidth>
__global__ void rms_norm_backward_kernel(DeviceMatrix<const float> x, const float* gain, const float* s,
                                         const float* d_y, float* d_x, T* rounded, float* scratch) {
  using Some = Pack<float, kWidth>;
  const int packs = static_cast<int>(x.cols) / kWidth, first = static_cast<int>(first_col());
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  const auto* const gains = reinterpret_cast<const Some*>(gain);
  auto* const sums = dynamic_shared<Some>() + warp * packs;
  for (int p = first; p < packs; p += kWarp) sums[p] = Some{};
  const Index begin = Index{blockIdx.x} * kRowBlock;
  for (Index t = begin + warp; t < x.rows && t < begin + kRowBlock; t += warps) {
    const auto* const x_row = reinterpret_cast<const Some*>(x.data) + t * packs;
    const auto* const d_y_row = reinterpret_cast<const Some*>(d_y) + t * packs;
    auto* const d_x_row = reinterpret_cast<Some*>(d_x) + t * packs;
    auto* const rounded_row = reinterpret_cast<Pack<T, kWidth>*>(rounded) + t * packs;
    float along = 0;
    for (int p = first; p < packs; p += kWarp) {
      const Some own = x_row[p], d = d_y_row[p], factor = gains[p];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) along = fmaf(factor.x[i] * d.x[i], own.x[i], along);
    }
    const float scale = s[t], back = warp_sum(along) / static_cast<float>(x.cols) * scale * scale;
    for (int p = first; p < packs; p += kWarp) {
      const Some own = x_row[p], d = d_y_row[p], factor = gains[p];
      Some into = d_x_row[p], sum = sums[p];
      Pack<T, kWidth> narrow;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        into.x[i] += scale * (factor.x[i] * d.x[i] - own.x[i] * back);
        narrow.x[i] = narrowed<T>(into.x[i]);
        sum.x[i] = fmaf(d.x[i] * scale, own.x[i], sum.x[i]);
      }
      d_x_row[p] = into;
      rounded_row[p] = narrow;
      sums[p] = sum;
    }
  }
  __syncthreads();
  const auto cols = static_cast<int>(x.cols);
  for (int j = static_cast<int>(threadIdx.x); j < cols; j += static_cast<int>(blockDim.x)) {
    float sum = 0;
    for (int w = 0; w < warps; ++w) sum += dynamic_shared<float>()[w * cols + j];
    scratch[blockIdx.x * x.cols + j] = sum;
  }
}

// A block for 32 columns: each of its 32 warps adds up every 32nd row of scratch, then the first these sums.
__global__ void add_gain_kernel(const float* scratch, Index rows, Index cols, float* d_gain) {
  __shared__ float of_warp[kWarp][kWarp];
  const Index j = Index{blockIdx.x} * kWarp + first_col();
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(first_col());
  float sum = 0;
  if (j < cols) {
    for (Index row = warp; row < rows; row += kWarp) sum += scratch[row * cols + j];
  }
  of_warp[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || j >= cols) return;
  sum = d_gain[j];
  for (int w = 0; w < kWarp; ++w) sum += of_warp[w][lane];
  d_gain[j] = sum;
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
  for_packs<float>(x.cols, {x.data, gain, y.data}, [&](auto width) {
    launch("rms_norm", stream, {blocks_of(x.rows, kWarps), kThreads},
           rms_norm_kernel<T, decltype(width)::value>, x, gain, epsilon, y.data, s);
  });
}

Index device_rms_norm_scratch(Index tokens, Index width) {
  return (tokens + kRowBlock - 1) / kRowBlock * width;
}

template <class T>
void device_rms_norm_backward(DeviceMatrix<const float> x, const float* gain, const float* s,
                              DeviceMatrix<const float> d_y, float* d_gain, DeviceMatrix<float> d_x,
                              DeviceMatrix<T> rounded, float* scratch, const CudaStream& stream) {
  // As many warps as have room for their sums in a third of a multiprocessor's shared memory.
  int warps = kWarps;
  while (warps > 1 && warps * x.cols * Index{sizeof(float)} > 64 * 1024) warps /= 2;
  const unsigned blocks = blocks_of(x.rows, kRowBlock);
  for_packs<float>(x.cols, {x.data, gain, d_y.data, d_x.data, rounded.data}, [&](auto width) {
    launch("rms_norm_backward", stream,
           {blocks, static_cast<unsigned>(warps * kWarp), warps * x.cols * Index{sizeof(float)}},
           rms_norm_backward_kernel<T, decltype(width)::value>, x, gain, s, d_y.data, d_x.data, rounded.data,
           scratch);
  });
  launch("rms_norm_backward, gain", stream, {blocks_of(x.cols, kWarp), kWarp * kWarp}, add_gain_kernel,
         scratch, Index{blocks}, x.cols, d_gain);
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
