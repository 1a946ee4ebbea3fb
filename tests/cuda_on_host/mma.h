#pragma once

// Products of 16 x 16 x 16 by a warp, as CUDA's <mma.h> declares them. Lane l has the elements
// [8 (l % 2), 8 (l % 2) + 8) of row l / 2 of the result, and what they need of A and B. CUDA leaves open who
// has what and in which order sums are formed.

#include "runtime/bfloat16.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace nvcuda::wmma {

struct row_major {};
struct col_major {};
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
enum layout_t { mem_row_major };

template <class Use, int kM, int kN, int kK, class T, class Layout = void>
struct fragment {
  static_assert(kM == 16 && kN == 16 && kK == 16);
  float x[std::is_same_v<Use, matrix_a> ? 16 : std::is_same_v<Use, matrix_b> ? 16 * 8 : 8];
};
template <class Layout>
using FragmentA = fragment<matrix_a, 16, 16, 16, __nv_bfloat16, Layout>;
template <class Layout>
using FragmentB = fragment<matrix_b, 16, 16, 16, __nv_bfloat16, Layout>;
using Sums = fragment<accumulator, 16, 16, 16, float>;

inline unsigned own_row() { return lowband::cuda_on_host::own_lane() / 2; }
inline unsigned first_col() { return lowband::cuda_on_host::own_lane() % 2 * 8; }
inline float number(__nv_bfloat16 x) { return lowband::to_float({x.bits}); }

/// What CUDA demands: addresses of 32 bytes, rows of 16.
template <class T>
void check(const T* begin, unsigned stride, const CallSite& site) {
  if (reinterpret_cast<std::uintptr_t>(begin) % 32 != 0 || stride * sizeof(T) % 16 != 0)
    lowband::cuda_on_host::fail("a misaligned tile at", site);
}

template <class Layout>
void load_matrix_sync(FragmentA<Layout>& a, const __nv_bfloat16* begin, unsigned stride,
                      CallSite site = CallSite::current()) {
  check(begin, stride, site);
  for (unsigned k = 0; k < 16; ++k)
    a.x[k] =
        number(begin[std::is_same_v<Layout, row_major> ? own_row() * stride + k : k * stride + own_row()]);
  __syncwarp(~0U, site);
}
template <class Layout>
void load_matrix_sync(FragmentB<Layout>& b, const __nv_bfloat16* begin, unsigned stride,
                      CallSite site = CallSite::current()) {
  check(begin, stride, site);
  for (unsigned k = 0; k < 16; ++k) {
    for (unsigned c = 0; c < 8; ++c) {
      const unsigned j = first_col() + c;
      b.x[k * 8 + c] = number(begin[std::is_same_v<Layout, row_major> ? k * stride + j : j * stride + k]);
    }
  }
  __syncwarp(~0U, site);
}
inline void load_matrix_sync(Sums& sums, const float* begin, unsigned stride, layout_t /*rows*/,
                             CallSite site = CallSite::current()) {
  check(begin, stride, site);
  for (unsigned c = 0; c < 8; ++c) sums.x[c] = begin[own_row() * stride + first_col() + c];
  __syncwarp(~0U, site);
}
inline void store_matrix_sync(float* begin, const Sums& sums, unsigned stride, layout_t /*rows*/,
                              CallSite site = CallSite::current()) {
  check(begin, stride, site);
  for (unsigned c = 0; c < 8; ++c) begin[own_row() * stride + first_col() + c] = sums.x[c];
  __syncwarp(~0U, site);
}
inline void fill_fragment(Sums& sums, float value) {
  for (float& x : sums.x) x = value;
}
template <class LayoutA, class LayoutB>
void mma_sync(Sums& d, const FragmentA<LayoutA>& a, const FragmentB<LayoutB>& b, const Sums& c,
              CallSite site = CallSite::current()) {
  __syncwarp(~0U, site);
  d = c;
  for (unsigned k = 0; k < 16; ++k) {
    for (unsigned j = 0; j < 8; ++j) d.x[j] += a.x[k] * b.x[k * 8 + j];
  }
}

}  // namespace nvcuda::wmma
