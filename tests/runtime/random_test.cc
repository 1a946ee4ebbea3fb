#include "runtime/random.h"

#include <cmath>

#include <gtest/gtest.h>

namespace lowband {
namespace {

// Known answers published with Random123 (kat_vectors, philox4x32 with 10 rounds).
TEST(Philox, KnownAnswers) {
  using Words = std::array<std::uint32_t, 4>;
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  constexpr std::uint32_t kOnes = 0xffffffff;
  EXPECT_EQ(philox4x32({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(RandomStream, DependsOnSeedNameStepAndIndexOnly) {
  const RandomStream a(1, "layer.0", 5), same(1, "layer.0", 5);
  EXPECT_EQ(a.bits(7), same.bits(7));
  EXPECT_NE(a.bits(7), a.bits(8));
  EXPECT_NE(a.bits(7), RandomStream(2, "layer.0", 5).bits(7));
  EXPECT_NE(a.bits(7), RandomStream(1, "layer.1", 5).bits(7));
  EXPECT_NE(a.bits(7), RandomStream(1, "layer.0", 6).bits(7));
}

TEST(RandomStream, NormalHasTheRightMoments) {
  // 40,000 draws: the mean's standard error is 0.005, the variance's 0.0071, the fourth moment's 0.049. 5
  // sigma.
  constexpr Index kDraws = 40000;
  const RandomStream stream(3, "moments");
  double mean = 0, square = 0, fourth = 0;
  for (Index i = 0; i < kDraws; ++i) {
    const double x = stream.normal(i);
    mean += x;
    square += x * x;
    fourth += x * x * x * x;
  }
  EXPECT_NEAR(mean / kDraws, 0, 0.025);
  EXPECT_NEAR(square / kDraws, 1, 0.036);
  EXPECT_NEAR(fourth / kDraws, 3, 0.25);
}

TEST(RandomStream, UniformStaysInTheHalfOpenInterval) {
  const RandomStream stream(4, "uniform");
  double lowest = 1, highest = 0;
  for (Index i = 0; i < 10000; ++i) {
    const double u = stream.uniform(i);
    lowest = std::min(lowest, u);
    highest = std::max(highest, u);
  }
  EXPECT_GE(lowest, 0);
  EXPECT_LT(highest, 1);
  EXPECT_LT(lowest, 0.002);
  EXPECT_GT(highest, 0.998);
}

}  // namespace
}  // namespace lowband
