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

/// Enqueues kernel(arguments...).
/// A kernel that needs more than 48 KiB of dynamic shared memory has to say so to the driver first; it is
/// said here. Throws: CudaError naming `name` when it cannot be launched.
template <class... Parameters, class... Arguments>
void launch(std::string_view name, const CudaStream& stream, const LaunchShape& shape,
            void (*kernel)(Parameters...), Arguments&&... arguments) {
  stream.make_current();
  if (shape.shared_bytes > 48 * 1024) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shape.shared_bytes)),
               name);
  }
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
