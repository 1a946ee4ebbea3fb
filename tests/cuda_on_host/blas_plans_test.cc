// Which algorithm a product takes, where several are there.
#include "runtime/cuda/blas.h"
#include "runtime/cuda/buffer.h"
#include "tests/cuda_on_host/algorithms.h"

#include <chrono>
#include <vector>

#include <gtest/gtest.h>

namespace lowband {
namespace {

// C <- C + A B, in place, of A = B = 1: the result says how often it ran.
std::vector<float> accumulated(CudaBlas& blas, int times) {
  DeviceBuffer<float> a(6, blas.stream()), c(4, blas.stream());
  a.fill_from(std::vector<float>(6, 1));
  c.fill_from(std::vector<float>(4, 0));
  for (int i = 0; i < times; ++i) {
    const auto sum = c.matrix(0, 2, 2);
    blas.gemm<float, float>(Op::kNone, Op::kNone, 1, a.matrix(0, 2, 3), a.matrix(0, 3, 2), 1, sum, sum);
  }
  std::vector<float> host(4);
  c.copy_to(host);
  return host;
}

TEST(BlasPlans, AMeasuredPlanIsTheFastestAlgorithmAndRunsOnceOnItsOperands) {
  const CudaStream stream;
  for (const int fast : {2, 1}) {
    cuda_on_host::slow_down_algorithms_but(fast, std::chrono::milliseconds(3));
    CudaBlas blas(stream, PlanChoice::kMeasured);
    EXPECT_EQ(accumulated(blas, 2), std::vector<float>(4, 6));
    EXPECT_EQ(cuda_on_host::algorithm_of_last_product(), fast);
    EXPECT_EQ(blas.plans(), 1);
  }
  cuda_on_host::slow_down_algorithms_but(0, {});
}

TEST(BlasPlans, OtherwiseItIsTheHeuristicsFirstWhateverItsTime) {
  const CudaStream stream;
  cuda_on_host::slow_down_algorithms_but(2, std::chrono::milliseconds(1));
  CudaBlas blas(stream);
  accumulated(blas, 1);
  EXPECT_EQ(cuda_on_host::algorithm_of_last_product(), 0);
  // One that shares its handle has plans of its own.
  CudaBlas measured(blas, PlanChoice::kMeasured);
  accumulated(measured, 1);
  EXPECT_EQ(cuda_on_host::algorithm_of_last_product(), 2);
  accumulated(blas, 1);
  EXPECT_EQ(cuda_on_host::algorithm_of_last_product(), 0);
  cuda_on_host::slow_down_algorithms_but(0, {});
}

}  // namespace
}  // namespace lowband
