#pragma once

#include "runtime/bfloat16.h"

#include <cstdint>

#include <cuda_runtime.h>

namespace lowband {

// The instructions of tensor cores for a warp, all of whose lanes call them together. A word holds two bf16,
// the first in its lower half. With g = lane / 4 and t = lane % 4 a lane has
//
//   of A (16 x 16)   a[0] = A(g, 2t ..),  a[1] = A(g + 8, 2t ..),  a[2] = A(g, 8 + 2t ..),  a[3] = A(g + 8, 8
//   + 2t ..) of B (16 x 8)    b0 = B(2t .., g),  b1 = B(8 + 2t .., g) of C (16 x 8)    c[0], c[1] = C(g, 2t
//   ..),  c[2], c[3] = C(g + 8, 2t ..)
//
// where `2t ..` are the positions 2t and 2t + 1. Tests on the host have twins of these functions.
// Reference: PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type"; "ldmatrix".

/// C <- C + A B, sums in float.
__device__ inline void mma_16x8x16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                   std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Four matrices of 8 x 8 in shared memory: lane l names the address of row l % 8 of matrix l / 8, a multiple
/// of 16 bytes. x[i] <- the elements (g, 2t ..) of matrix i; `kTransposed`: its elements (2t .., g).
template <bool kTransposed>
__device__ void load_four_8x8(std::uint32_t (&x)[4], const BFloat16* row) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  }
}

/// Both, each rounded to the nearest bf16, ties to even.
__device__ inline std::uint32_t packed(float lower, float upper) {
  std::uint32_t word = 0;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(upper), "f"(lower));
  return word;
}

}  // namespace lowband
