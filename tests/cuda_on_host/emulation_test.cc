// What running device code on the host finds: each kernel here has one defect.
#include "runtime/cuda/buffer.h"
#include "runtime/cuda/elements.cuh"
#include "tests/cuda_on_host/block.h"
#include "tests/runtime/cuda/device_checks.h"

#include <set>
#include <string>

#include <gtest/gtest.h>

namespace lowband {
namespace {

using cuda_on_host::Order;

// Thread i writes, and reads what thread 255 - i wrote.
template <bool kWithBarrier>
__global__ void reverse_kernel(const float* x, float* y) {
  __shared__ float of_thread[256];
  of_thread[threadIdx.x] = x[threadIdx.x];
  if (kWithBarrier) __syncthreads();
  y[threadIdx.x] = of_thread[255 - threadIdx.x];
}

// Twice through the same shared memory; without the second barrier a fast warp overwrites what others read.
template <bool kWithBarrier>
__global__ void reverse_twice_kernel(const float* x, float* y) {
  __shared__ float of_thread[256];
  for (int time = 0; time < 2; ++time) {
    of_thread[threadIdx.x] = (time == 0 ? x : y)[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = of_thread[255 - threadIdx.x];
    if (kWithBarrier) __syncthreads();
  }
}

__global__ void divergent_kernel(float* y) {
  if (threadIdx.x < 100) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = 1;
}

__global__ void early_end_kernel(float* y) {
  if (threadIdx.x == 77) return;
  __syncthreads();
  y[threadIdx.x] = 1;
}

__global__ void half_a_warp_kernel(float* y) {
  float x = 1;
  if (threadIdx.x % kWarp < 16) x = __shfl_xor_sync(~0U, x, 1);
  y[threadIdx.x] = x;
}

__global__ void outside_of_mask_kernel(float* y) {
  if (threadIdx.x % kWarp < 16) y[threadIdx.x] = __shfl_sync(0xffffU, 1.0F, 20);
}

__global__ void write_kernel(float* y, Index i) {
  if (threadIdx.x == 0) y[i] = 1;
}

__global__ void shared_kernel(float* y) { y[threadIdx.x] = dynamic_shared<float>()[threadIdx.x]; }

__global__ void greedy_kernel(float* y) { y[threadIdx.x] = 1; }

struct Emulation : testing::Test {
  void TearDown() override { cuda_on_host::set_order(Order::kForward); }

  // How many different results the three orders give.
  std::size_t results(void (*kernel)(const float*, float*)) const {
    std::set<std::vector<float>> found;
    for (const Order order : {Order::kForward, Order::kBackward, Order::kShuffled}) {
      cuda_on_host::set_order(order);
      const auto x = test::on_device(test::noise(256, 1), stream);
      DeviceBuffer<float> y(256, stream);
      launch("reverse", stream, {1, 256}, kernel, x.data(), y.data());
      found.insert(test::on_host(y));
    }
    return found.size();
  }
  // What the launch of a kernel says that ends badly.
  std::string complaint(void (*kernel)(float*), Index shared_bytes = 0) const {
    DeviceBuffer<float> y(256, stream);
    try {
      launch("a kernel", stream, {1, 256, shared_bytes}, kernel, y.data());
    } catch (const CudaError& error) {
      return error.what();
    }
    return "nothing";
  }

  CudaStream stream;
};

TEST_F(Emulation, AMissingBarrierGivesOtherBits) {
  EXPECT_EQ(results(reverse_kernel<true>), 1U);
  EXPECT_GT(results(reverse_kernel<false>), 1U);
}

TEST_F(Emulation, AMissingBarrierBeforeTheNextWriteGivesOtherBits) {
  EXPECT_EQ(results(reverse_twice_kernel<true>), 1U);
  EXPECT_GT(results(reverse_twice_kernel<false>), 1U);
}

TEST_F(Emulation, ThreadsAtDifferentBarriersAreAnError) {
  const std::string text = complaint(divergent_kernel);
  EXPECT_TRUE(
      text.starts_with("a kernel: code 719, cudaErrorLaunchFailure: block (0, 0, 0), thread (0, 0, 0): "
                       "waits at "))
      << text;
  EXPECT_NE(text.find("thread (100, 0, 0) at "), std::string::npos) << text;
}

TEST_F(Emulation, ABarrierThatAThreadNeverReachesIsAnError) {
  EXPECT_NE(complaint(early_end_kernel).find("thread (77, 0, 0) has ended"), std::string::npos);
}

TEST_F(Emulation, AnExchangeWithoutAllOfItsLanesIsAnError) {
  EXPECT_NE(complaint(half_a_warp_kernel).find("lanes of its mask wait elsewhere or have ended"),
            std::string::npos);
  EXPECT_NE(complaint(outside_of_mask_kernel).find("lane 20, which takes no part, is read by"),
            std::string::npos);
}

TEST_F(Emulation, MoreSharedMemoryThanThereIsIsRefused) {
  EXPECT_EQ(complaint(shared_kernel, 227 * 1024), "nothing");
  EXPECT_NE(complaint(shared_kernel, 227 * 1024 + 4).find("cudaErrorInvalidConfiguration"),
            std::string::npos);
}

TEST_F(Emulation, AKernelAsksForItsSharedMemoryOnceOnAStream) {
  const Index before = cuda_on_host::shared_memory_requests();
  for (const Index kibibytes : {100, 50, 200, 40}) complaint(shared_kernel, kibibytes * 1024);
  EXPECT_EQ(cuda_on_host::shared_memory_requests() - before, 1);
  const CudaStream other;
  DeviceBuffer<float> y(256, other);
  launch("a kernel", other, {1, 256, 64 * 1024}, shared_kernel, y.data());
  EXPECT_EQ(cuda_on_host::shared_memory_requests() - before, 2);
  EXPECT_EQ(complaint(shared_kernel, 227 * 1024), "nothing");
}

// `launch` says what a kernel needs; without that the driver allows 48 KiB.
TEST_F(Emulation, MoreSharedMemoryThanWasAskedForIsRefused) {
  DeviceBuffer<float> y(256, stream);
  for (const auto& [bytes, code] :
       {std::pair{48 * 1024, cudaSuccess}, {48 * 1024 + 4, cudaErrorInvalidConfiguration}}) {
    cudaLaunchConfig_t config{};
    config.blockDim = 256;
    config.dynamicSmemBytes = static_cast<std::size_t>(bytes);
    config.stream = stream.handle();
    EXPECT_EQ(cudaLaunchKernelEx(&config, greedy_kernel, y.data()), code) << bytes;
  }
}

// Shared memory and fresh buffers hold NaNs, not the zeros that hide a missing initialisation.
TEST_F(Emulation, SharedMemoryIsNotInitialised) {
  DeviceBuffer<float> y(256, stream);
  launch("a kernel", stream, {1, 256, 1024}, shared_kernel, y.data());
  EXPECT_TRUE(std::isnan(test::on_host(y)[200]));
}

TEST_F(Emulation, AfterAnErrorTheNextLaunchIsLikeAnyOther) {
  complaint(divergent_kernel);
  EXPECT_EQ(results(reverse_kernel<true>), 1U);
}

struct EmulationDeathTest : Emulation {
  // Libraries have threads of their own.
  EmulationDeathTest() { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
};

TEST_F(EmulationDeathTest, AWriteBesideABufferEndsTheProgram) {
  for (const Index i : {Index{1000}, Index{-1}}) {  // in a page of its own, but for three of its last floats
    EXPECT_DEATH(
        {
          DeviceBuffer<float> y(999, stream);
          launch("write", stream, {1, 32}, write_kernel, y.data(), i);
        },
        "");
  }
}

TEST_F(EmulationDeathTest, TheHostCannotTouchDeviceMemory) {
  DeviceBuffer<float> y(10, stream);
  EXPECT_DEATH(y.data()[3] = 1, "");
}

TEST_F(Emulation, ACopyBeyondABufferIsRefused) {
  DeviceBuffer<float> y(10, stream);
  const std::vector<float> x(11);
  EXPECT_THROW(cuda_copy(y.data(), x.data(), 44, stream), CudaError);
}

}  // namespace
}  // namespace lowband
