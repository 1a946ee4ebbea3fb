#pragma once

#include "runtime/error.h"

#include <string_view>

#include <cuda_runtime_api.h>

namespace lowband {

/// Throws: CudaError naming the call, the code, its name and its text. Clears CUDA's own memory of the error.
inline void check_cuda(cudaError_t code, std::string_view call) {
  if (code == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());
  throw CudaError(cat(call, ": code ", static_cast<int>(code), ", ", cudaGetErrorName(code), ": ",
                      cudaGetErrorString(code)));
}

}  // namespace lowband
