// The loops of runtime/cpu/kernels/low_rank_tables.h. Compiled for AVX2 and AVX-512; LB_KERNEL_SET names the
// table.
//
// They work on register tiles whose shape follows from the number of registers: it decides how often
// an element is loaded, never the order in which it is added.

#include "runtime/cpu/kernels/lanes.h"
#include "runtime/cpu/kernels/low_rank_tables.h"

#include <algorithm>

#include <unistd.h>

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

// body(k, count) for factor columns k .. k + count - 1: kMost at a time, then 8, 4, 2 and 1.
template <std::size_t kMost, class Body>
LB_INLINE void for_column_tiles(Index r, Body body) {
  Index k = 0;
  const auto tiles = [&](auto count) LB_INLINE_LAMBDA {
    if constexpr (count <= kMost) {
      for (; k + static_cast<Index>(count) <= r; k += static_cast<Index>(count)) body(k, count);
    }
  };
  tiles(std::integral_constant<std::size_t, kMost>{});
  tiles(std::integral_constant<std::size_t, 8>{});
  tiles(std::integral_constant<std::size_t, 4>{});
  tiles(std::integral_constant<std::size_t, 2>{});
  tiles(std::integral_constant<std::size_t, 1>{});
}

// Rows whose sums are folded together, and columns of factors whose sums are kept for them.
constexpr std::size_t kFoldedRows = 4;
constexpr Index kSummedColumns = 16;

// out(i, k) <- sum(sums[k * kFoldedRows + i]) of kFoldedRows rows, the same bits.
template <class Real>
LB_INLINE void fold_rows(const Lanes<Real>* sums, Index cols, Real* out, Index out_stride) {
#if defined(__AVX512F__)
  if constexpr (Lanes<Real>::kParts == 1) {
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
      __m512 rows_of[4];  // of column k + c: four lanes for each row; of columns that are not there anything
      unrolled<4>([&](auto c) LB_INLINE_LAMBDA {
        const Lanes<Real>* const column = sums + (static_cast<std::size_t>(k) + c) * kFoldedRows;
        rows_of[c] =
            fours(eights(column[0].part[0], column[1].part[0]), eights(column[2].part[0], column[3].part[0]));
      });
      const __m512 all = ones(twos(rows_of[0], rows_of[1]), twos(rows_of[2], rows_of[3]));
      const auto mask = static_cast<__mmask8>(cols - k >= 4 ? 0xF : (1 << (cols - k)) - 1);
      unrolled<4>([&](auto i) LB_INLINE_LAMBDA {
        _mm_mask_storeu_ps(at(out + k, i, out_stride), mask, _mm512_maskz_extractf32x4_ps(0xF, all, i));
      });
    }
    return;
  }
#endif
  for (Index k = 0; k < cols; ++k) {
    for (std::size_t i = 0; i < kFoldedRows; ++i) at(out, i, out_stride)[k] = sum(*sums++);
  }
}

// Tiles are not inlined: among the counters of the loops around them, gcc 12 runs out of registers. Two steps
// of their loops in one: of branches so far apart the processor otherwise mispredicts the last.

// sums[k * kFoldedRows + i] <- itself + all packs of `kRows` rows and `kCols` factor columns, from zero at
// `first`.
template <std::size_t kRows, std::size_t kCols, bool kFetches, class Real>
__attribute__((noinline)) void dot_tile(bool first, const Real* m, Index stride, Index cols, const Real* q,
                                        Index q_step, Lanes<Real>* sums, const Real* ahead) {
  Lanes<Real> tile[kRows][kCols];
  unrolled<kRows>([&](auto i) LB_INLINE_LAMBDA {
    unrolled<kCols>([&](auto k) LB_INLINE_LAMBDA { tile[i][k] = broadcast(Real{0}); });
  });
  if (!first) {
    unrolled<kRows>([&](auto i) LB_INLINE_LAMBDA {
      unrolled<kCols>([&](auto k) LB_INLINE_LAMBDA { tile[i][k] = sums[k * kFoldedRows + i]; });
    });
  }
  const auto add_pack = [&](Index j, auto lanes) LB_INLINE_LAMBDA {
    if constexpr (kFetches) __builtin_prefetch(ahead, 0, 2), ahead += kLanes;
    Lanes<Real> row[kRows];
    unrolled<kRows>([&](auto i)
                        LB_INLINE_LAMBDA { row[i] = loaded_once(load(at(m + j, i, stride), lanes)); });
    unrolled<kCols>([&](auto k) LB_INLINE_LAMBDA {
      const Lanes<Real> factor = loaded_once(load(at(q, k, kLanes), AllLanes{}));
      unrolled<kRows>([&](auto i) LB_INLINE_LAMBDA { tile[i][k] = fma(row[i], factor, tile[i][k]); });
    });
    q += q_step;
  };
  Index j = 0;
  for (; j + 2 * kLanes <= cols; j += 2 * kLanes) {
    add_pack(j, AllLanes{});
    add_pack(j + kLanes, AllLanes{});
  }
  if (j + kLanes <= cols) {
    add_pack(j, AllLanes{});
    j += kLanes;
  }
  if (j < cols) add_pack(j, FirstLanes{cols - j});
  unrolled<kRows>([&](auto i) LB_INLINE_LAMBDA {
    unrolled<kCols>([&](auto k) LB_INLINE_LAMBDA { sums[k * kFoldedRows + i] = tile[i][k]; });
  });
}

// Columns of the matrix whose rows of the factor take half of the first cache.
template <class Real>
Index block_columns(Index r) {
  static const Index bytes = std::max(32L << 10, sysconf(_SC_LEVEL1_DCACHE_SIZE)) / 2;
  return bytes / (r * static_cast<Index>(sizeof(Real))) / kLanes * kLanes;
}

// Up to kSummedColumns factor columns and kSummedRows rows. A block of columns of all rows comes before the
// next, so that its rows of the factor stay in the first cache; sums wait until the last of them.
template <class Real>
constexpr Index kSummedRows = 256 / sizeof(Real);
template <class Real>
void dot_rows(const Real* m, Index stride, Index rows, Index cols, const Real* q, Index q_step, Index r,
              Real* out, Index out_stride, const Real* ahead) {
  constexpr std::size_t kTileRows = kSkinnyPacks<Real> >= 6 ? 2 : 1;
  constexpr auto kStep = static_cast<Index>(kTileRows), kFolded = static_cast<Index>(kFoldedRows);
  alignas(64) Lanes<Real> kept[kSummedRows<Real> / kFolded][kSummedColumns * kFolded];
  const Index block = block_columns<Real>(r);
  for (Index j = 0; j < cols || j == 0; j += block) {
    const Index width = std::min(block, cols - j);
    const bool first = j == 0, last = j + width == cols;
    for (Index group = 0; group < rows; group += kFolded) {
      Lanes<Real>* const sums = kept[first && last ? 0 : group / kFolded];
      const Index count = std::min(kFolded, rows - group);
      for_column_tiles<kSkinnyPacks<Real> / kTileRows>(r, [&](Index k, auto tile_cols) LB_INLINE_LAMBDA {
        const auto run = [&](auto tile_rows, Index i) LB_INLINE_LAMBDA {
          const Real* const from = m + (group + i) * stride + j;
          const Real* const factor = q + j * q_step / kLanes + k * kLanes;
          Lanes<Real>* const to = sums + k * kFolded + i;
          if (ahead == nullptr || k > 0)
            return dot_tile<tile_rows, tile_cols, false>(first, from, stride, width, factor, q_step, to,
                                                         ahead);
          dot_tile<tile_rows, tile_cols, true>(first, from, stride, width, factor, q_step, to, ahead);
          ahead += width;
        };
        Index i = 0;
        for (; i + kStep <= count; i += kStep) run(std::integral_constant<std::size_t, kTileRows>{}, i);
        for (; i < count; ++i) run(std::integral_constant<std::size_t, 1>{}, i);
      });
      if (!last) continue;
      Real* const to = out + group * out_stride;
      if (count == kFolded) {
        fold_rows(sums, r, to, out_stride);
      } else {
        for (Index i = 0; i < count; ++i) {
          for (Index k = 0; k < r; ++k) to[i * out_stride + k] = sum(sums[k * kFolded + i]);
        }
      }
    }
  }
}

template <class Real>
void dot(const Real* m, Index stride, Index rows, Index cols, const Real* q, Index r, Real* out,
         Index out_stride, Ahead<Real> ahead) {
  for (Index k = 0; k < r; k += kSummedColumns) {
    for (Index i = 0; i < rows; i += kSummedRows<Real>)
      dot_rows(m + i * stride, stride, std::min(kSummedRows<Real>, rows - i), cols, q + k * kLanes,
               r * kLanes, std::min(kSummedColumns, r - k), out + i * out_stride + k, out_stride,
               k == 0 && ahead.data != nullptr ? ahead.data + i * cols / 2 : nullptr);
  }
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

// Sums for kPacks packs of columns and kCols factor columns stay in registers while i runs over the rows,
// with each of which it fetches `kFetched` cache lines, 0, 1 or kPacks.
template <std::size_t kPacks, std::size_t kCols, std::size_t kFetched, class Real, class Accessed>
__attribute__((noinline)) void outer_tile(const Real* m, Index stride, Index rows, const Real* q,
                                          Index q_stride, Real* out, Index out_step, Ahead<Real> ahead,
                                          Accessed lanes) {
  Lanes<Real> sums[kCols][kPacks];
  const auto place = [&](std::size_t k, std::size_t t)
                         LB_INLINE_LAMBDA { return at(at(out, t, out_step), k, kLanes); };
  unrolled<kCols>([&](auto k) LB_INLINE_LAMBDA {
    unrolled<kPacks>([&](auto t) LB_INLINE_LAMBDA { sums[k][t] = load(place(k, t), AllLanes{}); });
  });
  const auto add_row = [&]() LB_INLINE_LAMBDA {
    Lanes<Real> row[kPacks];
    unrolled<kPacks>([&](auto t) LB_INLINE_LAMBDA {
      if constexpr (t < kFetched) __builtin_prefetch(at(ahead.data, t, kLanes), 0, 2);
      row[t] = loaded_once(load(at(m, t, kLanes), lanes));
    });
    unrolled<kCols>([&](auto k) LB_INLINE_LAMBDA {
      const Lanes<Real> factor = loaded_once(broadcast(q[k]));
      unrolled<kPacks>([&](auto t) LB_INLINE_LAMBDA { sums[k][t] = fma(factor, row[t], sums[k][t]); });
    });
    m += stride;
    q += q_stride;
    if constexpr (kFetched > 0) ahead.data += ahead.stride;
  };
  if constexpr (kFetched < 2) {  // with two lines to fetch for each row one step in a branch is faster
    for (; rows >= 2; rows -= 2) {
      add_row();
      add_row();
    }
  }
  for (; rows > 0; --rows) add_row();
  unrolled<kCols>([&](auto k) LB_INLINE_LAMBDA {
    unrolled<kPacks>([&](auto t) LB_INLINE_LAMBDA { store(place(k, t), sums[k][t], AllLanes{}); });
  });
}

template <class Real>
void add_outer(const Real* m, Index stride, Index rows, Index cols, const Real* q, Index q_stride, Index r,
               Real* out, Ahead<Real> ahead) {
  constexpr std::size_t kPacks = kSkinnyPacks<Real> >= 12 ? 2 : 1;
  constexpr std::size_t kCols = std::max<std::size_t>(2, kSkinnyPacks<Real> / kPacks / 2 * 2);
  for_pack_groups<kPacks>(cols, [&](Index j, auto packs, auto lanes) LB_INLINE_LAMBDA {
    for_column_tiles<kCols>(r, [&](Index k, auto tile_cols) LB_INLINE_LAMBDA {
      const auto run = [&](auto fetched, Ahead<Real> beside) LB_INLINE_LAMBDA {
        outer_tile<packs, tile_cols, fetched>(m + j, stride, rows, q + k, q_stride, out + j * r + k * kLanes,
                                              r * kLanes, beside, lanes);
      };
      if (ahead.data == nullptr || k > 0) return run(std::integral_constant<std::size_t, 0>{}, {});
      if (ahead.stride == 0)
        return run(std::integral_constant<std::size_t, 1>{}, {ahead.data + j * rows / 2, kLanes});
      run(packs, {ahead.data + j, ahead.stride});
    });
  });
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
    // All rows of a pack, then those of the next: the other order is a third slower.
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
