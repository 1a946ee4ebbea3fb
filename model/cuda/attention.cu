#include "model/cuda/attention.h"
#include "model/cuda/tiles.cuh"
#include "runtime/cuda/elements.cuh"
#include "runtime/error.h"

#include <cmath>

namespace lowband {
namespace {

constexpr int kThreads = kElementThreads;
constexpr int kWarps = kThreads / kWarp;

// Queries and keys of a tile. In float half as many, so that eight tiles of head dimension 128 fit.
template <class T>
constexpr int kSide = std::is_same_v<T, BFloat16> ? 64 : 32;

// The columns of one head among the rows of one sequence; T may be const.
template <class T>
struct HeadRows {
  T* data;
  Index stride;
};
template <class T>
struct Heads {
  __device__ HeadRows<T> query(Index head) const { return columns(head * shape.head_dim); }
  __device__ HeadRows<T> key(Index head) const { return columns(shape.query_cols() + head * shape.head_dim); }
  __device__ HeadRows<T> value(Index head) const {
    return columns(shape.query_cols() + shape.kv_cols() + head * shape.head_dim);
  }
  __device__ HeadRows<T> columns(Index begin) const {
    return {rows + sequence * shape.sequence * stride + begin, stride};
  }
  const AttentionShape& shape;
  T* rows;
  Index stride;
  Index sequence;
};

// Rows [begin, begin + kSide) of a head; zeros behind the end of the sequence.
template <class T>
__device__ void load(const AttentionShape& shape, const HeadRows<const T>& from, Index begin,
                     const Tile<T>& to) {
  const int cols = static_cast<int>(shape.head_dim);
  for (int e = static_cast<int>(threadIdx.x); e < kSide<T> * cols; e += kThreads) {
    const int i = e / cols, j = e % cols;
    to(i, j) = begin + i < shape.sequence ? from.data[(begin + i) * from.stride + j] : narrowed<T>(0.0F);
  }
}

template <class T>
__device__ void store(const AttentionShape& shape, const Tile<float>& from, Index begin,
                      const HeadRows<T>& to) {
  const int cols = static_cast<int>(shape.head_dim);
  for (int e = static_cast<int>(threadIdx.x); e < kSide<T> * cols; e += kThreads) {
    const int i = e / cols, j = e % cols;
    if (begin + i < shape.sequence) to.data[(begin + i) * to.stride + j] = narrowed<T>(from(i, j));
  }
}

template <class T>
__device__ void clear(const AttentionShape& shape, const Tile<float>& tile) {
  const int cols = static_cast<int>(shape.head_dim);
  for (int e = static_cast<int>(threadIdx.x); e < kSide<T> * cols; e += kThreads)
    tile(e / cols, e % cols) = 0;
}

template <class T>
struct ForwardTiles {
  LB_HOST_DEVICE ForwardTiles(TileMemory& memory, int head_dim)
      : q(memory.tile<T>(kSide<T>, head_dim)),
        k(memory.tile<T>(kSide<T>, head_dim)),
        v(memory.tile<T>(kSide<T>, head_dim)),
        p(memory.tile<T>(kSide<T>, kSide<T>)),
        s(memory.tile<float>(kSide<T>, kSide<T>)),
        o(memory.tile<float>(kSide<T>, head_dim)) {}
  Tile<T> q, k, v, p;
  Tile<float> s, o;
};

// Block (query tile, head, sequence). For every tile of keys up to the diagonal:
//   S <- Q K^T,  m' = max(m, rowmax(scale S)),  P = exp(scale S - m'),
//   l <- l exp(m - m') + rowsum(P),  O <- O exp(m - m') + P V;  in the end O / l.
// A warp has the rows w, w + 8, ... of the tile, whose m and l its lanes know.
template <class T>
__global__ void attention_kernel(AttentionShape shape, float scale, const T* qkv, T* out, float* statistics) {
  TileMemory memory(dynamic_shared<char>());
  const int head_dim = static_cast<int>(shape.head_dim);
  const ForwardTiles<T> tile(memory, head_dim);
  const Index begin = Index{gridDim.x - 1 - blockIdx.x} * kSide<T>;  // the longest rows first
  const Index head = blockIdx.y, sequence = blockIdx.z, kv_head = head / (shape.heads / shape.kv_heads);
  const Heads<const T> in{shape, qkv, shape.qkv_cols(), sequence};
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;

  constexpr int kRows = kSide<T> / kWarps;
  float largest[kRows], sum[kRows];
  for (int r = 0; r < kRows; ++r) largest[r] = -INFINITY, sum[r] = 0;
  load(shape, in.query(head), begin, tile.q);
  clear<T>(shape, tile.o);
  for (Index keys = 0; keys <= begin; keys += kSide<T>) {
    __syncthreads();  // everyone is done with the last K, V and P
    load(shape, in.key(kv_head), keys, tile.k);
    load(shape, in.value(kv_head), keys, tile.v);
    __syncthreads();
    multiply<false, true>(kSide<T>, kSide<T>, head_dim, tile.q, tile.k, false, tile.s);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = warp + r * kWarps;
      const auto score = [&](int j) { return keys + j <= begin + i ? scale * tile.s(i, j) : -INFINITY; };
      float found = largest[r];
      for (int j = lane; j < kSide<T>; j += kWarp) found = fmaxf(found, score(j));
      found = warp_max(found);
      float own = 0;
      for (int j = lane; j < kSide<T>; j += kWarp) {
        const float weight = expf(score(j) - found);
        own += weight;
        tile.p(i, j) = narrowed<T>(weight);
      }
      const float factor = expf(largest[r] - found);
      for (int j = lane; j < head_dim; j += kWarp) tile.o(i, j) *= factor;
      sum[r] = sum[r] * factor + warp_sum(own);
      largest[r] = found;
    }
    __syncthreads();
    multiply<false, false>(kSide<T>, head_dim, kSide<T>, tile.p, tile.v, true, tile.o);
  }
  __syncthreads();
  const HeadRows<T> to = Heads<T>{shape, out, shape.query_cols(), sequence}.query(head);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int i = warp + r * kWarps;
    if (begin + i >= shape.sequence) continue;
    const float inverse = 1 / sum[r];
    for (int j = lane; j < head_dim; j += kWarp)
      to.data[(begin + i) * to.stride + j] = narrowed<T>(tile.o(i, j) * inverse);
    if (lane == 0) {
      float* const own = statistics + ((sequence * shape.heads + head) * shape.sequence + begin + i) * 2;
      own[0] = largest[r];
      own[1] = inverse;
    }
  }
}

// row_products(sequence, head, t) <- rowsum(dO O) = rowsum(P dP). A warp for each.
template <class T>
__global__ void row_products_kernel(AttentionShape shape, const T* out, const T* d_out, float* row_products) {
  const Index row = Index{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (row >= shape.tokens() * shape.heads) return;
  const Index t = row % shape.sequence, head = row / shape.sequence % shape.heads;
  const Index begin =
      (row / shape.sequence / shape.heads * shape.sequence + t) * shape.query_cols() + head * shape.head_dim;
  float sum = 0;
  for (Index j = threadIdx.x % kWarp; j < shape.head_dim; j += kWarp)
    sum = fmaf(widened(out[begin + j]), widened(d_out[begin + j]), sum);
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) row_products[row] = sum;
}

template <class T>
struct ScoreTiles {
  LB_HOST_DEVICE ScoreTiles(TileMemory& memory, int head_dim)
      : q(memory.tile<T>(kSide<T>, head_dim)),
        k(memory.tile<T>(kSide<T>, head_dim)),
        v(memory.tile<T>(kSide<T>, head_dim)),
        d_o(memory.tile<T>(kSide<T>, head_dim)),
        p(memory.tile<T>(kSide<T>, kSide<T>)),
        d_s(memory.tile<T>(kSide<T>, kSide<T>)),
        s(memory.tile<float>(kSide<T>, kSide<T>)),
        d_p(memory.tile<float>(kSide<T>, kSide<T>)) {}
  Tile<T> q, k, v, d_o, p, d_s;
  Tile<float> s, d_p;
};

// P <- softmax(Q K^T scale) again from the statistics,  dS <- scale P (dO V^T - rowsum(P dP)), for queries
// from `begin` and keys from `keys`. All threads meet before, and have to meet after.
template <class T>
__device__ void score_gradients(const AttentionShape& shape, float scale, const ScoreTiles<T>& tile,
                                Index begin, Index keys, const float* statistics, const float* row_products) {
  const int head_dim = static_cast<int>(shape.head_dim);
  multiply<false, true>(kSide<T>, kSide<T>, head_dim, tile.q, tile.k, false, tile.s);
  multiply<false, true>(kSide<T>, kSide<T>, head_dim, tile.d_o, tile.v, false, tile.d_p);
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < kSide<T> * kSide<T>; e += kThreads) {
    const int i = e / kSide<T>, j = e % kSide<T>;
    const Index t = begin + i;
    float weight = 0, gradient = 0;
    if (t < shape.sequence && keys + j <= t) {
      weight = statistics[2 * t + 1] * expf(scale * tile.s(i, j) - statistics[2 * t]);
      gradient = scale * weight * (tile.d_p(i, j) - row_products[t]);
    }
    tile.p(i, j) = narrowed<T>(weight);
    tile.d_s(i, j) = narrowed<T>(gradient);
  }
}

// Block (query tile, head, sequence): dQ <- sum over tiles of keys of dS K.
template <class T>
__global__ void query_gradient_kernel(AttentionShape shape, float scale, const T* qkv, const T* d_out,
                                      const float* statistics, const float* row_products, T* d_qkv) {
  TileMemory memory(dynamic_shared<char>());
  const int head_dim = static_cast<int>(shape.head_dim);
  const ScoreTiles<T> tile(memory, head_dim);
  const Tile<float> d_q = memory.tile<float>(kSide<T>, head_dim);
  const Index begin = Index{gridDim.x - 1 - blockIdx.x} * kSide<T>;
  const Index head = blockIdx.y, sequence = blockIdx.z, kv_head = head / (shape.heads / shape.kv_heads);
  const Index rows = (sequence * shape.heads + head) * shape.sequence;
  const Heads<const T> in{shape, qkv, shape.qkv_cols(), sequence};

  load(shape, in.query(head), begin, tile.q);
  load(shape, Heads<const T>{shape, d_out, shape.query_cols(), sequence}.query(head), begin, tile.d_o);
  for (Index keys = 0; keys <= begin; keys += kSide<T>) {
    __syncthreads();  // everyone is done with the last K and dS
    load(shape, in.key(kv_head), keys, tile.k);
    load(shape, in.value(kv_head), keys, tile.v);
    __syncthreads();
    score_gradients(shape, scale, tile, begin, keys, statistics + 2 * rows, row_products + rows);
    __syncthreads();
    multiply<false, false>(kSide<T>, head_dim, kSide<T>, tile.d_s, tile.k, keys > 0, d_q);
  }
  __syncthreads();
  store<T>(shape, d_q, begin, Heads<T>{shape, d_qkv, shape.qkv_cols(), sequence}.query(head));
}

// Block (key tile, key and value head, sequence): over the group's heads and the tiles of queries that see
// it,
//   dV <- sum of P^T dO,  dK <- sum of dS^T Q.
template <class T>
__global__ void key_gradient_kernel(AttentionShape shape, float scale, const T* qkv, const T* d_out,
                                    const float* statistics, const float* row_products, T* d_qkv) {
  TileMemory memory(dynamic_shared<char>());
  const int head_dim = static_cast<int>(shape.head_dim);
  const ScoreTiles<T> tile(memory, head_dim);
  const Tile<float> d_k = memory.tile<float>(kSide<T>, head_dim),
                    d_v = memory.tile<float>(kSide<T>, head_dim);
  const Index keys = Index{blockIdx.x} * kSide<T>, kv_head = blockIdx.y, sequence = blockIdx.z;
  const Index group = shape.heads / shape.kv_heads;
  const Heads<const T> in{shape, qkv, shape.qkv_cols(), sequence};
  const Heads<const T> d_result{shape, d_out, shape.query_cols(), sequence};

  load(shape, in.key(kv_head), keys, tile.k);
  load(shape, in.value(kv_head), keys, tile.v);
  clear<T>(shape, d_k);
  clear<T>(shape, d_v);
  for (Index head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const Index rows = (sequence * shape.heads + head) * shape.sequence;
    for (Index begin = keys; begin < shape.sequence; begin += kSide<T>) {
      __syncthreads();  // everyone is done with the last Q, dO, P and dS
      load(shape, in.query(head), begin, tile.q);
      load(shape, d_result.query(head), begin, tile.d_o);
      __syncthreads();
      score_gradients(shape, scale, tile, begin, keys, statistics + 2 * rows, row_products + rows);
      __syncthreads();
      multiply<true, false>(kSide<T>, head_dim, kSide<T>, tile.p, tile.d_o, true, d_v);
      multiply<true, false>(kSide<T>, head_dim, kSide<T>, tile.d_s, tile.q, true, d_k);
    }
  }
  __syncthreads();
  const Heads<T> d_in{shape, d_qkv, shape.qkv_cols(), sequence};
  store<T>(shape, d_k, keys, d_in.key(kv_head));
  store<T>(shape, d_v, keys, d_in.value(kv_head));
}

float checked_scale(const AttentionShape& shape) {
  LB_EXPECTS(shape.head_dim % 16 == 0 && shape.head_dim >= 16 && shape.head_dim <= 128,
             "attention on a device: found head_dim ", shape.head_dim, ", expected 16, 32, ... 128");
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape.head_dim)));
}

// What a kernel needs of shared memory that lays out Tiles and `more` float tiles of (kSide, head_dim).
template <class Tiles, class T>
Index shared_bytes(const AttentionShape& shape, int more) {
  TileMemory memory(nullptr);
  const int head_dim = static_cast<int>(shape.head_dim);
  Tiles(memory, head_dim);
  for (int i = 0; i < more; ++i) memory.tile<float>(kSide<T>, head_dim);
  return memory.bytes();
}

template <class T>
dim3 blocks_of(const AttentionShape& shape, Index heads) {
  return {static_cast<unsigned>((shape.sequence + kSide<T> - 1) / kSide<T>), static_cast<unsigned>(heads),
          static_cast<unsigned>(shape.sequences)};
}

}  // namespace

template <class T>
void device_attention(const AttentionShape& shape, DeviceMatrix<const T> qkv, DeviceMatrix<T> out,
                      float* statistics, const CudaStream& stream) {
  const float scale = checked_scale(shape);
  launch("attention", stream,
         {blocks_of<T>(shape, shape.heads), kThreads, shared_bytes<ForwardTiles<T>, T>(shape, 0)},
         attention_kernel<T>, shape, scale, qkv.data, out.data, statistics);
}

template <class T>
void device_attention_backward(const AttentionShape& shape, DeviceMatrix<const T> qkv,
                               DeviceMatrix<const T> out, DeviceMatrix<const T> d_out,
                               const float* statistics, float* row_products, DeviceMatrix<T> d_qkv,
                               const CudaStream& stream) {
  const float scale = checked_scale(shape);
  const Index rows = shape.tokens() * shape.heads;
  launch("attention_backward, row products", stream,
         {static_cast<unsigned>((rows + kWarps - 1) / kWarps), kThreads}, row_products_kernel<T>, shape,
         out.data, d_out.data, row_products);
  launch("attention_backward, queries", stream,
         {blocks_of<T>(shape, shape.heads), kThreads, shared_bytes<ScoreTiles<T>, T>(shape, 1)},
         query_gradient_kernel<T>, shape, scale, qkv.data, d_out.data, statistics, row_products, d_qkv.data);
  launch("attention_backward, keys and values", stream,
         {blocks_of<T>(shape, shape.kv_heads), kThreads, shared_bytes<ScoreTiles<T>, T>(shape, 2)},
         key_gradient_kernel<T>, shape, scale, qkv.data, d_out.data, statistics, row_products, d_qkv.data);
}

#define LB_INSTANTIATE(T)                                                                               \
  template void device_attention(const AttentionShape&, DeviceMatrix<const T>, DeviceMatrix<T>, float*, \
                                 const CudaStream&);                                                    \
  template void device_attention_backward(const AttentionShape&, DeviceMatrix<const T>,                 \
                                          DeviceMatrix<const T>, DeviceMatrix<const T>, const float*,   \
                                          float*, DeviceMatrix<T>, const CudaStream&);
LB_INSTANTIATE(float)
LB_INSTANTIATE(BFloat16)
#undef LB_INSTANTIATE

}  // namespace lowband
