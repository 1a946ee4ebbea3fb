#include "runtime/cpu.h"

#include "runtime/device.h"
#include "runtime/error.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

TEST(Cpu, NoSilentSlowKernelsAfterTheCure) {
  // tests/main.cc called ensure_fast_blas_kernels, so an AVX2 processor must not run SSE3 kernels.
  if (!cpu_info().avx2) GTEST_SKIP() << "no AVX2 on this processor";
  EXPECT_THAT(blas_core_name(), testing::Not(testing::AnyOf("Prescott", "Core2", "Nehalem", "generic")));
  EXPECT_NE(vector_kernel_name(), "baseline");
}

TEST(Cpu, ThreadCountIsCheckedAndKept) {
  set_compute_threads(1);
  EXPECT_EQ(compute_threads(), 1);
  EXPECT_THROW(set_compute_threads(0), InvalidArgument);
}

TEST(Device, EitherListsDevicesOrSaysWhyNot) {
  const CudaStatus status = cuda_status();
  EXPECT_EQ(status.devices.empty(), !status.reason.empty()) << status.reason;
  if (status.devices.empty()) GTEST_SKIP() << "no CUDA device: " << status.reason;
  EXPECT_GT(status.devices.front().memory_gib, 0);
}

}  // namespace
}  // namespace lowband
