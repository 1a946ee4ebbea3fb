#pragma once

#include "runtime/types.h"

#include <string_view>
#include <vector>

namespace lowband {

/// What memory holds next, fetched while this panel is computed. With a stride: a panel of as many rows, row
/// i of it at data + i * stride. Without one: half as many elements as this panel has, one after the other.
/// Null: nothing.
template <class Real>
struct Ahead {
  const Real* data = nullptr;
  Index stride = 0;
};

/// Products of a panel of rows of a matrix with few columns, lanes along the rows of the matrix. Real: float,
/// double. Single-threaded.
///
/// Factors with a row for each column of the matrix come in packs of kFactorLanes rows, pack after pack:
/// element (row j, column k) at [(j / kFactorLanes * r + k) * kFactorLanes + j % kFactorLanes], the last pack
/// filled up with zeros. That is the order in which the loops read them, without a stride.
///
/// Determinism: the same bits on AVX-512 and AVX2 and for every division into panels. Sums along a row run in
/// 16 lanes as in runtime/vector_kernels.h, all others one FMA at a time in the order of their index.
template <class Real>
struct LowRankKernels {
  /// out(i, k) <- sum over j of m(i, j) q(j, k), q in packs, `ahead` without a stride
  void (*dot)(const Real* m, Index stride, Index rows, Index cols, const Real* q, Index r, Real* out,
              Index out_stride, Ahead<Real> ahead);
  /// out(j, k) <- out(j, k) + sum over i of q(i, k) m(i, j), out in packs
  void (*add_outer)(const Real* m, Index stride, Index rows, Index cols, const Real* q, Index q_stride,
                    Index r, Real* out, Ahead<Real> ahead);
  /// m(i, j) <- beta m(i, j) + sum over k of packed(i, k) rt(k, j); with beta = 0 the old m is not read.
  /// Up to kPanelRows rows; element (row i, column k) of the left factor at packed[k * kPanelRows + i], the
  /// right one transposed, (r, cols) with a row stride.
  void (*add_product)(Real beta, Real* m, Index stride, Index rows, Index cols, const Real* packed, Index r,
                      const Real* rt, Index rt_stride, Ahead<Real> ahead);
  /// The upper triangle of g <- g + P^T P in double, of P with contiguous or strided rows. `g` has as many
  /// rows and columns as gram_stride(cols); what lies outside the triangle or beyond `cols` may become
  /// anything. `wide` is scratch for rows * cols + kGramTile doubles.
  void (*add_gram)(const Real* p, Index stride, Index rows, Index cols, double* wide, double* g);
  /// P <- P U^-1 for an upper triangular U of at most kMostSolvedColumns columns, cut into blocks of
  /// kSolveBlock rows and columns: `blocks` (cols, cols) holds -U to the right of the diagonal blocks, and in
  /// these U_JJ^-1.
  void (*solve_upper)(Real* p, Index stride, Index rows, Index cols, const Real* blocks);
};
inline constexpr Index kPanelRows = 8;
inline constexpr Index kFactorLanes = 16;
inline constexpr Index kGramTile = 16;
inline constexpr Index kSolveBlock = 16;
inline constexpr Index kMostSolvedColumns = 256;
inline constexpr Index gram_stride(Index cols) { return (cols + kGramTile - 1) / kGramTile * kGramTile; }

template <class Real>
struct NamedLowRankKernels {
  std::string_view name;
  const LowRankKernels<Real>* kernels;
};
/// Every set that this processor can run, fastest first; none without AVX2, where a fused multiply-add is a
/// function call and a BLAS is faster.
template <class Real>
std::vector<NamedLowRankKernels<Real>> runnable_low_rank_kernels();
/// The fastest of them; null when there is none.
template <class Real>
const LowRankKernels<Real>* low_rank_kernels();

namespace kernel_tables {
#define LB_DECLARE_KERNEL_SET(set)                                    \
  namespace set {                                                     \
  extern const LowRankKernels<float>* const float_low_rank_kernels;   \
  extern const LowRankKernels<double>* const double_low_rank_kernels; \
  }
LB_DECLARE_KERNEL_SET(avx2)
LB_DECLARE_KERNEL_SET(avx512)
#undef LB_DECLARE_KERNEL_SET
}  // namespace kernel_tables

}  // namespace lowband
