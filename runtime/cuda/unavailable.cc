#include "runtime/device.h"

namespace lowband {

CudaStatus cuda_status() {
  CudaStatus status;
  status.reason = "built without CUDA (needs nvcc, the CUDA runtime and cuBLAS at configure time)";
  return status;
}

}  // namespace lowband
