#include "runtime/bfloat16.h"

#include "runtime/vector_kernels.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

namespace lowband {
namespace {

std::vector<BFloat16> all_bfloat16() {
  std::vector<BFloat16> all;
  for (int bits = 0; bits < 0x10000; ++bits) all.push_back({static_cast<std::uint16_t>(bits)});
  return all;
}

std::uint32_t bits_of(float x) { return std::bit_cast<std::uint32_t>(x); }

// What the standard says of rounding to nearest even, by distances in double; for finite x whose neighbours
// are finite.
BFloat16 nearest(float x) {
  const BFloat16 toward_zero{static_cast<std::uint16_t>(bits_of(x) >> 16)};
  const BFloat16 away{static_cast<std::uint16_t>(toward_zero.bits + 1)};
  const double below = std::fabs(static_cast<double>(x) - static_cast<double>(to_float(toward_zero)));
  const double above = std::fabs(static_cast<double>(to_float(away)) - static_cast<double>(x));
  if (below != above) return below < above ? toward_zero : away;
  return toward_zero.bits % 2 == 0 ? toward_zero : away;
}

// Every upper half with lower halves at, beside and between the points where rounding changes.
std::vector<float> hard_floats() {
  std::vector<float> all;
  for (std::uint32_t upper = 0; upper < 0x10000; ++upper) {
    for (const std::uint32_t lower : {0x0000U, 0x0001U, 0x7fffU, 0x8000U, 0x8001U, 0xffffU, 0x3a5cU})
      all.push_back(std::bit_cast<float>(upper << 16 | lower));
  }
  return all;
}

TEST(BFloat16, AllValuesSurviveTheWayThroughFloat) {
  for (const BFloat16 x : all_bfloat16()) {
    const float wide = to_float(x);
    if (std::isnan(wide)) {
      EXPECT_EQ(to_bfloat16(wide).bits, x.bits | 0x40) << x.bits;
    } else {
      EXPECT_EQ(to_bfloat16(wide), x) << x.bits;
    }
  }
  EXPECT_EQ(to_float({0x3f80}), 1.0F);
  EXPECT_EQ(to_float({0xc049}), -3.140625F);
}

TEST(BFloat16, RoundsToTheNearestAndKeepsWhatIsNotFinite) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kLargest = 0x1.fep127F;  // of bf16; its upper neighbour would be 2^128
  for (const float x : hard_floats()) {
    const BFloat16 y = to_bfloat16(x);
    if (std::isnan(x)) {
      EXPECT_TRUE(std::isnan(to_float(y))) << bits_of(x);
      EXPECT_EQ(std::signbit(to_float(y)), std::signbit(x)) << bits_of(x);
    } else if (std::fabs(x) <= kLargest) {
      EXPECT_EQ(y, nearest(x)) << x;
    } else {
      const bool nearer_to_largest = std::fabs(x) < 0x1.ffp127F;
      EXPECT_EQ(to_float(y), std::copysign(nearer_to_largest ? kLargest : kInfinity, x)) << x;
    }
  }
}

template <class Real>
class BFloat16Kernels : public testing::Test {};
using Reals = testing::Types<float, double>;
TYPED_TEST_SUITE(BFloat16Kernels, Reals);

TYPED_TEST(BFloat16Kernels, EveryInstructionSetConvertsAsTheScalarCode) {
  const std::vector<float> floats = hard_floats();
  const std::vector<TypeParam> reals(floats.begin(), floats.end());
  const std::vector<BFloat16> halves = all_bfloat16();
  for (const auto& set : runnable_vector_kernels<TypeParam>()) {
    std::vector<BFloat16> rounded(reals.size());
    set.kernels->round_to_bf16(reals.data(), rounded.data(), static_cast<Index>(reals.size()));
    for (std::size_t i = 0; i < reals.size(); ++i)
      ASSERT_EQ(rounded[i], to_bfloat16(static_cast<float>(reals[i]))) << set.name << ", " << reals[i];

    std::vector<TypeParam> wide(halves.size());
    set.kernels->widen_bf16(halves.data(), wide.data(), static_cast<Index>(halves.size()));
    for (std::size_t i = 0; i < halves.size(); ++i) {
      const TypeParam expected = to_float(halves[i]);
      ASSERT_EQ(std::memcmp(&wide[i], &expected, sizeof expected), 0) << set.name << ", " << halves[i].bits;
    }
  }
}

TYPED_TEST(BFloat16Kernels, TouchExactlyTheirElements) {
  for (const auto& set : runnable_vector_kernels<TypeParam>()) {
    for (Index n = 0; n < 70; ++n) {
      std::vector<TypeParam> x, back(static_cast<std::size_t>(n) + 2, TypeParam{-7});
      for (Index i = 0; i < n; ++i) x.push_back(static_cast<TypeParam>(i + 1));
      std::vector<BFloat16> y(static_cast<std::size_t>(n) + 2, BFloat16{0x1234});
      set.kernels->round_to_bf16(x.data(), y.data() + 1, n);
      set.kernels->widen_bf16(y.data() + 1, back.data() + 1, n);
      for (Index i = 0; i < n; ++i)
        ASSERT_EQ(back[static_cast<std::size_t>(i) + 1], static_cast<TypeParam>(i + 1))
            << set.name << ", " << n;
      EXPECT_EQ(y.front().bits, 0x1234);
      EXPECT_EQ(y.back().bits, 0x1234);
      EXPECT_EQ(back.front(), TypeParam{-7});
      EXPECT_EQ(back.back(), TypeParam{-7});
    }
  }
}

}  // namespace
}  // namespace lowband
