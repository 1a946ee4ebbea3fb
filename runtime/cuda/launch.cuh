#pragma once

#include "runtime/cuda/check.cuh"
#include "runtime/cuda/stream.h"
#include "runtime/types.h"

#include <string_view>
#include <utility>

#include <cuda_runtime.h>

namespace lowband {

struct LaunchShape {
  dim3 blocks;
  dim3 threads;
  Index shared_bytes = 0;  // of dynamic shared memory, for each block
};

/// Makes all the shared memory that a block can have available to `kernel`: without it a launch gets 48 KiB.
/// Once for each stream; always for the same amount, so that streams do not take it from one another.
template <class... Parameters>
void allow_shared_memory(std::string_view name, const CudaStream& stream, void (*kernel)(Parameters...)) {
  const void* const key = reinterpret_cast<const void*>(kernel);
  if (stream.has_shared_memory(key)) return;
  int most = 0;
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, stream.device()), name);
  cudaFuncAttributes found{};
  check_cuda(cudaFuncGetAttributes(&found, kernel), name);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  most - static_cast<int>(found.sharedSizeBytes)),
             name);
  stream.note_shared_memory(key);
}

/// Enqueues kernel(arguments...). Throws: CudaError naming `name` when it cannot be launched.
template <class... Parameters, class... Arguments>
void launch(std::string_view name, const CudaStream& stream, const LaunchShape& shape,
            void (*kernel)(Parameters...), Arguments&&... arguments) {
  stream.make_current();
  if (shape.shared_bytes > 48 * 1024) allow_shared_memory(name, stream, kernel);
  cudaLaunchConfig_t config{};
  config.gridDim = shape.blocks;
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
  config.stream = stream.handle();
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
}

/// The block's dynamic shared memory, for all types.
alignas(128) extern __shared__ unsigned char dynamic_shared_memory[];
template <class T>
__device__ T* dynamic_shared() {
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

}  // namespace lowband
