#include "model/cuda/attention.h"
#include "model/cuda/heads.cuh"
#include "model/cuda/tiles.cuh"

#include <cmath>

namespace lowband {
namespace {

constexpr int kThreads = kElementThreads;
constexpr int kWarps = kThreads / kWarp;

// Attention of float; that of bf16 is half_attention.cu. Queries and keys of a tile: eight tiles of head
// dimension 128 fit.
constexpr int kSide = 32;

// Rows [begin, begin + kSide) of a head; zeros behind the end of the sequence.
__device__ void load(const AttentionShape& shape, const HeadRows<const float>& from, Index begin,
                     const Tile<float>& to) {
  const int cols = static_cast<int>(shape.head_dim);
  for (int e = static_cast<int>(threadIdx.x); e < kSide * cols; e += kThreads) {
    const int i = e / cols, j = e % cols;
    to(i, j) = begin + i < shape.sequence ? from.data[(begin + i) * from.stride + j] : 0.0F;
  }
}

__device__ void store(const AttentionShape& shape, const Tile<float>& from, Index begin,
                      const HeadRows<float>& to) {
  const int cols = static_cast<int>(shape.head_dim);
  for (int e = static_cast<int>(threadIdx.x); e < kSide * cols; e += kThreads) {
    const int i = e / cols, j = e % cols;
    if (begin + i < shape.sequence) to.data[(begin + i) * to.stride + j] = from(i, j);
  }
}

__device__ void clear(const AttentionShape& shape, const Tile<float>& tile) {
  const int cols = static_cast<int>(shape.head_dim);
  for (int e = static_cast<int>(threadIdx.x); e < kSide * cols; e += kThreads) tile(e / cols, e % cols) = 0;
}

struct ForwardTiles {
  LB_HOST_DEVICE ForwardTiles(TileMemory& memory, int head_dim)
      : q(memory.tile<float>(kSide, head_dim)),
        k(memory.tile<float>(kSide, head_dim)),
        v(memory.tile<float>(kSide, head_dim)),
        p(memory.tile<float>(kSide, kSide)),
        s(memory.tile<float>(kSide, kSide)),
        o(memory.tile<float>(kSide, head_dim)) {}
  Tile<float> q, k, v, p, s, o;
};

// Block (query tile, head, sequence). For every tile of keys up to the diagonal:
//   S <- Q K^T,  m' = max(m, rowmax(scale S)),  P = exp(scale S - m'),
//   l <- l exp(m - m') + rowsum(P),  O <- O exp(m - m') + P V;  in the end O / l.
// A warp has the rows w, w + 8, ... of the tile, whose m and l its lanes know.
__global__ void attention_kernel(AttentionShape shape, float scale, const float* qkv, float* out,
                                 float* statistics) {
  TileMemory memory(dynamic_shared<char>());
  const int head_dim = static_cast<int>(shape.head_dim);
  const ForwardTiles tile(memory, head_dim);
  const Index begin = Index{gridDim.x - 1 - blockIdx.x} * kSide;  // the longest rows first
  const Index head = blockIdx.y, sequence = blockIdx.z, kv_head = head / (shape.heads / shape.kv_heads);
  const Heads<const float> in{shape, qkv, shape.qkv_cols(), sequence};
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;

  constexpr int kRows = kSide / kWarps;
  float largest[kRows], sum[kRows];
  for (int r = 0; r < kRows; ++r) largest[r] = -INFINITY, sum[r] = 0;
  load(shape, in.query(head), begin, tile.q);
  clear(shape, tile.o);
  for (Index keys = 0; keys <= begin; keys += kSide) {
    __syncthreads();  // everyone is done with the last K, V and P
    load(shape, in.key(kv_head), keys, tile.k);
    load(shape, in.value(kv_head), keys, tile.v);
    __syncthreads();
    multiply<false, true>(kSide, kSide, head_dim, tile.q, tile.k, false, tile.s);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = warp + r * kWarps;
      const auto score = [&](int j) { return keys + j <= begin + i ? scale * tile.s(i, j) : -INFINITY; };
      float found = largest[r];
      for (int j = lane; j < kSide; j += kWarp) found = fmaxf(found, score(j));
      found = warp_max(found);
      float own = 0;
      for (int j = lane; j < kSide; j += kWarp) {
        const float weight = expf(score(j) - found);
        own += weight;
        tile.p(i, j) = weight;
      }
      const float factor = expf(largest[r] - found);
      for (int j = lane; j < head_dim; j += kWarp) tile.o(i, j) *= factor;
      sum[r] = sum[r] * factor + warp_sum(own);
      largest[r] = found;
    }
    __syncthreads();
    multiply<false, false>(kSide, head_dim, kSide, tile.p, tile.v, true, tile.o);
  }
  __syncthreads();
  const HeadRows<float> to = Heads<float>{shape, out, shape.query_cols(), sequence}.query(head);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int i = warp + r * kWarps;
    if (begin + i >= shape.sequence) continue;
    const float inverse = 1 / sum[r];
    for (int j = lane; j < head_dim; j += kWarp)
      to.data[(begin + i) * to.stride + j] = tile.o(i, j) * inverse;
    if (lane == 0) {
      float* const own = statistics + ((sequence * shape.heads + head) * shape.sequence + begin + i) * 2;
      own[0] = largest[r];
      own[1] = inverse;
    }
  }
}

struct ScoreTiles {
  LB_HOST_DEVICE ScoreTiles(TileMemory& memory, int head_dim)
      : q(memory.tile<float>(kSide, head_dim)),
        k(memory.tile<float>(kSide, head_dim)),
        v(memory.tile<float>(kSide, head_dim)),
        d_o(memory.tile<float>(kSide, head_dim)),
        p(memory.tile<float>(kSide, kSide)),
        d_s(memory.tile<float>(kSide, kSide)),
        s(memory.tile<float>(kSide, kSide)),
        d_p(memory.tile<float>(kSide, kSide)) {}
  Tile<float> q, k, v, d_o, p, d_s, s, d_p;
};

// P <- softmax(Q K^T scale) again from the statistics,  dS <- scale P (dO V^T - rowsum(P dP)), for
// queries from `begin` and keys from `keys`. All threads meet before, and have to meet after.
__device__ void score_gradients(const AttentionShape& shape, float scale, const ScoreTiles& tile, Index begin,
                                Index keys, const float* statistics, const float* row_products) {
  const int head_dim = static_cast<int>(shape.head_dim);
  multiply<false, true>(kSide, kSide, head_dim, tile.q, tile.k, false, tile.s);
  multiply<false, true>(kSide, kSide, head_dim, tile.d_o, tile.v, false, tile.d_p);
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < kSide * kSide; e += kThreads) {
    const int i = e / kSide, j = e % kSide;
    const Index t = begin + i;
    float weight = 0, gradient = 0;
    if (t < shape.sequence && keys + j <= t) {
      weight = statistics[2 * t + 1] * expf(scale * tile.s(i, j) - statistics[2 * t]);
      gradient = scale * weight * (tile.d_p(i, j) - row_products[t]);
    }
    tile.p(i, j) = weight;
    tile.d_s(i, j) = gradient;
  }
}

// Block (query tile, head, sequence): dQ <- sum over tiles of keys of dS K.
__global__ void query_gradient_kernel(AttentionShape shape, float scale, const float* qkv, const float* d_out,
                                      const float* statistics, const float* row_products, float* d_qkv) {
  TileMemory memory(dynamic_shared<char>());
  const int head_dim = static_cast<int>(shape.head_dim);
  const ScoreTiles tile(memory, head_dim);
  const Tile<float> d_q = memory.tile<float>(kSide, head_dim);
  const Index begin = Index{gridDim.x - 1 - blockIdx.x} * kSide;
  const Index head = blockIdx.y, sequence = blockIdx.z, kv_head = head / (shape.heads / shape.kv_heads);
  const Index rows = (sequence * shape.heads + head) * shape.sequence;
  const Heads<const float> in{shape, qkv, shape.qkv_cols(), sequence};

  load(shape, in.query(head), begin, tile.q);
  load(shape, Heads<const float>{shape, d_out, shape.query_cols(), sequence}.query(head), begin, tile.d_o);
  for (Index keys = 0; keys <= begin; keys += kSide) {
    __syncthreads();  // everyone is done with the last K and dS
    load(shape, in.key(kv_head), keys, tile.k);
    load(shape, in.value(kv_head), keys, tile.v);
    __syncthreads();
    score_gradients(shape, scale, tile, begin, keys, statistics + 2 * rows, row_products + rows);
    __syncthreads();
    multiply<false, false>(kSide, head_dim, kSide, tile.d_s, tile.k, keys > 0, d_q);
  }
  __syncthreads();
  store(shape, d_q, begin, Heads<float>{shape, d_qkv, shape.qkv_cols(), sequence}.query(head));
}

// Block (key tile, key and value head, sequence): over the group's heads and the tiles of queries that see
// it,
//   dV <- sum of P^T dO,  dK <- sum of dS^T Q.
__global__ void key_gradient_kernel(AttentionShape shape, float scale, const float* qkv, const float* d_out,
                                    const float* statistics, const float* row_products, float* d_qkv) {
  TileMemory memory(dynamic_shared<char>());
  const int head_dim = static_cast<int>(shape.head_dim);
  const ScoreTiles tile(memory, head_dim);
  const Tile<float> d_k = memory.tile<float>(kSide, head_dim), d_v = memory.tile<float>(kSide, head_dim);
  const Index keys = Index{blockIdx.x} * kSide, kv_head = blockIdx.y, sequence = blockIdx.z;
  const Index group = shape.heads / shape.kv_heads;
  const Heads<const float> in{shape, qkv, shape.qkv_cols(), sequence};
  const Heads<const float> d_result{shape, d_out, shape.query_cols(), sequence};

  load(shape, in.key(kv_head), keys, tile.k);
  load(shape, in.value(kv_head), keys, tile.v);
  clear(shape, d_k);
  clear(shape, d_v);
  for (Index head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const Index rows = (sequence * shape.heads + head) * shape.sequence;
    for (Index begin = keys; begin < shape.sequence; begin += kSide) {
      __syncthreads();  // everyone is done with the last Q, dO, P and dS
      load(shape, in.query(head), begin, tile.q);
      load(shape, d_result.query(head), begin, tile.d_o);
      __syncthreads();
      score_gradients(shape, scale, tile, begin, keys, statistics + 2 * rows, row_products + rows);
      __syncthreads();
      multiply<true, false>(kSide, head_dim, kSide, tile.p, tile.d_o, true, d_v);
      multiply<true, false>(kSide, head_dim, kSide, tile.d_s, tile.q, true, d_k);
    }
  }
  __syncthreads();
  const Heads<float> d_in{shape, d_qkv, shape.qkv_cols(), sequence};
  store(shape, d_k, keys, d_in.key(kv_head));
  store(shape, d_v, keys, d_in.value(kv_head));
}

// What a kernel needs of shared memory that lays out Tiles and `more` float tiles of (kSide, head_dim).
template <class Tiles>
Index shared_bytes(const AttentionShape& shape, int more) {
  TileMemory memory(nullptr);
  const int head_dim = static_cast<int>(shape.head_dim);
  Tiles(memory, head_dim);
  for (int i = 0; i < more; ++i) memory.tile<float>(kSide, head_dim);
  return memory.bytes();
}

}  // namespace

template <>
void device_attention<float>(const AttentionShape& shape, DeviceMatrix<const float> qkv,
                             DeviceMatrix<float> out, float* statistics, const CudaStream& stream) {
  const float scale = checked_scale(shape);
  launch("attention", stream,
         {blocks_of_tiles(shape, kSide, shape.heads), kThreads, shared_bytes<ForwardTiles>(shape, 0)},
         attention_kernel, shape, scale, qkv.data, out.data, statistics);
}

template <>
void device_attention_backward<float>(const AttentionShape& shape, DeviceMatrix<const float> qkv,
                                      DeviceMatrix<const float> out, DeviceMatrix<const float> d_out,
                                      const float* statistics, float* row_products, DeviceMatrix<float> d_qkv,
                                      const CudaStream& stream) {
  const float scale = checked_scale(shape);
  launch_row_products(shape, out.data, d_out.data, row_products, stream);
  launch("attention_backward, queries", stream,
         {blocks_of_tiles(shape, kSide, shape.heads), kThreads, shared_bytes<ScoreTiles>(shape, 1)},
         query_gradient_kernel, shape, scale, qkv.data, d_out.data, statistics, row_products, d_qkv.data);
  launch("attention_backward, keys and values", stream,
         {blocks_of_tiles(shape, kSide, shape.kv_heads), kThreads, shared_bytes<ScoreTiles>(shape, 2)},
         key_gradient_kernel, shape, scale, qkv.data, d_out.data, statistics, row_products, d_qkv.data);
}

}  // namespace lowband
