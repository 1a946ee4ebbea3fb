// Tests that need a real device, and say so where there is none.
#include "runtime/device.h"

#include <cstdio>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

int main(int argc, char** argv) {
  const lowband::CudaStatus cuda = lowband::cuda_status();
  if (cuda.devices.empty()) {
    std::printf("skipped: %s\n", cuda.reason.c_str());
    return 77;
  }
  testing::InitGoogleMock(&argc, argv);
  return RUN_ALL_TESTS();
}
