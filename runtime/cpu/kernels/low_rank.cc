// The loops of runtime/cpu/kernels/low_rank_tables.h. Compiled for AVX2 and AVX-512; LB_KERNEL_SET names the
// table.
//
// All three work on register tiles whose shape follows from the number of registers: it decides how often
// an element is loaded, never the order in which it is added.

#include "runtime/cpu/kernels/lanes.h"
#include "runtime/cpu/kernels/low_rank_tables.h"

#include <algorithm>

namespace lowband {
namespace {

// Native registers that hold sums: the rest are operands.
constexpr std::size_t kSumRegisters = kNativeBytes == 64 ? 16 : 8;
template <class Real>
constexpr std::size_t kSumPacks = kSumRegisters / Lanes<Real>::kParts;

template <class Real>
LB_INLINE Real* at(Real* base, std::size_t row, Index stride) {
  return base + static_cast<Index>(row) * stride;
}

template <class Real>
LB_INLINE void fetch(const Ahead<Real>& ahead, std::size_t rows, Index j) {
  if (ahead.data == nullptr) return;
  for (std::size_t i = 0; i < rows; ++i) __builtin_prefetch(at(ahead.data + j, i, ahead.stride), 0, 2);
}

// out(i, k) <- sum(sums[i][k]), the same bits.
template <std::size_t kRows, std::size_t kCols, class Real>
LB_INLINE void store_sums(const Lanes<Real> (&sums)[kRows][kCols], Real* out, Index out_stride) {
#if defined(__AVX512F__)
  if constexpr (kRows == 4 && kCols == 4 && Lanes<Real>::kParts == 1) {
    // One addition folds two vectors: halves of 8, then of 4, 2 and 1 lanes, in the order of `fold`. The
    // masked forms are the same instructions; gcc 12 warns about the plain ones. Folding rows first and
    // columns last leaves row i in quarter i.
    const auto eights = [](__m512 a, __m512 b) LB_INLINE_LAMBDA {
      return _mm512_add_ps(_mm512_maskz_shuffle_f32x4(0xFFFF, a, b, 0x44),
                           _mm512_maskz_shuffle_f32x4(0xFFFF, a, b, 0xEE));
    };
    const auto fours = [](__m512 a, __m512 b) LB_INLINE_LAMBDA {
      return _mm512_add_ps(_mm512_maskz_shuffle_f32x4(0xFFFF, a, b, 0x88),
                           _mm512_maskz_shuffle_f32x4(0xFFFF, a, b, 0xDD));
    };
    const auto twos = [](__m512 a, __m512 b) LB_INLINE_LAMBDA {
      return _mm512_add_ps(_mm512_maskz_shuffle_ps(0xFFFF, a, b, 0x44),
                           _mm512_maskz_shuffle_ps(0xFFFF, a, b, 0xEE));
    };
    const auto ones = [](__m512 a, __m512 b) LB_INLINE_LAMBDA {
      return _mm512_add_ps(_mm512_maskz_shuffle_ps(0xFFFF, a, b, 0x88),
                           _mm512_maskz_shuffle_ps(0xFFFF, a, b, 0xDD));
    };
    __m512 rows_of[4];  // of column k: four lanes for each row
    unrolled<4>([&](auto k) LB_INLINE_LAMBDA {
      rows_of[k] = fours(eights(sums[0][k].part[0], sums[1][k].part[0]),
                         eights(sums[2][k].part[0], sums[3][k].part[0]));
    });
    const __m512 all = ones(twos(rows_of[0], rows_of[1]), twos(rows_of[2], rows_of[3]));
    alignas(64) float in_order[16];
    _mm512_store_ps(in_order, all);
    unrolled<4>([&](auto i) LB_INLINE_LAMBDA {
      __builtin_memcpy(at(out, i, out_stride), in_order + 4 * i, 4 * sizeof(float));
    });
    return;
  }
#endif
  unrolled<kRows>([&](auto i) LB_INLINE_LAMBDA {
    unrolled<kCols>([&](auto k) LB_INLINE_LAMBDA { at(out, i, out_stride)[k] = sum(sums[i][k]); });
  });
}

// sums[i][k] over all packs of `kRows` rows and `kCols` factor columns
template <std::size_t kRows, std::size_t kCols, class Real>
LB_INLINE void dot_tile(const Real* m, Index stride, Index cols, const Real* qt, Index qt_stride, Real* out,
                        Index out_stride, const Ahead<Real>& ahead) {
  Lanes<Real> sums[kRows][kCols];
  unrolled<kRows>([&](auto i) LB_INLINE_LAMBDA {
    unrolled<kCols>([&](auto k) LB_INLINE_LAMBDA { sums[i][k] = broadcast(Real{0}); });
  });
  for_packs(cols, [&](Index j, auto lanes) LB_INLINE_LAMBDA {
    fetch(ahead, kRows, j);
    Lanes<Real> factor[kCols];
    unrolled<kCols>([&](auto k) LB_INLINE_LAMBDA { factor[k] = load(at(qt + j, k, qt_stride), lanes); });
    unrolled<kRows>([&](auto i) LB_INLINE_LAMBDA {
      const Lanes<Real> row = load(at(m + j, i, stride), lanes);
      unrolled<kCols>([&](auto k) LB_INLINE_LAMBDA { sums[i][k] = fma(row, factor[k], sums[i][k]); });
    });
  });
  store_sums(sums, out, out_stride);
}

template <std::size_t kRows, class Real>
LB_INLINE void dot_rows(const Real* m, Index stride, Index cols, const Real* qt, Index qt_stride, Index r,
                        Real* out, Index out_stride, Ahead<Real> ahead) {
  constexpr std::size_t kCols = kSumPacks<Real> / kRows;
  constexpr auto kStep = static_cast<Index>(kCols);
  Index k = 0;
  for (; k + kStep <= r; k += kStep) {
    dot_tile<kRows, kCols>(m, stride, cols, qt + k * qt_stride, qt_stride, out + k, out_stride, ahead);
    ahead.data = nullptr;
  }
  for (; k < r; ++k) {
    dot_tile<kRows, 1>(m, stride, cols, qt + k * qt_stride, qt_stride, out + k, out_stride, ahead);
    ahead.data = nullptr;
  }
}

template <class Real>
LB_INLINE Ahead<Real> below(const Ahead<Real>& ahead, Index row) {
  return ahead.data == nullptr ? ahead : Ahead<Real>{ahead.data + row * ahead.stride, ahead.stride};
}

template <class Real>
void dot(const Real* m, Index stride, Index rows, Index cols, const Real* qt, Index qt_stride, Index r,
         Real* out, Index out_stride, Ahead<Real> ahead) {
  constexpr std::size_t kRows = kSumPacks<Real> >= 16 ? 4 : 2;
  constexpr auto kStep = static_cast<Index>(kRows);
  Index i = 0;
  for (; i + kStep <= rows; i += kStep)
    dot_rows<kRows>(m + i * stride, stride, cols, qt, qt_stride, r, out + i * out_stride, out_stride,
                    below(ahead, i));
  for (; i < rows; ++i)
    dot_rows<1>(m + i * stride, stride, cols, qt, qt_stride, r, out + i * out_stride, out_stride,
                below(ahead, i));
}

// body(j, packs, lanes): kPacks packs at a time, then one at a time, then the rest of the row.
template <std::size_t kPacks, class Body>
LB_INLINE void for_pack_groups(Index cols, Body body) {
  constexpr auto kStep = static_cast<Index>(kPacks) * kLanes;
  Index j = 0;
  for (; j + kStep <= cols; j += kStep) body(j, std::integral_constant<std::size_t, kPacks>{}, AllLanes{});
  for (; j + kLanes <= cols; j += kLanes) body(j, std::integral_constant<std::size_t, 1>{}, AllLanes{});
  if (j < cols) body(j, std::integral_constant<std::size_t, 1>{}, FirstLanes{cols - j});
}
// Packs in a tile of `rows` rows.
template <class Real>
constexpr std::size_t tile_packs(std::size_t rows) {
  return kSumPacks<Real> > rows ? kSumPacks<Real> / rows : 1;
}

// The tile of m stays in registers while k runs over the factor columns.
template <std::size_t kRows, class Real>
LB_INLINE void outer_rows(const Real* m, Index stride, Index cols, const Real* packed, Index r, Real* out_t,
                          Index out_stride, const Ahead<Real>& ahead) {
  for_pack_groups<tile_packs<Real>(kRows)>(cols, [&](Index j, auto packs, auto lanes) LB_INLINE_LAMBDA {
    constexpr std::size_t kCount = decltype(packs)::value;
    Lanes<Real> tile[kRows][kCount];
    unrolled<kCount>([&](auto t) LB_INLINE_LAMBDA {
      fetch(ahead, kRows, j + static_cast<Index>(t) * kLanes);
      unrolled<kRows>(
          [&](auto i) LB_INLINE_LAMBDA { tile[i][t] = load(at(at(m + j, t, kLanes), i, stride), lanes); });
    });
    for (Index k = 0; k < r; ++k) {
      Real* const to = out_t + k * out_stride + j;
      Lanes<Real> sums[kCount];
      unrolled<kCount>([&](auto t) LB_INLINE_LAMBDA { sums[t] = load(at(to, t, kLanes), lanes); });
      unrolled<kRows>([&](auto i) LB_INLINE_LAMBDA {
        const Lanes<Real> factor = broadcast(packed[k * kPanelRows + static_cast<Index>(i)]);
        unrolled<kCount>([&](auto t) LB_INLINE_LAMBDA { sums[t] = fma(factor, tile[i][t], sums[t]); });
      });
      unrolled<kCount>([&](auto t) LB_INLINE_LAMBDA { store(at(to, t, kLanes), sums[t], lanes); });
    }
  });
}

template <class Real>
void add_outer(const Real* m, Index stride, Index rows, Index cols, const Real* packed, Index r, Real* out_t,
               Index out_stride, Ahead<Real> ahead) {
  if (rows == kPanelRows) return outer_rows<kPanelRows>(m, stride, cols, packed, r, out_t, out_stride, ahead);
  for (Index i = 0; i < rows; ++i)
    outer_rows<1>(m + i * stride, stride, cols, packed + i, r, out_t, out_stride, Ahead<Real>{});
}

// Not inlined: among the counters of the loops around it, gcc 12 runs out of registers for the tile.
// Element (row i, k) of the left factor is packed[i * kRowStep + k * packed_stride].
template <std::size_t kRows, std::size_t kCount, std::size_t kRowStep, class Real, class Accessed>
__attribute__((noinline)) void product_tile(Real beta, Real* m, Index stride, const Real* packed,
                                            Index packed_stride, Index r, const Real* rt, Index rt_stride,
                                            Accessed lanes) {
  Lanes<Real> tile[kRows][kCount];
  const auto old = broadcast(beta);
  unrolled<kRows>([&](auto i) LB_INLINE_LAMBDA {
    unrolled<kCount>([&](auto t) LB_INLINE_LAMBDA {
      tile[i][t] = beta == 0 ? broadcast(Real{0}) : old * load(at(at(m, t, kLanes), i, stride), lanes);
    });
  });
  for (Index k = 0; k < r; ++k) {
    Lanes<Real> right[kCount];
    unrolled<kCount>([&](auto t) LB_INLINE_LAMBDA { right[t] = load(at(rt, t, kLanes), lanes); });
    unrolled<kRows>([&](auto i) LB_INLINE_LAMBDA {
      const Lanes<Real> left = broadcast(packed[i * kRowStep]);
      unrolled<kCount>([&](auto t) LB_INLINE_LAMBDA { tile[i][t] = fma(left, right[t], tile[i][t]); });
    });
    rt += rt_stride;
    packed += packed_stride;
  }
  unrolled<kRows>([&](auto i) LB_INLINE_LAMBDA {
    unrolled<kCount>([&](auto t)
                         LB_INLINE_LAMBDA { store(at(at(m, t, kLanes), i, stride), tile[i][t], lanes); });
  });
}

template <std::size_t kRows, class Real>
LB_INLINE void product_rows(Real beta, Real* m, Index stride, Index cols, const Real* packed, Index r,
                            const Real* rt, Index rt_stride, const Ahead<Real>& ahead) {
  for_pack_groups<tile_packs<Real>(kRows)>(cols, [&](Index j, auto packs, auto lanes) LB_INLINE_LAMBDA {
    constexpr std::size_t kCount = decltype(packs)::value;
    unrolled<kCount>([&](auto t)
                         LB_INLINE_LAMBDA { fetch(ahead, kRows, j + static_cast<Index>(t) * kLanes); });
    product_tile<kRows, kCount, 1>(beta, m + j, stride, packed, kPanelRows, r, rt + j, rt_stride, lanes);
  });
}

template <class Real>
void add_product(Real beta, Real* m, Index stride, Index rows, Index cols, const Real* packed, Index r,
                 const Real* rt, Index rt_stride, Ahead<Real> ahead) {
  if (rows == kPanelRows)
    return product_rows<kPanelRows>(beta, m, stride, cols, packed, r, rt, rt_stride, ahead);
  for (Index i = 0; i < rows; ++i)
    product_rows<1>(beta, m + i * stride, stride, cols, packed + i, r, rt, rt_stride, Ahead<Real>{});
}

// Both operands are the rows of P in double. A tile that reaches beyond the columns of P reads the row below
// instead, for elements of g that nobody reads: nothing needs a mask.
template <std::size_t kRows>
LB_INLINE void gram_tiles(const double* wide, Index rows, Index cols, double* g) {
  constexpr auto kStep = static_cast<Index>(kRows);
  static_assert(kGramTile % kStep == 0 && kGramTile % kLanes == 0);
  const Index g_stride = gram_stride(cols);
  for (Index i = 0; i < cols; i += kStep) {
    for (Index j = i / kLanes * kLanes; j < cols; j += kLanes)
      product_tile<kRows, 1, 1>(1.0, g + i * g_stride + j, g_stride, wide + i, cols, rows, wide + j, cols,
                                AllLanes{});
  }
}

template <class Real>
void add_gram(const Real* p, Index stride, Index rows, Index cols, double* wide, double* g) {
  const auto copy_wide = [&](const Real* from, Index n, double* to) LB_INLINE_LAMBDA {
    for_packs(
        n, [&](Index j, auto lanes) LB_INLINE_LAMBDA { store(to + j, widen(load(from + j, lanes)), lanes); });
  };
  if (stride == cols) {
    copy_wide(p, rows * cols, wide);
  } else {
    for (Index i = 0; i < rows; ++i) copy_wide(p + i * stride, cols, wide + i * cols);
  }
  constexpr std::size_t kMostRows = std::min(kSumPacks<double>, std::size_t{kPanelRows});
  if (cols <= 4) return gram_tiles<std::min(kMostRows, std::size_t{4})>(wide, rows, cols, g);
  gram_tiles<kMostRows>(wide, rows, cols, g);
}

// Rows of X = P U^-1 by blocks J of 16 columns: X_J <- (P_J - sum over I < J of X_I U_IJ) U_JJ^-1, where X_J
// so far lies in `done`, at a row stride that is known to the compiler.
template <std::size_t kRows, class Real>
LB_INLINE void solve_rows(Real* p, Index stride, Index cols, const Real* blocks, Real* done) {
  static_assert(kSolveBlock == kLanes && kMostSolvedColumns % kLanes == 0);
  constexpr auto kStep = static_cast<std::size_t>(kMostSolvedColumns);
  for_packs(cols, [&](Index j, auto lanes) LB_INLINE_LAMBDA {
    const auto keep_done = [&]() LB_INLINE_LAMBDA {
      unrolled<kRows>([&](auto i) LB_INLINE_LAMBDA {
        store(done + i * kStep + j, load(at(p + j, i, stride), lanes), AllLanes{});
      });
    };
    const Real* const column = blocks + j;
    if (j > 0) product_tile<kRows, 1, kStep>(Real{1}, p + j, stride, done, 1, j, column, cols, lanes);
    keep_done();
    product_tile<kRows, 1, kStep>(Real{0}, p + j, stride, done + j, 1, std::min(kLanes, cols - j),
                                  column + j * cols, cols, lanes);
    if (j + kLanes < cols) keep_done();
  });
}

template <class Real>
void solve_upper(Real* p, Index stride, Index rows, Index cols, const Real* blocks) {
  constexpr std::size_t kRows = std::min(kSumPacks<Real>, std::size_t{8});
  alignas(64) Real done[kRows * static_cast<std::size_t>(kMostSolvedColumns)];
  constexpr auto kStep = static_cast<Index>(kRows);
  Index i = 0;
  for (; i + kStep <= rows; i += kStep) solve_rows<kRows>(p + i * stride, stride, cols, blocks, done);
  for (; i < rows; ++i) solve_rows<1>(p + i * stride, stride, cols, blocks, done);
}

template <class Real>
constexpr LowRankKernels<Real> kTable = {.dot = dot<Real>,
                                         .add_outer = add_outer<Real>,
                                         .add_product = add_product<Real>,
                                         .add_gram = add_gram<Real>,
                                         .solve_upper = solve_upper<Real>};

}  // namespace

const LowRankKernels<float>* const kernel_tables::LB_KERNEL_SET::float_low_rank_kernels = &kTable<float>;
const LowRankKernels<double>* const kernel_tables::LB_KERNEL_SET::double_low_rank_kernels = &kTable<double>;

}  // namespace lowband
