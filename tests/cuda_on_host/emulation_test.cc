// What running device code on the host finds: each kernel here has one defect.
#include "model/cuda/tensor_core.cuh"
#include "runtime/cuda/buffer.h"
#include "runtime/cuda/elements.cuh"
#include "tests/cuda_on_host/block.h"
#include "tests/runtime/cuda/device_checks.h"

#include <bit>
#include <set>
#include <string>

#include <cuda_pipeline.h>
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

// Copies 256 floats to shared memory while its threads wait for nothing, or for all but one batch, or for
// all.
template <bool kWait, int kBut>
__global__ void fetch_kernel(const float* x, float* y) {
  float* const shared = dynamic_shared<float>();
  if (threadIdx.x < 64) __pipeline_memcpy_async(shared + 4 * threadIdx.x, x + 4 * threadIdx.x, 16);
  __pipeline_commit();
  if (kWait) __pipeline_wait_prior(kBut);
  __syncthreads();
  y[threadIdx.x] = shared[threadIdx.x];
}
__global__ void misaligned_fetch_kernel(float* y) {
  __pipeline_memcpy_async(dynamic_shared<float>() + 1, y, 16);
}

// C <- A B of (16, 16), (16, 8) by one warp, elements by the tables of "mma.m16n8k16" in the PTX ISA: a lane
// has a_i for i < 8, b_i and c_i for i < 4.
__global__ void product_kernel(const BFloat16* a, const BFloat16* b, float* c) {
  const unsigned group = threadIdx.x / 4, in_group = threadIdx.x % 4;
  std::uint32_t words_a[4] = {}, words_b[2] = {};
  for (unsigned i = 0; i < 8; ++i) {
    const unsigned row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
    const unsigned col = i < 4 ? 2 * in_group + (i & 1) : 2 * in_group + (i & 1) + 8;
    words_a[i / 2] |= std::uint32_t{a[row * 16 + col].bits} << i % 2 * 16;
  }
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = i < 2 ? 2 * in_group + (i & 1) : 2 * in_group + (i & 1) + 8;
    words_b[i / 2] |= std::uint32_t{b[row * 8 + group].bits} << i % 2 * 16;
  }
  float sums[4] = {1, 2, 3, 4};
  mma_16x8x16(sums, words_a, words_b[0], words_b[1]);
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = i < 2 ? group : group + 8, col = 2 * in_group + (i & 1);
    c[row * 8 + col] = sums[i] - static_cast<float>(i + 1);
  }
}

// The four matrices of 8 x 8 of x (16, 16), row by row of blocks, as lanes receive them.
template <bool kTransposed>
__global__ void load_kernel(const BFloat16* x, std::uint32_t* words) {
  auto* const shared = dynamic_shared<BFloat16>();
  for (unsigned e = threadIdx.x; e < 256; e += 32) shared[e] = x[e];
  __syncthreads();
  const unsigned matrix = threadIdx.x / 8, row = threadIdx.x % 8;
  std::uint32_t loaded[4];
  load_four_8x8<kTransposed>(loaded, shared + (matrix / 2 * 8 + row) * 16 + matrix % 2 * 8);
  for (unsigned i = 0; i < 4; ++i) words[threadIdx.x * 4 + i] = loaded[i];
}

__global__ void greedy_kernel(float* y) { y[threadIdx.x] = 1; }

struct Emulation : testing::Test {
  void TearDown() override { cuda_on_host::set_order(Order::kForward); }

  // How many different results the three orders give.
  std::size_t results(void (*kernel)(const float*, float*), Index shared_bytes = 0) const {
    std::set<std::vector<std::uint32_t>> found;
    for (const Order order : {Order::kForward, Order::kBackward, Order::kShuffled}) {
      cuda_on_host::set_order(order);
      const auto x = test::on_device(test::noise(256, 1), stream);
      DeviceBuffer<float> y(256, stream);
      launch("reverse", stream, {1, 256, shared_bytes}, kernel, x.data(), y.data());
      std::vector<std::uint32_t> bits;  // a NaN is equal to itself
      for (const float value : test::on_host(y)) bits.push_back(std::bit_cast<std::uint32_t>(value));
      found.insert(bits);
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

TEST_F(Emulation, AMissingWaitForACopyGivesOtherBits) {
  EXPECT_EQ((results(fetch_kernel<true, 0>, 1024)), 1U);
  EXPECT_GT((results(fetch_kernel<true, 1>, 1024)), 1U);
  EXPECT_GT((results(fetch_kernel<false, 0>, 1024)), 1U);
}

TEST_F(Emulation, AMisalignedCopyIsAnError) {
  EXPECT_NE(complaint(misaligned_fetch_kernel, 1024).find("a misaligned copy at"), std::string::npos);
}

TEST_F(Emulation, TensorCoresHaveTheFragmentsOfTheirManual) {
  const auto a = test::as<BFloat16>(test::noise(256, 1)), b = test::as<BFloat16>(test::noise(128, 2));
  const auto device_a = test::on_device(a, stream), device_b = test::on_device(b, stream);
  DeviceBuffer<float> c(128, stream);
  launch("product", stream, {1, 32}, product_kernel, device_a.data(), device_b.data(), c.data());
  const std::vector<float> found = test::on_host(c);
  for (std::size_t i = 0; i < 16; ++i) {
    for (std::size_t j = 0; j < 8; ++j) {
      double sum = 0;
      for (std::size_t k = 0; k < 16; ++k) sum += test::number(a[i * 16 + k]) * test::number(b[k * 8 + j]);
      EXPECT_NEAR(found[i * 8 + j], sum, 16 * 16 * 0x1p-23) << i << ", " << j;  // 16 terms of at most 16
    }
  }
}

TEST_F(Emulation, MatricesAreLoadedAsFragments) {
  std::vector<BFloat16> x;
  for (std::uint16_t e = 0; e < 256; ++e) x.push_back({e});
  const auto device_x = test::on_device(x, stream);
  for (const bool transposed : {false, true}) {
    DeviceBuffer<std::uint32_t> words(128, stream);
    launch("load", stream, {1, 32, 512}, transposed ? load_kernel<true> : load_kernel<false>, device_x.data(),
           words.data());
    const std::vector<std::uint32_t> found = test::on_host(words);
    for (std::uint32_t lane = 0; lane < 32; ++lane) {
      for (std::uint32_t matrix = 0; matrix < 4; ++matrix) {
        const std::uint32_t row = lane / 4, col = lane % 4 * 2, begin = matrix / 2 * 128 + matrix % 2 * 8;
        const std::uint32_t first = begin + (transposed ? col * 16 + row : row * 16 + col);
        EXPECT_EQ(found[lane * 4 + matrix], first | (first + (transposed ? 16 : 1)) << 16) << lane;
      }
    }
  }
}

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
