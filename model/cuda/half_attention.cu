#include "model/cuda/attention.h"
#include "model/cuda/heads.cuh"
#include "model/cuda/tensor_core.cuh"

#include <cmath>

#include <cuda_pipeline.h>

namespace lowband {
namespace {

// Attention of bf16. A block of four warps has a tile of 64 rows, each warp 16 of them, and meets tiles of 64
// other rows. What products sum up stays in registers, and so do softmax weights: the sums of one product,
// rounded, are the left factor of the next (C and A of tensor_core.cuh have the same owners). Shared memory
// holds bf16 alone, the next tile arrives while the present one is used.
constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kRows = 16 * kWarps;  // of a tile

constexpr float kLog2E = 1.44269504F;

// Rows of kDim columns and 16 bytes more: eight consecutive rows of 16 bytes are in different banks.
template <int kDim>
struct HalfTile {
  static constexpr int kStride = kDim + 8;
  static constexpr Index kBytes = Index{kRows} * kStride * 2;
  __device__ BFloat16* at(int i, int j) const { return data + i * kStride + j; }
  BFloat16* data;
};
template <int kDim>
__device__ HalfTile<kDim> half_tile(int which) {
  return {dynamic_shared<BFloat16>() + which * (HalfTile<kDim>::kBytes / 2)};
}

// Begins to copy the rows [begin, begin + kRows) of a head; zeros behind the end of the sequence and of the
// head.
template <int kDim>
__device__ void fetch(const AttentionShape& shape, const HeadRows<const BFloat16>& from, Index begin,
                      HalfTile<kDim> to) {
  constexpr int kPieces = kDim / 8;
  for (int e = static_cast<int>(threadIdx.x); e < kRows * kPieces; e += kThreads) {
    const int i = e / kPieces, j = e % kPieces * 8;
    if (begin + i < shape.sequence && j < shape.head_dim) {
      __pipeline_memcpy_async(to.at(i, j), from.data + (begin + i) * from.stride + j, 16);
    } else {
      __pipeline_memcpy_async(to.at(i, j), from.data, 16, 16);
    }
  }
}

// A of (16, 16 kSteps) and C of (16, 8 kTiles), see tensor_core.cuh.
template <int kSteps>
struct LeftFactor {
  std::uint32_t x[kSteps][4];
};
template <int kTiles>
struct Sums {
  float x[kTiles][4];
};

__device__ int lane_of_warp() { return static_cast<int>(threadIdx.x) % kWarp; }

// Rows [row, row + 16) of a tile.
template <int kDim>
__device__ LeftFactor<kDim / 16> left_factor(HalfTile<kDim> tile, int row) {
  LeftFactor<kDim / 16> a;
  const int lane = lane_of_warp();
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k)
    load_four_8x8<false>(a.x[k], tile.at(row + lane % 16, 16 * k + lane / 16 * 8));
  return a;
}

template <int kTiles>
__device__ LeftFactor<kTiles / 2> rounded(const Sums<kTiles>& c) {
  LeftFactor<kTiles / 2> a;
#pragma unroll
  for (int k = 0; k < kTiles / 2; ++k) {
    a.x[k][0] = packed(c.x[2 * k][0], c.x[2 * k][1]);
    a.x[k][1] = packed(c.x[2 * k][2], c.x[2 * k][3]);
    a.x[k][2] = packed(c.x[2 * k + 1][0], c.x[2 * k + 1][1]);
    a.x[k][3] = packed(c.x[2 * k + 1][2], c.x[2 * k + 1][3]);
  }
  return a;
}

// A B^T, B the rows [row, row + 8 kTiles) of a tile.
template <int kTiles, int kDim>
__device__ Sums<kTiles> by_transposed(const LeftFactor<kDim / 16>& a, HalfTile<kDim> tile, int row) {
  Sums<kTiles> c{};
  const int lane = lane_of_warp(), i = row + lane / 16 * 8 + lane % 8, j = lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      std::uint32_t b[4];
      load_four_8x8<false>(b, tile.at(8 * n + i, 16 * k + j));
      mma_16x8x16(c.x[n], a.x[k], b[0], b[1]);
      mma_16x8x16(c.x[n + 1], a.x[k], b[2], b[3]);
    }
  }
  return c;
}

// C <- C + A B, B the rows [row, row + 16 kSteps) of a tile.
template <int kSteps, int kDim>
__device__ void add_product(Sums<kDim / 8>& c, const LeftFactor<kSteps>& a, HalfTile<kDim> tile, int row) {
  const int lane = lane_of_warp(), i = row + lane % 16, j = lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int n = 0; n < kDim / 8; n += 2) {
      std::uint32_t b[4];
      load_four_8x8<true>(b, tile.at(16 * k + i, 8 * n + j));
      mma_16x8x16(c.x[n], a.x[k], b[0], b[1]);
      mma_16x8x16(c.x[n + 1], a.x[k], b[2], b[3]);
    }
  }
}

// factor[0] times the own half rows g, factor[1] times the rows g + 8, to rows from `begin` of a head.
template <int kDim>
__device__ void store(const AttentionShape& shape, const Sums<kDim / 8>& c, const float (&factor)[2],
                      Index begin, const HeadRows<BFloat16>& to) {
  const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Index row = begin + g + 8 * half;
    if (row >= shape.sequence) continue;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      if (8 * n >= shape.head_dim) continue;
      const std::uint32_t pair = packed(factor[half] * c.x[n][2 * half], factor[half] * c.x[n][2 * half + 1]);
      *reinterpret_cast<std::uint32_t*>(to.data + row * to.stride + 8 * n + 2 * t) = pair;
    }
  }
}

// Over the four lanes that have a row.
__device__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0U, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0U, x, 2));
}
__device__ float row_sum(float x) {
  x += __shfl_xor_sync(~0U, x, 1);
  return x + __shfl_xor_sync(~0U, x, 2);
}

// Block (query tile, head, sequence). For every tile of keys up to the diagonal:
//   S <- Q K^T,  m' = max(m, rowmax(S)),  P = exp(scale (S - m')),
//   l <- l exp(scale (m - m')) + rowsum(P),  O <- O exp(scale (m - m')) + P V;  in the end O / l.
// Tiles: Q; K and V, twice.
template <int kDim>
__global__ void __launch_bounds__(kThreads, 2)
    half_attention_kernel(AttentionShape shape, float scale, const BFloat16* qkv, BFloat16* out,
                          float* statistics) {
  const Index tile = Index{gridDim.x - 1 - blockIdx.x}, begin = tile * kRows;  // the longest rows first
  const Index head = blockIdx.y, sequence = blockIdx.z, kv_head = head / (shape.heads / shape.kv_heads);
  const Heads<const BFloat16> in{shape, qkv, shape.qkv_cols(), sequence};
  const int lane = lane_of_warp(), warp = static_cast<int>(threadIdx.x) / kWarp;
  const int row = 16 * warp + lane / 4, col = lane % 4 * 2;  // row and row + 8; col and col + 1 of every 8
  const float rate = scale * kLog2E;
  const auto fetch_keys = [&](Index t) {
    const int which = 1 + static_cast<int>(t % 2) * 2;
    fetch(shape, in.key(kv_head), t * kRows, half_tile<kDim>(which));
    fetch(shape, in.value(kv_head), t * kRows, half_tile<kDim>(which + 1));
    __pipeline_commit();
  };

  fetch(shape, in.query(head), begin, half_tile<kDim>(0));
  fetch_keys(0);
  __pipeline_wait_prior(0);
  __syncthreads();
  const LeftFactor<kDim / 16> q = left_factor(half_tile<kDim>(0), 16 * warp);
  Sums<kDim / 8> o{};
  float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  for (Index t = 0; t <= tile; ++t) {
    __pipeline_wait_prior(0);
    __syncthreads();  // tile t is there, for everyone, and everyone is done with tile t - 1
    if (t < tile) fetch_keys(t + 1);
    const int which = 1 + static_cast<int>(t % 2) * 2;
    Sums<kRows / 8> s = by_transposed<kRows / 8>(q, half_tile<kDim>(which), 0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float found = largest[half];
#pragma unroll
      for (int e = 0; e < kRows / 4; ++e) {
        float& score = s.x[e / 2][2 * half + e % 2];
        if (t == tile && e / 2 * 8 + col + e % 2 > row + 8 * half) score = -INFINITY;
        found = fmaxf(found, score);
      }
      found = row_max(found);
      const float factor = exp2f(rate * (largest[half] - found)), shift = rate * found;
      sum[half] *= factor;
#pragma unroll
      for (int e = 0; e < kRows / 4; ++e) {
        float& weight = s.x[e / 2][2 * half + e % 2];
        weight = exp2f(fmaf(rate, weight, -shift));
        sum[half] += weight;
      }
#pragma unroll
      for (int e = 0; e < kDim / 4; ++e) o.x[e / 2][2 * half + e % 2] *= factor;
      largest[half] = found;
    }
    add_product(o, rounded(s), half_tile<kDim>(which + 1), 0);
  }

  const float inverse[2] = {1 / row_sum(sum[0]), 1 / row_sum(sum[1])};
  store<kDim>(shape, o, inverse, begin + 16 * warp,
              Heads<BFloat16>{shape, out, shape.query_cols(), sequence}.query(head));
  for (int half = 0; half < 2; ++half) {
    const Index query = begin + row + 8 * half;
    if (query >= shape.sequence || lane % 4 != 0) continue;
    float* const own = statistics + ((sequence * shape.heads + head) * shape.sequence + query) * 2;
    own[0] = scale * largest[half];
    own[1] = inverse[half];
  }
}

// What backward knows of a query: P = exp2(rate S - shift) inverse, dS = scale P (dP - product).
struct QueryRow {
  float shift, inverse, product;
  __device__ float weight(float rate, float score) const {
    return inverse * exp2f(fmaf(rate, score, -shift));
  }
};
// Of query `t` of the head whose numbers begin here; behind the end of the sequence no weight at all.
__device__ QueryRow query_row(const AttentionShape& shape, const float* statistics, const float* row_products,
                              Index t) {
  if (t >= shape.sequence) return {0, 0, 0};
  return {statistics[2 * t] * kLog2E, statistics[2 * t + 1], row_products[t]};
}

// Block (query tile, head, sequence): dQ <- sum over tiles of keys of dS K. Tiles: Q, dO; K and V, twice.
template <int kDim>
__global__ void __launch_bounds__(kThreads, 2)
    half_query_gradient_kernel(AttentionShape shape, float scale, const BFloat16* qkv, const BFloat16* d_out,
                               const float* statistics, const float* row_products, BFloat16* d_qkv) {
  constexpr int kPart = 32;  // keys whose scores are in registers at a time
  const Index tile = Index{gridDim.x - 1 - blockIdx.x}, begin = tile * kRows;
  const Index head = blockIdx.y, sequence = blockIdx.z, kv_head = head / (shape.heads / shape.kv_heads);
  const Index rows = (sequence * shape.heads + head) * shape.sequence;
  const Heads<const BFloat16> in{shape, qkv, shape.qkv_cols(), sequence};
  const int lane = lane_of_warp(), warp = static_cast<int>(threadIdx.x) / kWarp;
  const int row = 16 * warp + lane / 4, col = lane % 4 * 2;
  const float rate = scale * kLog2E;
  const auto fetch_keys = [&](Index t) {
    const int which = 2 + static_cast<int>(t % 2) * 2;
    fetch(shape, in.key(kv_head), t * kRows, half_tile<kDim>(which));
    fetch(shape, in.value(kv_head), t * kRows, half_tile<kDim>(which + 1));
    __pipeline_commit();
  };

  fetch(shape, in.query(head), begin, half_tile<kDim>(0));
  fetch(shape, Heads<const BFloat16>{shape, d_out, shape.query_cols(), sequence}.query(head), begin,
        half_tile<kDim>(1));
  fetch_keys(0);
  __pipeline_wait_prior(0);
  __syncthreads();
  const LeftFactor<kDim / 16> q = left_factor(half_tile<kDim>(0), 16 * warp);
  const LeftFactor<kDim / 16> d_o = left_factor(half_tile<kDim>(1), 16 * warp);
  const QueryRow own[2] = {query_row(shape, statistics + 2 * rows, row_products + rows, begin + row),
                           query_row(shape, statistics + 2 * rows, row_products + rows, begin + row + 8)};
  Sums<kDim / 8> d_q{};
  for (Index t = 0; t <= tile; ++t) {
    __pipeline_wait_prior(0);
    __syncthreads();  // tile t is there, for everyone, and everyone is done with tile t - 1
    if (t < tile) fetch_keys(t + 1);
    const int which = 2 + static_cast<int>(t % 2) * 2;
    for (int part = 0; part < kRows; part += kPart) {
      Sums<kPart / 8> s = by_transposed<kPart / 8>(q, half_tile<kDim>(which), part);
      const Sums<kPart / 8> d_p = by_transposed<kPart / 8>(d_o, half_tile<kDim>(which + 1), part);
#pragma unroll
      for (int e = 0; e < kPart / 2; ++e) {
        const int n = e / 4, half = e / 2 % 2, i = e % 4;
        const bool seen = t < tile || part + 8 * n + col + i % 2 <= row + 8 * half;
        const float weight = seen ? own[half].weight(rate, s.x[n][i]) : 0;
        s.x[n][i] = scale * weight * (d_p.x[n][i] - own[half].product);
      }
      add_product(d_q, rounded(s), half_tile<kDim>(which), part);
    }
  }
  const float one[2] = {1, 1};
  store<kDim>(shape, d_q, one, begin + 16 * warp,
              Heads<BFloat16>{shape, d_qkv, shape.qkv_cols(), sequence}.query(head));
}

// Block (key tile, key and value head, sequence): over the group's heads and the tiles of queries that see
// it,
//   dV <- sum of P^T dO,  dK <- sum of dS^T Q,
// from S^T = K Q^T and dP^T = V dO^T, whose rows are keys. Tiles: K, V; Q and dO, twice. Behind them a
// QueryRow of every query, twice.
template <int kDim>
__global__ void __launch_bounds__(kThreads, 2)
    half_key_gradient_kernel(AttentionShape shape, float scale, const BFloat16* qkv, const BFloat16* d_out,
                             const float* statistics, const float* row_products, BFloat16* d_qkv) {
  constexpr int kPart = 16;  // queries whose scores are in registers at a time
  const Index keys = Index{blockIdx.x} * kRows, kv_head = blockIdx.y, sequence = blockIdx.z;
  const Index group = shape.heads / shape.kv_heads;
  const Index tiles = (shape.sequence - keys + kRows - 1) / kRows;
  const Heads<const BFloat16> in{shape, qkv, shape.qkv_cols(), sequence};
  const Heads<const BFloat16> d_result{shape, d_out, shape.query_cols(), sequence};
  const int lane = lane_of_warp(), warp = static_cast<int>(threadIdx.x) / kWarp;
  const int row = 16 * warp + lane / 4, col = lane % 4 * 2;
  const float rate = scale * kLog2E;
  auto* const query_rows = reinterpret_cast<QueryRow*>(half_tile<kDim>(6).data);
  // Turn i is tile i % tiles of queries of the group's head i / tiles.
  const auto fetch_queries = [&](Index i) {
    const int which = 2 + static_cast<int>(i % 2) * 2;
    const Index head = kv_head * group + i / tiles, begin = keys + i % tiles * kRows;
    const Index rows = (sequence * shape.heads + head) * shape.sequence;
    fetch(shape, in.query(head), begin, half_tile<kDim>(which));
    fetch(shape, d_result.query(head), begin, half_tile<kDim>(which + 1));
    __pipeline_commit();
    for (int t = static_cast<int>(threadIdx.x); t < kRows; t += kThreads)
      query_rows[i % 2 * kRows + t] = query_row(shape, statistics + 2 * rows, row_products + rows, begin + t);
  };

  fetch(shape, in.key(kv_head), keys, half_tile<kDim>(0));
  fetch(shape, in.value(kv_head), keys, half_tile<kDim>(1));
  fetch_queries(0);
  __pipeline_wait_prior(0);
  __syncthreads();
  const LeftFactor<kDim / 16> k = left_factor(half_tile<kDim>(0), 16 * warp);
  const LeftFactor<kDim / 16> v = left_factor(half_tile<kDim>(1), 16 * warp);
  Sums<kDim / 8> d_k{}, d_v{};
  for (Index turn = 0; turn < group * tiles; ++turn) {
    __pipeline_wait_prior(0);
    __syncthreads();  // the queries of this turn are there, and everyone is done with those of the last
    if (turn + 1 < group * tiles) fetch_queries(turn + 1);
    const int which = 2 + static_cast<int>(turn % 2) * 2;
    const bool on_diagonal = turn % tiles == 0;
    for (int part = 0; part < kRows; part += kPart) {
      Sums<kPart / 8> s = by_transposed<kPart / 8>(k, half_tile<kDim>(which), part);
      Sums<kPart / 8> d_p = by_transposed<kPart / 8>(v, half_tile<kDim>(which + 1), part);
#pragma unroll
      for (int e = 0; e < kPart / 2; ++e) {
        const int n = e / 4, half = e / 2 % 2, i = e % 4, query = part + 8 * n + col + i % 2;
        const QueryRow of_query = query_rows[turn % 2 * kRows + query];
        const bool seen = !on_diagonal || row + 8 * half <= query;
        const float weight = seen ? of_query.weight(rate, s.x[n][i]) : 0;
        s.x[n][i] = weight;
        d_p.x[n][i] = scale * weight * (d_p.x[n][i] - of_query.product);
      }
      add_product(d_v, rounded(s), half_tile<kDim>(which + 1), part);
      add_product(d_k, rounded(d_p), half_tile<kDim>(which), part);
    }
  }
  const Heads<BFloat16> d_in{shape, d_qkv, shape.qkv_cols(), sequence};
  const float one[2] = {1, 1};
  store<kDim>(shape, d_k, one, keys + 16 * warp, d_in.key(kv_head));
  store<kDim>(shape, d_v, one, keys + 16 * warp, d_in.value(kv_head));
}

// work(the next of 32, 64, 128 columns)
template <class Work>
void for_columns(Index head_dim, const Work& work) {
  if (head_dim <= 32) return work(std::integral_constant<int, 32>{});
  if (head_dim <= 64) return work(std::integral_constant<int, 64>{});
  work(std::integral_constant<int, 128>{});
}

}  // namespace

template <>
void device_attention<BFloat16>(const AttentionShape& shape, DeviceMatrix<const BFloat16> qkv,
                                DeviceMatrix<BFloat16> out, float* statistics, const CudaStream& stream) {
  const float scale = checked_scale(shape);
  for_columns(shape.head_dim, [&](auto cols) {
    constexpr int kDim = decltype(cols)::value;
    launch("attention", stream,
           {blocks_of_tiles(shape, kRows, shape.heads), kThreads, 5 * HalfTile<kDim>::kBytes},
           half_attention_kernel<kDim>, shape, scale, qkv.data, out.data, statistics);
  });
}

template <>
void device_attention_backward<BFloat16>(const AttentionShape& shape, DeviceMatrix<const BFloat16> qkv,
                                         DeviceMatrix<const BFloat16> out, DeviceMatrix<const BFloat16> d_out,
                                         const float* statistics, float* row_products,
                                         DeviceMatrix<BFloat16> d_qkv, const CudaStream& stream) {
  const float scale = checked_scale(shape);
  launch_row_products(shape, out.data, d_out.data, row_products, stream);
  for_columns(shape.head_dim, [&](auto cols) {
    constexpr int kDim = decltype(cols)::value;
    constexpr Index kTiles = 6 * HalfTile<kDim>::kBytes, kQueryRows = 2 * kRows * Index{sizeof(QueryRow)};
    launch("attention_backward, queries", stream,
           {blocks_of_tiles(shape, kRows, shape.heads), kThreads, kTiles}, half_query_gradient_kernel<kDim>,
           shape, scale, qkv.data, d_out.data, statistics, row_products, d_qkv.data);
    launch("attention_backward, keys and values", stream,
           {blocks_of_tiles(shape, kRows, shape.kv_heads), kThreads, kTiles + kQueryRows},
           half_key_gradient_kernel<kDim>, shape, scale, qkv.data, d_out.data, statistics, row_products,
           d_qkv.data);
  });
}

}  // namespace lowband
