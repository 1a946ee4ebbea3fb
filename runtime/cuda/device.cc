#include "runtime/device.h"

#include "runtime/error.h"

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

namespace lowband {
namespace {

std::string version_text(int version) { return cat(version / 1000, ".", version % 1000 / 10); }

std::string cublas_version_text() {
  int major = 0, minor = 0, patch = 0;
  cublasGetProperty(MAJOR_VERSION, &major);
  cublasGetProperty(MINOR_VERSION, &minor);
  cublasGetProperty(PATCH_LEVEL, &patch);
  return cat(major, ".", minor, ".", patch);
}

}  // namespace

CudaStatus cuda_status() {
  CudaStatus status;
  status.built_in = true;
  status.toolkit_version = version_text(CUDART_VERSION);
  status.cublas_version = cublas_version_text();
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    status.reason = error == cudaSuccess ? "no CUDA device" : cudaGetErrorString(error);
    static_cast<void>(cudaGetLastError());  // leave no sticky error behind
    return status;
  }
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp properties{};
    if (cudaGetDeviceProperties(&properties, index) != cudaSuccess) continue;
    status.devices.push_back({properties.name, cat(properties.major, ".", properties.minor),
                              static_cast<double>(properties.totalGlobalMem) / (1024.0 * 1024.0 * 1024.0)});
  }
  return status;
}

}  // namespace lowband
