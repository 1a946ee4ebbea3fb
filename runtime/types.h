#pragma once

#include <cstdint>
#include <string_view>

namespace lowband {

/// Every extent, offset and count. Signed and 64 bits wide: a tensor of 2.5e9 elements is an ordinary tensor.
using Index = std::int64_t;

/// Element types that can be stored or sent.
enum class DType : std::uint8_t { kF32, kF64, kU8, kI64, kBF16 };

constexpr Index dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 4;
    case DType::kF64:
      return 8;
    case DType::kU8:
      return 1;
    case DType::kI64:
      return 8;
    case DType::kBF16:
      return 2;
  }
  return 0;
}

constexpr std::string_view dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kF64:
      return "f64";
    case DType::kU8:
      return "u8";
    case DType::kI64:
      return "i64";
    case DType::kBF16:
      return "bf16";
  }
  return "?";
}

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kF32;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::kF64;
};
template <>
struct DTypeOf<std::uint8_t> {
  static constexpr DType value = DType::kU8;
};
template <>
struct DTypeOf<std::int64_t> {
  static constexpr DType value = DType::kI64;
};
template <class T>
inline constexpr DType dtype_of = DTypeOf<T>::value;

}  // namespace lowband
