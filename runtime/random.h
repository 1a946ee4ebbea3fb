#pragma once

#include "runtime/elementwise_math.h"
#include "runtime/types.h"

#include <array>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <string_view>

namespace lowband {

/// Philox4x32-10: four random words that are a pure function of a 128-bit counter and a 64-bit key.
///
/// Reference: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
LB_HOST_DEVICE inline std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                                              std::array<std::uint32_t, 2> key) {
  // Multipliers and Weyl increments of the paper's Philox4x32.
  constexpr std::uint64_t kMultiplier0 = 0xD2511F53;
  constexpr std::uint64_t kMultiplier1 = 0xCD9E8D57;
  constexpr std::uint32_t kWeyl0 = 0x9E3779B9;
  constexpr std::uint32_t kWeyl1 = 0xBB67AE85;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = kMultiplier0 * counter[0];
    const std::uint64_t product1 = kMultiplier1 * counter[2];
    counter = {static_cast<std::uint32_t>(product1 >> 32) ^ counter[1] ^ key[0],
               static_cast<std::uint32_t>(product1),
               static_cast<std::uint32_t>(product0 >> 32) ^ counter[3] ^ key[1],
               static_cast<std::uint32_t>(product0)};
    key[0] += kWeyl0;
    key[1] += kWeyl1;
  }
  return counter;
}

/// The stream of random numbers of one name at one step. The value at an index depends on
/// (seed, name, step, index) and on nothing else: not on the process, the layout or the order of calls, nor,
/// but for the rounding of logarithm and cosine, on the place that draws it.
class RandomStream {
 public:
  RandomStream(std::uint64_t seed, std::string_view name, Index step = 0);

  /// Uniform in [0, 1) with 53 random bits.
  double uniform(Index index) const;
  /// Standard normal (Box-Muller on the words of one counter).
  LB_HOST_DEVICE double normal(Index index) const {
    using std::cos, std::log, std::sqrt;
    const auto w = words(index);
    // 1 - u lies in (0, 1], so the logarithm is finite.
    const double radius = sqrt(-2.0 * log(1.0 - unit_interval(w[0], w[1])));
    return radius * cos(2.0 * std::numbers::pi * unit_interval(w[2], w[3]));
  }
  /// 64 random bits.
  std::uint64_t bits(Index index) const;

 private:
  LB_HOST_DEVICE static double unit_interval(std::uint32_t high, std::uint32_t low) {
    const std::uint64_t bits = (static_cast<std::uint64_t>(high) << 32 | low) >> 11;
    return static_cast<double>(bits) * 0x1p-53;
  }
  LB_HOST_DEVICE std::array<std::uint32_t, 4> words(Index index) const {
    const auto i = static_cast<std::uint64_t>(index);
    return philox4x32({static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(i >> 32),
                       static_cast<std::uint32_t>(step_), static_cast<std::uint32_t>(step_ >> 32)},
                      key_);
  }
  std::array<std::uint32_t, 2> key_;
  std::uint64_t step_;
};

}  // namespace lowband
