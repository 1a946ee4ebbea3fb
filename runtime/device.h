#pragma once

#include <string>
#include <vector>

namespace lowband {

/// One CUDA device as the driver describes it.
struct CudaDevice {
  std::string name;
  std::string compute_capability;  // "9.0"
  double memory_gib = 0;
};

/// What the CUDA side of this binary found. Never throws: a missing driver is a fact to report, not an error.
struct CudaStatus {
  bool built_in = false;
  std::string toolkit_version;  // of cudart at build time, empty when not built in
  std::string cublas_version;   // empty when not built in
  std::string reason;           // why `devices` is empty, one sentence
  std::vector<CudaDevice> devices;
};
CudaStatus cuda_status();

}  // namespace lowband
