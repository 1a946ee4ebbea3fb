#include "tests/runtime/cuda/device_checks.h"

#include "runtime/device.h"

#include <cstdint>
#include <cstdio>
#include <exception>

namespace lowband::test {

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

std::vector<float> noise(Index elements, Index seed) {
  std::vector<float> numbers(static_cast<std::size_t>(elements));
  // Four terms of a Weyl sequence around zero, scrambled by the finaliser of SplitMix64.
  for (Index i = 0; i < elements; ++i) {
    std::uint64_t x = static_cast<std::uint64_t>(seed) * 0x9e3779b97f4a7c15 + static_cast<std::uint64_t>(i);
    double sum = 0;
    for (int term = 0; term < 4; ++term) {
      x += 0x9e3779b97f4a7c15;
      std::uint64_t z = x;
      z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
      z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
      z ^= z >> 31;
      sum += static_cast<double>(z >> 11) * 0x1p-53 - 0.5;
    }
    numbers[static_cast<std::size_t>(i)] = static_cast<float>(sum * 1.7);  // variance 4/12 * 1.7^2, about 1
  }
  return numbers;
}

}  // namespace lowband::test
