#pragma once

// Of model/cuda/tensor_core.cuh, which says who has what: its functions as exchanges between the lanes.

#include "runtime/bfloat16.h"

#include <cstdint>
#include <cstring>

#include <cuda_runtime.h>

namespace lowband {

struct MatrixFragments {
  std::uint32_t a[4], b[2];
};
inline float half_of(std::uint32_t word, unsigned which) {
  return to_float({static_cast<std::uint16_t>(word >> 16 * which)});
}

inline void mma_16x8x16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                        CallSite site = CallSite::current()) {
  const MatrixFragments own{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const unsigned g = cuda_on_host::own_lane() / 4, t = cuda_on_host::own_lane() % 4;
  std::memcpy(cuda_on_host::exchange_slot(), &own, sizeof own);
  static_cast<void>(cuda_on_host::exchanged(~0U, cuda_on_host::own_lane(), site));
  const auto of_lane = [](unsigned lane) {
    return static_cast<const MatrixFragments*>(cuda_on_host::given_by(lane));
  };
  for (unsigned k = 0; k < 16; ++k) {
    const unsigned word = k / 8, owner = k % 8 / 2, half = k % 2;
    const MatrixFragments* const left = of_lane(4 * g + owner);
    const float upper_row = half_of(left->a[2 * word], half),
                lower_row = half_of(left->a[2 * word + 1], half);
    for (unsigned j = 0; j < 2; ++j) {
      const float right = half_of(of_lane(4 * (2 * t + j) + owner)->b[word], half);
      c[j] += upper_row * right;
      c[2 + j] += lower_row * right;
    }
  }
}

template <bool kTransposed>
void load_four_8x8(std::uint32_t (&x)[4], const BFloat16* row, CallSite site = CallSite::current()) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0)
    cuda_on_host::fail("a misaligned row of a matrix at", site);
  const unsigned g = cuda_on_host::own_lane() / 4, t = cuda_on_host::own_lane() % 4;
  std::memcpy(cuda_on_host::exchange_slot(), &row, sizeof row);
  static_cast<void>(cuda_on_host::exchanged(~0U, cuda_on_host::own_lane(), site));
  const auto element = [](unsigned matrix, unsigned i, unsigned j) {
    const BFloat16* begin = nullptr;
    std::memcpy(&begin, cuda_on_host::given_by(8 * matrix + i), sizeof begin);
    return std::uint32_t{begin[j].bits};
  };
  for (unsigned i = 0; i < 4; ++i) {
    x[i] = kTransposed ? element(i, 2 * t, g) | element(i, 2 * t + 1, g) << 16
                       : element(i, g, 2 * t) | element(i, g, 2 * t + 1) << 16;
  }
}

inline std::uint32_t packed(float lower, float upper) {
  return to_bfloat16(lower).bits | std::uint32_t{to_bfloat16(upper).bits} << 16;
}

}  // namespace lowband
