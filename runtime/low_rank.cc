#include "runtime/low_rank.h"

#include "runtime/buffer.h"
#include "runtime/cpu.h"
#include "runtime/cpu/kernels/low_rank_tables.h"
#include "runtime/cpu/kernels/runnable.h"
#include "runtime/passes.h"
#include "runtime/vector_kernels.h"

#include <algorithm>
#include <numeric>

namespace lowband {
namespace {

template <class T>
std::string shape(MatrixView<T> view) {
  return cat("(", view.rows, ", ", view.cols, ")");
}

template <class Real>
void expect_product(const char* function, Op op, MatrixView<const Real> m, MatrixView<const Real> q,
                    MatrixView<Real> out) {
  const Index rows = op == Op::kNone ? m.rows : m.cols, inner = op == Op::kNone ? m.cols : m.rows;
  LB_EXPECTS(q.rows == inner && out.rows == rows && q.cols == out.cols, function, ": found M ", shape(m),
             op == Op::kNone ? "" : "^T", ", Q ", shape(q), ", out ", shape(out), ", expected Q (", inner,
             ", r) and out (", rows, ", r)");
}

template <class Real>
void expect_same_shape(const char* function, MatrixView<const Real> a, MatrixView<const Real> b) {
  LB_EXPECTS(a.rows == b.rows && a.cols == b.cols, function, ": found matrices ", shape(a), " and ", shape(b),
             ", expected equal shapes");
}

template <class Real>
void expect_factors(const char* function, const FactorPair<Real>& factors, MatrixView<const Real> m) {
  LB_EXPECTS(
      factors.left.rows == m.rows && factors.right.rows == m.cols && factors.left.cols == factors.right.cols,
      function, ": found factors ", shape(factors.left), " and ", shape(factors.right), ", expected (",
      m.rows, ", r) and (", m.cols, ", r)");
}

// Numbers of factor columns for which our kernels are faster than the GEMM library (oneDNN 2.6, AVX-512; see
// perf/kernels/low_rank): M Q folds across lanes for every element of the result, M^T Q with one column is a
// library's matrix-vector product, and L R^T has the shortest sums, on which libraries do worst.
struct Range {
  Index fewest, most;
};
constexpr Range kDotColumns = {1, 16};
constexpr Range kOuterColumns = {2, kOnePassColumns};
constexpr Range kProductColumns = {1, 64};

// Null when the product is left to the GEMM library or to a device.
template <class Real>
const LowRankKernels<Real>* skinny_kernels(MatrixView<const Real> factor, Range columns) {
  const bool skinny = factor.cols >= columns.fewest && factor.cols <= columns.most;
  return skinny && factor.device == nullptr ? low_rank_kernels<Real>() : nullptr;
}

Range columns_for(Op op) { return op == Op::kNone ? kDotColumns : kOuterColumns; }

// Rows of a panel whose `matrices` blocks of `cols` columns take 256 KiB, half of a small second-level cache.
template <class Real>
Index panel_rows(Index cols, Index matrices) {
  const Index row_bytes = std::max<Index>(1, cols) * matrices * static_cast<Index>(sizeof(Real));
  return std::max<Index>(kPanelRows, 256 * 1024 / row_bytes / kPanelRows * kPanelRows);
}

// Rows of a panel that the second cache holds together with what comes next.
template <class Real>
Index cached_rows(Index cols) {
  return std::min(8 * kPanelRows, panel_rows<Real>(cols, 1));
}

// A factor in the packs of the kernels: of every kFactorLanes rows the transposed. There is one of each kind
// at a time; their memory stays with the thread, since allocators give it back to the system after every
// call.
template <class Real>
class Packed {
 public:
  // Q
  explicit Packed(MatrixView<const Real> a) : r_(a.cols), elements_(memory(kOperand, a.rows)) {
    if (a.rows % kFactorLanes != 0)
      std::fill_n(from_row(a.rows - a.rows % kFactorLanes), kFactorLanes * r_, Real{0});
    for_rows(a.rows, [&](Index i, Real* to) {
      const Real* const from = a.row(i);
#pragma GCC unroll 4
      for (Index k = 0; k < r_; ++k) to[k * kFactorLanes] = from[k];
    });
  }
  // Zeros, for a result.
  Packed(Index rows, Index r) : r_(r), elements_(memory(kResult, rows)) {
    std::fill_n(elements_, elements(rows), Real{0});
  }

  void copy_to(MatrixView<Real> a) {
    for_rows(a.rows, [&](Index i, const Real* from) {
      Real* const to = a.row(i);
#pragma GCC unroll 4
      for (Index k = 0; k < r_; ++k) to[k] = from[k * kFactorLanes];
    });
  }
  const Real* data() const { return elements_; }
  // Of a row at the beginning of a pack.
  Real* from_row(Index i) { return elements_ + i * r_; }

 private:
  enum Kind : std::uint8_t { kOperand, kResult };
  Index elements(Index rows) const { return (rows + kFactorLanes - 1) / kFactorLanes * kFactorLanes * r_; }
  Real* memory(Kind kind, Index rows) const {
    thread_local Buffer<Real> kept[2];
    if (kept[kind].size() < elements(rows)) kept[kind] = Buffer<Real>(elements(rows));
    return kept[kind].data();
  }
  template <class Body>
  void for_rows(Index rows, Body body) {
    for (Index i = 0; i < rows; ++i) body(i, from_row(i / kFactorLanes * kFactorLanes) + i % kFactorLanes);
  }
  Index r_;
  Real* elements_;
};

// The right factor of a product as the kernels read it: (r, rows), rows of the factor contiguous.
template <class Real>
class Transposed {
 public:
  // An odd number of cache lines: columns of a power of two would all lie in the same sets of the cache.
  explicit Transposed(MatrixView<const Real> a)
      : stride_((a.rows + kLine - 1) / kLine / 2 * 2 * kLine + kLine), elements_(stride_ * a.cols) {
    for (Index begin = 0; begin < a.rows; begin += kLine) {
      const Index end = std::min(a.rows, begin + kLine);
      for (Index j = 0; j < a.cols; ++j) {
        for (Index i = begin; i < end; ++i) elements_[j * stride_ + i] = a(i, j);
      }
    }
  }
  const Real* data() const { return elements_.data(); }
  Index stride() const { return stride_; }

 private:
  static constexpr Index kLine = 64 / static_cast<Index>(sizeof(Real));
  Index stride_;
  Buffer<Real> elements_;
};

// The rows of a factor that belong to one panel, times alpha, as the kernels read them.
template <class Real>
class PackedRows {
 public:
  PackedRows(Real alpha, MatrixView<const Real> factor) {
    for (Index k = 0; k < factor.cols; ++k) {
      for (Index i = 0; i < factor.rows; ++i) packed_[k * kPanelRows + i] = alpha * factor(i, k);
    }
  }
  const Real* data() const { return packed_; }

 private:
  alignas(64) Real packed_[static_cast<std::size_t>(kPanelRows * kProductColumns.most)];
};

// The rows below a panel that ends at `end`. Where M <- M + alpha G comes first, its own loop streams better
// than with rows asked for ahead (768 x 768, 4 columns: 144 against 200 us).
template <class Real>
Ahead<Real> rows_below(MatrixView<const Real> m, Index end) {
  if (end >= m.rows) return {};
  return {m.row(end), m.row_stride};
}
// From row `begin` on in the order of memory, which streams best; nothing where rows have gaps between them.
template <class Real>
Ahead<Real> line_from(MatrixView<const Real> m, Index begin) {
  if (begin >= m.rows || m.row_stride != m.cols) return {};
  return {m.row(begin)};
}

// Reads a number of every cache line: the fastest way from memory into the caches.
template <class Real>
void read_ahead(MatrixView<const Real> m) {
  for (Index i = 0; i < m.rows; ++i) {
    const Real* const row = m.row(i);
    for (Index j = 0; j < m.cols; j += 64 / static_cast<Index>(sizeof(Real)))
      asm volatile("" : : "x"(row[j]));
  }
}

// body(begin, count) for every panel of `panel_rows` rows, in parallel.
template <class Body>
void for_panels(Index rows, Index panel_rows, Body body) {
  const Index panels = (rows + panel_rows - 1) / panel_rows;
#pragma omp parallel for schedule(static)
  for (Index panel = 0; panel < panels; ++panel)
    body(panel * panel_rows, std::min(panel_rows, rows - panel * panel_rows));
}

// M <- M + alpha G (no G: left as it is) ; out <- M Q. With G a panel stays in the first cache; without,
// packs of Q from the second serve more rows.
template <class Real>
void skinny_multiply(const LowRankKernels<Real>& kernels, Real alpha, const MatrixView<const Real>* g,
                     MatrixView<const Real> m, Real* writable, MatrixView<const Real> q,
                     MatrixView<Real> out) {
  const Packed<Real> packed(q);
  const VectorKernels<Real>& vectors = vector_kernels<Real>();
  for_panels(m.rows, g != nullptr ? kPanelRows : cached_rows<Real>(m.cols), [&](Index begin, Index rows) {
    if (g != nullptr) {
      for (Index i = begin; i < begin + rows; ++i)
        vectors.axpy(alpha, g->row(i), writable + i * m.row_stride, m.cols);
    } else {  // the first half was asked for beside the last panel
      read_ahead(m.row_block(begin + rows / 2, rows - rows / 2));
    }
    kernels.dot(m.row(begin), m.row_stride, rows, m.cols, packed.data(), q.cols, out.row(begin),
                out.row_stride, g == nullptr ? line_from(m, begin + rows) : Ahead<Real>{});
  });
}

// M <- M + alpha G (no G: left as it is) ; out <- M^T Q. Strips of columns, so that every sum runs over all
// rows in their order and the strip of out stays in the second cache: with 12 columns 2730 rows of it.
template <class Real>
void skinny_multiply_transposed(const LowRankKernels<Real>& kernels, Real alpha,
                                const MatrixView<const Real>* g, MatrixView<const Real> m, Real* writable,
                                MatrixView<const Real> q, MatrixView<Real> out) {
  constexpr Index kStripAlignment = 32, kStripBytes = 128 * 1024, kMostRows = 32;
  const Index r = q.cols;
  // The strip of out is read and written once for so many rows of M. Few columns wait for memory, which
  // delivers eight rows at a time better than sixteen; the rows ahead have to fit in beside the others.
  const Index most = g != nullptr ? kMostRows : std::min(kMostRows, panel_rows<Real>(m.cols, 2));
  const Index panel = r <= 8 ? 8 : most;
  Packed<Real> packed(m.cols, r);
  const VectorKernels<Real>& vectors = vector_kernels<Real>();
  const Index cached_cols = kStripBytes / (r * static_cast<Index>(sizeof(Real)));
  const Index of_thread = (m.cols + compute_threads() - 1) / compute_threads();
  const Index rounded = std::min(cached_cols, of_thread) + kStripAlignment - 1;
  const Index strip = std::max(Index{1}, rounded / kStripAlignment) * kStripAlignment;
  const Index strips = (m.cols + strip - 1) / strip;
#pragma omp parallel for schedule(static)
  for (Index s = 0; s < strips; ++s) {
    const Index col = s * strip, cols = std::min(strip, m.cols - col);
    const MatrixView<const Real> block = m.block(0, m.rows, col, cols);
    for (Index begin = 0; begin < m.rows; begin += panel) {
      const Index rows = std::min(panel, m.rows - begin);
      if (g != nullptr) {
        for (Index i = begin; i < begin + rows; ++i)
          vectors.axpy(alpha, g->row(i) + col, writable + i * m.row_stride + col, cols);
      }
      kernels.add_outer(block.row(begin), m.row_stride, rows, cols, q.row(begin), q.row_stride, r,
                        packed.from_row(col), g == nullptr ? rows_below(block, begin + rows) : Ahead<Real>{});
    }
  }
  packed.copy_to(out);
}

// P <- M Q ; R <- M^T P. Each product of a panel asks for half of the next one.
template <class Real>
void skinny_there_and_back(const LowRankKernels<Real>& kernels, MatrixView<const Real> m,
                           MatrixView<const Real> q, MatrixView<Real> p, MatrixView<Real> r) {
  const Packed<Real> there(q);
  Packed<Real> back(r.rows, r.cols);
  const Index panel = cached_rows<Real>(m.cols);
  read_ahead(m.row_block(0, std::min(panel, m.rows)));
  for (Index begin = 0; begin < m.rows; begin += panel) {
    const Index rows = std::min(panel, m.rows - begin), end = begin + rows;
    kernels.dot(m.row(begin), m.row_stride, rows, m.cols, there.data(), q.cols, p.row(begin), p.row_stride,
                line_from(m, end));
    kernels.add_outer(m.row(begin), m.row_stride, rows, m.cols, p.row(begin), p.row_stride, q.cols,
                      back.from_row(0), line_from(m, end + rows / 2));
  }
  back.copy_to(r);
}

// M <- beta M + alpha G ;  P <- M Q ;  R <- M^T P. The products of a panel ask for half of the next panel of
// M and of G; the other halves come as M <- beta M + alpha G reads them.
template <class Real>
double skinny_accumulate_there_and_back(const LowRankKernels<Real>& kernels, Real alpha,
                                        MatrixView<const Real> g, Real beta, MatrixView<Real> m,
                                        MatrixView<const Real> q, MatrixView<Real> p, MatrixView<Real> r) {
  const Packed<Real> there(q);
  Packed<Real> back(r.rows, r.cols);
  const VectorKernels<Real>& vectors = vector_kernels<Real>();
  const Index panel = cached_rows<Real>(m.cols);
  double squares = 0;
  for (Index begin = 0; begin < m.rows; begin += panel) {
    const Index rows = std::min(panel, m.rows - begin), end = begin + rows;
    for (Index i = begin; i < end; ++i)
      squares += vectors.accumulate(alpha, g.row(i), beta, m.row(i), m.cols);
    kernels.dot(m.row(begin), m.row_stride, rows, m.cols, there.data(), q.cols, p.row(begin), p.row_stride,
                line_from<Real>(m, end));
    kernels.add_outer(m.row(begin), m.row_stride, rows, m.cols, p.row(begin), p.row_stride, q.cols,
                      back.from_row(0), line_from(g, end));
  }
  back.copy_to(r);
  return squares;
}

// Rows [begin, begin + rows) of M <- beta M + alpha L R^T, R given transposed.
template <class Real>
void skinny_add_product(const LowRankKernels<Real>& kernels, Real alpha, MatrixView<const Real> left,
                        const Transposed<Real>& right_t, Real beta, MatrixView<Real> m, Index begin,
                        Index rows) {
  const PackedRows<Real> packed(alpha, left.row_block(begin, rows));
  kernels.add_product(beta, m.row(begin), m.row_stride, rows, m.cols, packed.data(), left.cols,
                      right_t.data(), right_t.stride(),
                      beta == 0 ? Ahead<Real>{} : rows_below<Real>(m, begin + rows));
}

// U <- lambda U + D ;  W <- decay W - eta (D + U)
template <class Real>
void update_rows(Real lambda, Real eta, Real decay, MatrixView<const Real> d, MatrixView<Real> u,
                 MatrixView<Real> w, Index begin) {
  const Index together = d.device == nullptr ? 1 : d.rows;  // a row stays in the first cache
  for (Index i = 0; i < d.rows; i += together) {
    const MatrixView<const Real> own = d.row_block(i, together);
    const MatrixView<Real> momentum = u.row_block(begin + i, together);
    const MatrixView<Real> weight = w.row_block(begin + i, together);
    scale<Real>(lambda, momentum);
    add<Real>(Real{1}, own, Real{1}, momentum);
    scale<Real>(decay, weight);
    add<Real>(-eta, own, Real{1}, weight);
    add<Real>(-eta, momentum, Real{1}, weight);
  }
}

}  // namespace

template <class Real>
std::vector<NamedLowRankKernels<Real>> runnable_low_rank_kernels() {
  const CpuInfo info = cpu_info();
  using namespace kernel_tables;
  return runnable<Real, NamedLowRankKernels, LowRankKernels>(
      {{"avx512", info.avx512, avx512::float_low_rank_kernels, avx512::double_low_rank_kernels},
       {"avx2", info.avx2, avx2::float_low_rank_kernels, avx2::double_low_rank_kernels}});
}

template <class Real>
const LowRankKernels<Real>* low_rank_kernels() {
  static const LowRankKernels<Real>* const fastest = [] {
    const auto sets = runnable_low_rank_kernels<Real>();
    return sets.empty() ? nullptr : sets.front().kernels;
  }();
  return fastest;
}

template <class Real>
void accumulate_and_multiply(Real alpha, MatrixView<const Real> g, MatrixView<Real> m, Op op,
                             MatrixView<const Real> q, MatrixView<Real> out) {
  expect_same_shape<Real>("accumulate_and_multiply", m, g);
  expect_product<Real>("accumulate_and_multiply", op, m, q, out);
  if (const auto* kernels = skinny_kernels<Real>(q, columns_for(op))) {
    if (op == Op::kNone) return skinny_multiply<Real>(*kernels, alpha, &g, m, m.data, q, out);
    return skinny_multiply_transposed<Real>(*kernels, alpha, &g, m, m.data, q, out);
  }
  add<Real>(alpha, g, Real{1}, m);
  gemm<Real>(op, Op::kNone, Real{1}, m, q, Real{0}, out);
}

template <class Real>
void accumulate_and_multiply(const Scalar& alpha, MatrixView<const Real> g, MatrixView<Real> m, Op op,
                             MatrixView<const Real> q, MatrixView<Real> out) {
  if (alpha.number.device == nullptr)
    return accumulate_and_multiply<Real>(alpha.value<Real>(), g, m, op, q, out);
  add<Real>(alpha, g, Real{1}, m);
  multiply<Real>(op, m, q, out);
}

template <class Real>
void multiply(Op op, MatrixView<const Real> m, MatrixView<const Real> q, MatrixView<Real> out) {
  expect_product<Real>("multiply", op, m, q, out);
  if (const auto* kernels = skinny_kernels<Real>(q, columns_for(op))) {
    if (op == Op::kNone) return skinny_multiply<Real>(*kernels, Real{0}, nullptr, m, nullptr, q, out);
    return skinny_multiply_transposed<Real>(*kernels, Real{0}, nullptr, m, nullptr, q, out);
  }
  gemm<Real>(op, Op::kNone, Real{1}, m, q, Real{0}, out);
}

template <class Real>
void multiply_there_and_back(MatrixView<const Real> m, MatrixView<const Real> q, MatrixView<Real> p,
                             MatrixView<Real> r) {
  expect_product<Real>("multiply_there_and_back", Op::kNone, m, q, p);
  expect_product<Real>("multiply_there_and_back", Op::kTranspose, m, p, r);
  const auto* const kernels = skinny_kernels<Real>(q, kOuterColumns);
  if (kernels != nullptr && compute_threads() == 1) return skinny_there_and_back<Real>(*kernels, m, q, p, r);
  multiply<Real>(Op::kNone, m, q, p);
  multiply<Real>(Op::kTranspose, m, p, r);
}

template <class Real>
double accumulate(Real alpha, MatrixView<const Real> g, Real beta, MatrixView<Real> m) {
  expect_same_shape<Real>("accumulate", m, g);
  if (computing_device<Real>("accumulate", g, m) != nullptr) {
    add<Real>(alpha, g, beta, m);
    return sum_of_squares<Real>(m);
  }
  Buffer<double> squares(m.rows);
  for_panels(m.rows, kPanelRows, [&](Index begin, Index rows) {
    for (Index i = begin; i < begin + rows; ++i)
      squares[i] = vector_kernels<Real>().accumulate(alpha, g.row(i), beta, m.row(i), m.cols);
  });
  return std::accumulate(squares.span().begin(), squares.span().end(), 0.0);
}

template <class Real>
double accumulate_and_multiply_there_and_back(Real alpha, MatrixView<const Real> g, Real beta,
                                              MatrixView<Real> m, MatrixView<const Real> q,
                                              MatrixView<Real> p, MatrixView<Real> r) {
  expect_same_shape<Real>("accumulate_and_multiply_there_and_back", m, g);
  expect_product<Real>("accumulate_and_multiply_there_and_back", Op::kNone, m, q, p);
  expect_product<Real>("accumulate_and_multiply_there_and_back", Op::kTranspose, m, p, r);
  const auto* const kernels = skinny_kernels<Real>(q, kOuterColumns);
  if (kernels != nullptr && compute_threads() == 1)
    return skinny_accumulate_there_and_back<Real>(*kernels, alpha, g, beta, m, q, p, r);
  const double squares = accumulate<Real>(alpha, g, beta, m);
  multiply_there_and_back<Real>(m, q, p, r);
  return squares;
}

template <class Real>
void add_product(Real alpha, const FactorPair<Real>& factors, Real beta, MatrixView<Real> m) {
  expect_factors<Real>("add_product", factors, m);
  if (const auto* kernels = skinny_kernels<Real>(factors.left, kProductColumns)) {
    const Transposed<Real> right_t(factors.right);
    return for_panels(m.rows, kPanelRows, [&](Index begin, Index rows) {
      skinny_add_product<Real>(*kernels, alpha, factors.left, right_t, beta, m, begin, rows);
    });
  }
  gemm<Real>(Op::kNone, Op::kTranspose, alpha, factors.left, factors.right, beta, m);
}

template <class Real>
void decompress(const FactorPair<Real>& sent, const FactorPair<Real>& own, MatrixView<Real> d,
                MatrixView<Real> e) {
  expect_same_shape<Real>("decompress", d, e);
  expect_factors<Real>("decompress", sent, d);
  expect_factors<Real>("decompress", own, e);
  add_product<Real>(Real{-1}, own, Real{1}, e);
  add_product<Real>(Real{1}, sent, Real{0}, d);
}

template <class Real>
void decompress_and_update(const FactorPair<Real>& sent, const FactorPair<Real>& own, Real lambda, Real eta,
                           Real decay, MatrixView<Real> e, MatrixView<Real> u, MatrixView<Real> w) {
  expect_same_shape<Real>("decompress_and_update", e, u);
  expect_same_shape<Real>("decompress_and_update", e, w);
  expect_factors<Real>("decompress_and_update", sent, e);
  expect_factors<Real>("decompress_and_update", own, e);
  const auto* kernels = skinny_kernels<Real>(sent.left, kProductColumns);
  if (kernels != nullptr && own.left.cols == sent.left.cols) {
    const Transposed<Real> sent_t(sent.right), own_t(own.right);
    return for_panels(e.rows, kPanelRows, [&](Index begin, Index rows) {
      Buffer<Real> panel(rows * e.cols);
      const MatrixView<Real> d = panel.matrix(0, rows, e.cols);
      skinny_add_product<Real>(*kernels, Real{-1}, own.left, own_t, Real{1}, e, begin, rows);
      skinny_add_product<Real>(*kernels, Real{1}, sent.left.row_block(begin, rows), sent_t, Real{0}, d, 0,
                               rows);
      update_rows<Real>(lambda, eta, decay, d, u, w, begin);
    });
  }
  Device* const device = computing_device<Real>("decompress_and_update", e, u, w);
  const Index block_rows = device == nullptr ? panel_rows<Real>(e.cols, 4) : e.rows;
  Buffer<Real> block(std::min(block_rows, e.rows) * e.cols, device);
  for (Index begin = 0; begin < e.rows; begin += block_rows) {
    const Index rows = std::min(block_rows, e.rows - begin);
    const MatrixView<Real> d = block.matrix(0, rows, e.cols);
    add_product<Real>(Real{-1}, {own.left.row_block(begin, rows), own.right}, Real{1},
                      e.row_block(begin, rows));
    add_product<Real>(Real{1}, {sent.left.row_block(begin, rows), sent.right}, Real{0}, d);
    update_rows<Real>(lambda, eta, decay, d, u, w, begin);
  }
}

template std::vector<NamedLowRankKernels<float>> runnable_low_rank_kernels<float>();
template std::vector<NamedLowRankKernels<double>> runnable_low_rank_kernels<double>();
template const LowRankKernels<float>* low_rank_kernels<float>();
template const LowRankKernels<double>* low_rank_kernels<double>();
#define LB_INSTANTIATE(Real)                                                                               \
  template void accumulate_and_multiply<Real>(Real, MatrixView<const Real>, MatrixView<Real>, Op,          \
                                              MatrixView<const Real>, MatrixView<Real>);                   \
  template void accumulate_and_multiply<Real>(const Scalar&, MatrixView<const Real>, MatrixView<Real>, Op, \
                                              MatrixView<const Real>, MatrixView<Real>);                   \
  template void multiply<Real>(Op, MatrixView<const Real>, MatrixView<const Real>, MatrixView<Real>);      \
  template void multiply_there_and_back<Real>(MatrixView<const Real>, MatrixView<const Real>,              \
                                              MatrixView<Real>, MatrixView<Real>);                         \
  template double accumulate<Real>(Real, MatrixView<const Real>, Real, MatrixView<Real>);                  \
  template double accumulate_and_multiply_there_and_back<Real>(Real, MatrixView<const Real>, Real,         \
                                                               MatrixView<Real>, MatrixView<const Real>,   \
                                                               MatrixView<Real>, MatrixView<Real>);        \
  template void add_product<Real>(Real, const FactorPair<Real>&, Real, MatrixView<Real>);                  \
  template void decompress<Real>(const FactorPair<Real>&, const FactorPair<Real>&, MatrixView<Real>,       \
                                 MatrixView<Real>);                                                        \
  template void decompress_and_update<Real>(const FactorPair<Real>&, const FactorPair<Real>&, Real, Real,  \
                                            Real, MatrixView<Real>, MatrixView<Real>, MatrixView<Real>);
LB_INSTANTIATE(float)
LB_INSTANTIATE(double)
#undef LB_INSTANTIATE

}  // namespace lowband
