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

// Otherwise the compiler loads an operand of several FMAs with each of them.
template <class Real>
LB_INLINE Lanes<Real> loaded_once(Lanes<Real> value) {
  for_parts<Real>([&](auto p) LB_INLINE_LAMBDA {
    auto& part = value.part[p];
#if defined(__AVX512F__)
    __asm__("" : "+v"(part));
#else
    __asm__("" : "+x"(part));
#endif
  });
  return value;
}

template <class Real>
LB_INLINE void fetch(const Ahead<Real>& ahead, std::size_t rows, Index j) {
  if (ahead.data == nullptr) return;
  for (std::size_t i = 0; i < rows; ++i) __builtin_prefetch(at(ahead.data + j, i, ahead.stride), 0, 2);
}

// Packs of sums in the loops of `dot` and `add_outer`, where three quarters of the registers hold them.
template <class Real>
constexpr std::size_t kSkinnyPacks = (kNativeBytes == 64 ? 24 : 12) / Lanes<Real>::kParts;

// out(i, k) <- sum(sums[k][i]) for up to `kCols` columns, the same bits.
template <std::size_t kRows, std::size_t kCols, class Real>
LB_INLINE void store_sums(const Lanes<Real> (&sums)[kCols][kRows], Index cols, Real* out, Index out_stride) {
#if defined(__AVX512F__)
  if constexpr (kRows % 4 == 0 && kCols % 4 == 0 && Lanes<Real>::kParts == 1) {
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
    for (Index k = 0; k < cols; k += 4) {
      for (std::size_t i = 0; i < kRows; i += 4) {
        __m512
            rows_of[4];  // of column k + c: four lanes for each row; of columns that are not there anything
        unrolled<4>([&](auto c) LB_INLINE_LAMBDA {
          const Lanes<Real>* const column = sums[k + static_cast<Index>(c)] + i;
          rows_of[c] = fours(eights(column[0].part[0], column[1].part[0]),
                             eights(column[2].part[0], column[3].part[0]));
        });
        const __m512 all = ones(twos(rows_of[0], rows_of[1]), twos(rows_of[2], rows_of[3]));
        alignas(64) float in_order[16];
        _mm512_store_ps(in_order, all);
        for (std::size_t l = 0; l < 4; ++l) {
          float* const to = at(out + k, i + l, out_stride);
          if (cols - k >= 4) {
            __builtin_memcpy(to, in_order + 4 * l, 4 * sizeof(float));
          } else {
            for (Index c = 0; c < cols - k; ++c) to[c] = in_order[4 * l + static_cast<std::size_t>(c)];
          }
        }
      }
    }
    return;
  }
#endif
  for (Index k = 0; k < cols; ++k) {
    for (std::size_t i = 0; i < kRows; ++i) at(out, i, out_stride)[k] = sum(sums[k][i]);
  }
}

// Tiles are not inlined: among the counters of the loops around them, gcc 12 runs out of registers.

// sums(k, i) <- sums(k, i) + all packs of `kRows` rows and `kCols` factor columns, from zero at `first`.
// Element (k, i) lies at sums[k * kRows + i].
template <std::size_t kRows, std::size_t kCols, std::size_t kFetched, class Real>
__attribute__((noinline)) void dot_tile(bool first, const Real* m, Index stride, Index cols, const Real* qt,
                                        Index qt_stride, Lanes<Real>* sums, Ahead<Real> ahead) {
  Lanes<Real> tile[kRows][kCols];
  unrolled<kRows>([&](auto i) LB_INLINE_LAMBDA {
    unrolled<kCols>([&](auto k) LB_INLINE_LAMBDA { tile[i][k] = broadcast(Real{0}); });
  });
  if (!first) {
    unrolled<kRows>([&](auto i) LB_INLINE_LAMBDA {
      unrolled<kCols>([&](auto k) LB_INLINE_LAMBDA { tile[i][k] = sums[k * kRows + i]; });
    });
  }
  for_packs(cols, [&](Index j, auto lanes) LB_INLINE_LAMBDA {
    if constexpr (kFetched > 0) fetch(ahead, kFetched, j);
    Lanes<Real> factor[kCols];
    unrolled<kCols>([&](auto k) LB_INLINE_LAMBDA { factor[k] = load(at(qt + j, k, qt_stride), lanes); });
    unrolled<kRows>([&](auto i) LB_INLINE_LAMBDA {
      const Lanes<Real> row = loaded_once(load(at(m + j, i, stride), lanes));
      unrolled<kCols>([&](auto k) LB_INLINE_LAMBDA { tile[i][k] = fma(row, factor[k], tile[i][k]); });
    });
  });
  unrolled<kRows>([&](auto i) LB_INLINE_LAMBDA {
    unrolled<kCols>([&](auto k) LB_INLINE_LAMBDA { sums[k * kRows + i] = tile[i][k]; });
  });
}

template <class Real>
LB_INLINE Ahead<Real> moved(const Ahead<Real>& ahead, Index elements) {
  return ahead.data == nullptr ? ahead : Ahead<Real>{ahead.data + elements, ahead.stride};
}

// A block of columns of the rows and of up to 12 factor columns stays in the first cache: 8 x 512 and
// 12 x 512 floats are 40 KiB.
template <std::size_t kRows, class Real>
LB_INLINE void dot_rows(const Real* m, Index stride, Index cols, const Real* qt, Index qt_stride, Index r,
                        Real* out, Index out_stride, Ahead<Real> ahead) {
  constexpr Index kMostColumns = 12, kTileColumns = 3, kBlock = 2048 / sizeof(Real);
  Lanes<Real> sums[kMostColumns][kRows];
  for (Index k = 0; k < r; k += kMostColumns) {
    const Index columns = std::min(kMostColumns, r - k);
    for (Index j = 0; j < cols || j == 0; j += kBlock) {
      const Index width = std::min(kBlock, cols - j);
      // The tiles share in asking for the rows ahead, so that memory works all the time.
      const Index tiles = (columns + kTileColumns - 1) / kTileColumns;
      Index fetched = k == 0 && ahead.data != nullptr ? 0 : static_cast<Index>(kRows);
      const auto tile = [&](auto count, Index c) LB_INLINE_LAMBDA {
        constexpr std::size_t kCols = decltype(count)::value;
        const auto run = [&](auto rows) LB_INLINE_LAMBDA {
          constexpr std::size_t kFetched = decltype(rows)::value;
          dot_tile<kRows, kCols, kFetched>(j == 0, m + j, stride, width, qt + (k + c) * qt_stride + j,
                                           qt_stride, sums[c], moved(ahead, fetched * ahead.stride + j));
          fetched += static_cast<Index>(kFetched);
        };
        if (fetched >= static_cast<Index>(kRows)) return run(std::integral_constant<std::size_t, 0>{});
        if (tiles == 1) return run(std::integral_constant<std::size_t, kRows>{});
        if (tiles == 2 || (tiles == 3 && c == 0))
          return run(std::integral_constant<std::size_t, (kRows + 1) / 2>{});
        run(std::integral_constant<std::size_t, (kRows + 3) / 4>{});
      };
      Index c = 0;
      for (; c + kTileColumns <= columns; c += kTileColumns)
        tile(std::integral_constant<std::size_t, kTileColumns>{}, c);
      if (columns - c == 2) tile(std::integral_constant<std::size_t, 2>{}, c);
      if (columns - c == 1) tile(std::integral_constant<std::size_t, 1>{}, c);
    }
    store_sums(sums, columns, out + k, out_stride);
  }
}

template <class Real>
void dot(const Real* m, Index stride, Index rows, Index cols, const Real* qt, Index qt_stride, Index r,
         Real* out, Index out_stride, Ahead<Real> ahead) {
  constexpr std::size_t kRows = kSkinnyPacks<Real> / 3;
  constexpr auto kStep = static_cast<Index>(kRows);
  Index i = 0;
  for (; i + kStep <= rows; i += kStep)
    dot_rows<kRows>(m + i * stride, stride, cols, qt, qt_stride, r, out + i * out_stride, out_stride,
                    moved(ahead, i * ahead.stride));
  for (; i < rows; ++i)
    dot_rows<1>(m + i * stride, stride, cols, qt, qt_stride, r, out + i * out_stride, out_stride,
                moved(ahead, i * ahead.stride));
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

// Sums for kPacks packs of columns and kCols factor columns stay in registers while i runs over the rows, of
// which there is at least one.
template <std::size_t kPacks, std::size_t kCols, bool kFetches, class Real, class Accessed>
__attribute__((noinline)) void outer_tile(const Real* m, Index stride, Index rows, const Real* q,
                                          Index q_stride, Real* out_t, Index out_stride, Ahead<Real> ahead,
                                          Accessed lanes) {
  Lanes<Real> sums[kCols][kPacks];
  unrolled<kCols>([&](auto k) LB_INLINE_LAMBDA {
    unrolled<kPacks>(
        [&](auto t) LB_INLINE_LAMBDA { sums[k][t] = load(at(at(out_t, t, kLanes), k, out_stride), lanes); });
  });
  do {
    Lanes<Real> row[kPacks];
    unrolled<kPacks>([&](auto t) LB_INLINE_LAMBDA {
      if constexpr (kFetches) __builtin_prefetch(at(ahead.data, t, kLanes), 0, 2);
      row[t] = loaded_once(load(at(m, t, kLanes), lanes));
    });
    unrolled<kCols>([&](auto k) LB_INLINE_LAMBDA {
      const Lanes<Real> factor = broadcast(q[k]);
      unrolled<kPacks>([&](auto t) LB_INLINE_LAMBDA { sums[k][t] = fma(factor, row[t], sums[k][t]); });
    });
    m += stride;
    q += q_stride;
    if constexpr (kFetches) ahead.data += ahead.stride;
  } while (--rows > 0);
  unrolled<kCols>([&](auto k) LB_INLINE_LAMBDA {
    unrolled<kPacks>(
        [&](auto t) LB_INLINE_LAMBDA { store(at(at(out_t, t, kLanes), k, out_stride), sums[k][t], lanes); });
  });
}

// Factor columns in groups of kCols, then of 8, 4, 2 and 1: with 12, 8 or 4 of them M is read once.
template <std::size_t kPacks, std::size_t kCols, class Real>
LB_INLINE void outer_strips(const Real* m, Index stride, Index rows, Index cols, const Real* q,
                            Index q_stride, Index r, Real* out_t, Index out_stride,
                            const Ahead<Real>& ahead) {
  for_pack_groups<kPacks>(cols, [&](Index j, auto packs, auto lanes) LB_INLINE_LAMBDA {
    Index k = 0;
    const auto tiles = [&](auto count) LB_INLINE_LAMBDA {
      constexpr std::size_t kTilePacks = decltype(packs)::value, kTileCols = decltype(count)::value;
      if constexpr (kTileCols <= kCols) {
        for (; k + static_cast<Index>(kTileCols) <= r; k += static_cast<Index>(kTileCols)) {
          Real* const to = out_t + k * out_stride + j;
          if (k == 0 && ahead.data != nullptr) {
            outer_tile<kTilePacks, kTileCols, true>(m + j, stride, rows, q + k, q_stride, to, out_stride,
                                                    moved(ahead, j), lanes);
          } else {
            outer_tile<kTilePacks, kTileCols, false>(m + j, stride, rows, q + k, q_stride, to, out_stride,
                                                     Ahead<Real>{}, lanes);
          }
        }
      }
    };
    tiles(std::integral_constant<std::size_t, kCols>{});
    tiles(std::integral_constant<std::size_t, 8>{});
    tiles(std::integral_constant<std::size_t, 4>{});
    tiles(std::integral_constant<std::size_t, 2>{});
    tiles(std::integral_constant<std::size_t, 1>{});
  });
}

template <class Real>
void add_outer(const Real* m, Index stride, Index rows, Index cols, const Real* q, Index q_stride, Index r,
               Real* out_t, Index out_stride, Ahead<Real> ahead) {
  if (rows == 0) return;
  constexpr std::size_t kPacks = kSkinnyPacks<Real> >= 12 ? 2 : 1;
  constexpr std::size_t kCols = std::max<std::size_t>(2, kSkinnyPacks<Real> / kPacks / 2 * 2);
  outer_strips<kPacks, kCols>(m, stride, rows, cols, q, q_stride, r, out_t, out_stride, ahead);
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
