#pragma once

#include "runtime/types.h"

#include <array>
#include <cstdint>
#include <string_view>

namespace lowband {

/// Philox4x32-10: four random words that are a pure function of a 128-bit counter and a 64-bit key.
///
/// Reference: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                        std::array<std::uint32_t, 2> key);

/// The stream of random numbers of one name at one step. The value at an index depends on
/// (seed, name, step, index) and on nothing else: not on the process, the layout or the order of calls.
class RandomStream {
 public:
  RandomStream(std::uint64_t seed, std::string_view name, Index step = 0);

  /// Uniform in [0, 1) with 53 random bits.
  double uniform(Index index) const;
  /// Standard normal (Box-Muller on the words of one counter).
  double normal(Index index) const;
  /// 64 random bits.
  std::uint64_t bits(Index index) const;

 private:
  std::array<std::uint32_t, 4> words(Index index) const;
  std::array<std::uint32_t, 2> key_;
  std::uint64_t step_;
};

}  // namespace lowband
