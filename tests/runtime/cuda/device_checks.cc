#include "tests/runtime/cuda/device_checks.h"

#include "runtime/device.h"

#include <cstdio>
#include <exception>

namespace lowband::test {

const Index kManyElements = 20'000'003;

int run_device_checks(std::span<const DeviceCheck> checks) {
  const CudaStatus status = cuda_status();
  if (status.devices.empty()) {
    std::printf("skipped %zu checks: no CUDA device: %s\n", checks.size(), status.reason.c_str());
    return 77;
  }
  std::printf("device 0: %s, sm %s\n", status.devices.front().name.c_str(),
              status.devices.front().compute_capability.c_str());
  int failures = 0;
  for (const DeviceCheck& check : checks) {
    try {
      const CudaStream stream;
      check.body(stream);
      stream.synchronize();
      std::printf("passed  %s\n", check.name);
    } catch (const std::exception& failure) {
      ++failures;
      std::printf("FAILED  %s: %s\n", check.name, failure.what());
    }
    std::fflush(stdout);
  }
  std::printf("%d of %zu checks failed\n", failures, checks.size());
  return failures == 0 ? 0 : 1;
}

}  // namespace lowband::test
