#pragma once

#include "runtime/types.h"

#include <bit>
#include <cstdint>

namespace lowband {

/// The upper half of a float: 8 bits of exponent, 7 of mantissa. For storage and for the wire; there is no
/// arithmetic but the conversions. Arrays are converted by runtime/vector_kernels.h.
struct BFloat16 {
  std::uint16_t bits;
  bool operator==(const BFloat16&) const = default;  // of bits: -0 differs from 0, a NaN equals itself
};
static_assert(sizeof(BFloat16) == 2);

template <>
struct DTypeOf<BFloat16> {
  static constexpr DType value = DType::kBF16;
};

/// Exact.
constexpr float to_float(BFloat16 x) { return std::bit_cast<float>(std::uint32_t{x.bits} << 16); }

/// The nearest, of two equally near the even one; beyond the largest finite number an infinity. A NaN becomes
/// the quiet NaN with the upper bits of its payload.
constexpr BFloat16 to_bfloat16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  constexpr std::uint32_t kInfinity = 0x7f80'0000;
  constexpr std::uint32_t kQuiet = 0x0040'0000;
  const bool is_nan = (bits & 0x7fff'ffff) > kInfinity;
  // Just below a half, and exactly a half when the last bit that stays is 0, do not carry into it.
  const std::uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  return {static_cast<std::uint16_t>((is_nan ? bits | kQuiet : rounded) >> 16)};
}

}  // namespace lowband
