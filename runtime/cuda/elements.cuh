#pragma once

#include "runtime/bfloat16.h"
#include "runtime/cuda/launch.cuh"
#include "runtime/types.h"

#include <algorithm>
#include <type_traits>

namespace lowband {

// What kernels share that go over elements: thread i of a launch takes the elements i, i + threads, ...

inline constexpr int kWarp = 32;
inline constexpr int kElementThreads = 256;

/// Four elements a thread and more blocks than any device holds at once; beyond that threads go round.
inline unsigned blocks_for(Index elements) {
  constexpr Index kElementsPerBlock = 4 * kElementThreads, kMostBlocks = 16'384;
  return static_cast<unsigned>(
      std::clamp<Index>((elements + kElementsPerBlock - 1) / kElementsPerBlock, 1, kMostBlocks));
}

__device__ inline Index first_element() { return Index{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ inline Index element_stride() { return Index{gridDim.x} * blockDim.x; }

/// bf16 as float, other types as they are; and back, rounded as by `to_bfloat16`.
template <class T>
__device__ auto widened(T x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return to_float(x);
  } else {
    return x;
  }
}
template <class To, class T>
__device__ To narrowed(T x) {
  if constexpr (std::is_same_v<To, BFloat16>) {
    return to_bfloat16(x);
  } else {
    return x;
  }
}

template <class T>
__device__ T warp_sum(T x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(~0U, x, distance);
  return x;
}
__device__ inline float warp_max(float x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(~0U, x, distance));
  return x;
}

/// The sum over the kElementThreads threads of a block, for all of them; a fixed tree. T: float, double.
template <class T>
__device__ T block_sum(T x) {
  __shared__ T of_warp[kElementThreads / kWarp];
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  T sum = 0;
  for (const T part : of_warp) sum += part;
  __syncthreads();  // everyone has read the parts
  return sum;
}

}  // namespace lowband
