#pragma once

// CUDA's kernel language for a C++ compiler, see cuda_runtime_api.h. The threads of a block are fibers
// (block.h) that run until they wait for one another.

#include "tests/cuda_on_host/block.h"

#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>

#include <cuda_runtime_api.h>
#include <math.h>

#define __global__
#define __device__
#define __launch_bounds__(...)
// At block scope this means: one for all fibers, which run on one thread, and it may be declared `extern`.
#define __shared__ thread_local

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace lowband {
extern thread_local constinit unsigned char dynamic_shared_memory[];  // of runtime/cuda/launch.cuh
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return [&](Parameters... converted) {
    return lowband::cuda_on_host::enqueue(config->stream, [=, shape = *config] {
      return lowband::cuda_on_host::run_grid(shape.gridDim, shape.blockDim, shape.dynamicSmemBytes,
                                             reinterpret_cast<void (*)()>(kernel),
                                             [&] { kernel(converted...); });
    });
  }(std::forward<Arguments>(arguments)...);
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute /*dynamic shared memory*/,
                                 int value) {
  return lowband::cuda_on_host::allow_shared_bytes(reinterpret_cast<void (*)()>(kernel), value);
}

struct cudaFuncAttributes {
  std::size_t sharedSizeBytes;
};
/// Static shared memory is not known here.
template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (* /*kernel*/)(Parameters...)) {
  *attributes = {};
  return cudaSuccess;
}

using CallSite = std::source_location;

inline void __syncthreads(CallSite site = CallSite::current()) {
  lowband::cuda_on_host::wait_for_block(site);
}
inline void __syncwarp(unsigned mask = ~0U, CallSite site = CallSite::current()) {
  lowband::cuda_on_host::wait_for_warp(mask, site);
}

/// What the thread of `lane` gave to the same call; the mask names the lanes that take part.
template <class T>
T exchange_in_warp(unsigned mask, T value, unsigned lane, CallSite site) {
  static_assert(sizeof(T) <= lowband::cuda_on_host::kExchangeBytes && std::is_trivially_copyable_v<T>);
  std::memcpy(lowband::cuda_on_host::exchange_slot(), &value, sizeof value);
  const void* const found = lowband::cuda_on_host::exchanged(mask, lane, site);
  std::memcpy(&value, found, sizeof value);
  return value;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, CallSite site = CallSite::current()) {
  return exchange_in_warp(mask, value, static_cast<unsigned>(lane) % 32, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, CallSite site = CallSite::current()) {
  return exchange_in_warp(mask, value, lowband::cuda_on_host::own_lane() ^ static_cast<unsigned>(bits), site);
}
