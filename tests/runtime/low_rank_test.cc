#include "runtime/low_rank.h"

#include "runtime/buffer.h"
#include "runtime/cpu.h"
#include "runtime/cpu/kernels/low_rank_tables.h"
#include "runtime/random.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include <gtest/gtest.h>

namespace lowband {
namespace {

// A matrix of normal numbers with two more elements behind each row, which nobody may touch.
template <class Real>
class Padded {
 public:
  Padded(std::string_view name, Index rows, Index cols)
      : rows_(rows), cols_(cols), store_(rows * (cols + 2)) {
    const RandomStream stream(5, name);
    for (Index i = 0; i < store_.size(); ++i) store_[i] = static_cast<Real>(stream.normal(i));
    first_ = std::vector<Real>(store_.span().begin(), store_.span().end());
  }
  MatrixView<Real> view() { return {store_.data(), rows_, cols_, cols_ + 2}; }
  double operator()(Index i, Index j) const { return static_cast<double>(store_[i * (cols_ + 2) + j]); }
  double before(Index i, Index j) const {
    return static_cast<double>(first_[static_cast<std::size_t>(i * (cols_ + 2) + j)]);
  }
  void fill(Real value) {
    for (Index i = 0; i < rows_; ++i) std::fill_n(view().row(i), cols_, value);
  }
  void expect_padding_untouched(const char* name) const {
    for (Index i = 0; i < rows_; ++i) {
      for (Index j = cols_; j < cols_ + 2; ++j) EXPECT_EQ((*this)(i, j), before(i, j)) << name;
    }
  }

 private:
  Index rows_, cols_;
  Buffer<Real> store_;
  std::vector<Real> first_;
};

// A sum in double and the sum of the magnitudes of its terms, from which the rounding bound follows.
struct Sum {
  double value = 0, magnitude = 0;
  void add(double term) { value += term, magnitude += std::abs(term); }
};

struct Shape {
  Index rows, cols, r;
};

template <class Real>
class LowRank : public testing::Test {
 public:
  // Tall, wide, single rows and columns, every remainder of 4 and 8 rows, of 16 lanes and of 4 factor
  // columns, r = 1 and r = min(rows, cols), and more rows than one panel.
  static std::vector<Shape> shapes() {
    std::vector<Shape> shapes = {{0, 5, 2},    {5, 0, 2},      {5, 7, 0},     {1, 1, 1},    {1, 40, 1},
                                 {40, 1, 1},   {7, 5, 5},      {9, 33, 9},    {33, 9, 9},   {16, 16, 16},
                                 {17, 31, 17}, {64, 48, 4},    {70, 130, 70}, {131, 67, 2}, {30, 2050, 3},
                                 {700, 45, 8}, {301, 257, 130}};
    for (Index r = 1; r <= 37; ++r) shapes.push_back({38 + r % 9, 40 + 3 * r % 17, r});
    return shapes;
  }
  // n products summed in any order: |error| <= (n + roundings beside) eps sum |terms|
  static void expect_sum(double actual, const Sum& sum, Index terms, const char* what) {
    const double bound =
        std::numeric_limits<Real>::epsilon() * (static_cast<double>(terms) + 4) * sum.magnitude;
    ASSERT_NEAR(actual, sum.value, bound) << what;
  }
  static Sum product(const Padded<Real>& left, const Padded<Real>& right, Index r, Index i, Index j) {
    Sum sum;
    for (Index k = 0; k < r; ++k) sum.add(left.before(i, k) * right.before(j, k));
    return sum;
  }
};
using Reals = testing::Types<float, double>;
TYPED_TEST_SUITE(LowRank, Reals);

TYPED_TEST(LowRank, AccumulatesAndMultiplies) {
  using Real = TypeParam;
  for (const auto& [rows, cols, r] : this->shapes()) {
    for (const Op op : {Op::kNone, Op::kTranspose}) {
      SCOPED_TRACE(cat(rows, " x ", cols, ", r ", r, op == Op::kNone ? "" : " transposed"));
      const Index outer = op == Op::kNone ? rows : cols, inner = op == Op::kNone ? cols : rows;
      Padded<Real> g("g", rows, cols), m("m", rows, cols), q("q", inner, r), out("out", outer, r);
      Padded<Real> again("out", outer, r);
      out.fill(std::numeric_limits<Real>::quiet_NaN());
      again.fill(std::numeric_limits<Real>::quiet_NaN());
      accumulate_and_multiply<Real>(Real(0.75), g.view(), m.view(), op, q.view(), out.view());
      for (Index i = 0; i < rows; ++i) {
        for (Index j = 0; j < cols; ++j) {
          Sum sum;
          sum.add(m.before(i, j)), sum.add(0.75 * g.before(i, j));
          this->expect_sum(m(i, j), sum, 2, "M");
        }
      }
      multiply<Real>(op, m.view(), q.view(), again.view());
      for (Index i = 0; i < outer; ++i) {
        for (Index k = 0; k < r; ++k) {
          Sum sum;
          for (Index j = 0; j < inner; ++j) sum.add((op == Op::kNone ? m(i, j) : m(j, i)) * q.before(j, k));
          this->expect_sum(out(i, k), sum, inner, "out");
          this->expect_sum(again(i, k), sum, inner, "multiply");
        }
      }
      g.expect_padding_untouched("g"), m.expect_padding_untouched("m");
      out.expect_padding_untouched("out"), again.expect_padding_untouched("again");
    }
  }
}

// The sum itself is that of `multiply`, whose rounding is bounded above.
TYPED_TEST(LowRank, MultipliesThereAndBackAsTwoMultiplicationsDo) {
  using Real = TypeParam;
  for (const auto& [rows, cols, r] : this->shapes()) {
    for (const int threads : {1, std::min(2, most_compute_threads())}) {
      SCOPED_TRACE(cat(rows, " x ", cols, ", r ", r, ", threads ", threads));
      const int before = compute_threads();
      set_compute_threads(threads);
      Padded<Real> m("m", rows, cols), q("q", cols, r), p("p", rows, r), back("r", cols, r);
      Padded<Real> p_alone("p", rows, r), back_alone("r", cols, r), both("q", cols, r);
      multiply<Real>(Op::kNone, m.view(), q.view(), p_alone.view());
      multiply<Real>(Op::kTranspose, m.view(), p_alone.view(), back_alone.view());
      p.fill(std::numeric_limits<Real>::quiet_NaN()), back.fill(std::numeric_limits<Real>::quiet_NaN());
      multiply_there_and_back<Real>(m.view(), q.view(), p.view(), back.view());
      multiply_there_and_back<Real>(m.view(), both.view(), p.view(), both.view());
      set_compute_threads(before);
      for (Index k = 0; k < r; ++k) {
        for (Index i = 0; i < rows; ++i) ASSERT_EQ(p(i, k), p_alone(i, k));
        for (Index j = 0; j < cols; ++j) {
          ASSERT_EQ(back(j, k), back_alone(j, k));
          ASSERT_EQ(both(j, k), back_alone(j, k)) << "in the memory of Q";
        }
      }
      p.expect_padding_untouched("p"), back.expect_padding_untouched("r");
      both.expect_padding_untouched("r in q");
    }
  }
}

// |M|^2 to the rounding of a sum in double.
TYPED_TEST(LowRank, Accumulates) {
  using Real = TypeParam;
  for (const auto& [rows, cols, r] : this->shapes()) {
    SCOPED_TRACE(cat(rows, " x ", cols));
    Padded<Real> g("g", rows, cols), m("m", rows, cols);
    const double found = accumulate<Real>(Real(0.75), g.view(), Real(0.5), m.view());
    Sum squares;
    for (Index i = 0; i < rows; ++i) {
      for (Index j = 0; j < cols; ++j) {
        Sum sum;
        sum.add(0.5 * m.before(i, j)), sum.add(0.75 * g.before(i, j));
        this->expect_sum(m(i, j), sum, 2, "M");
        squares.add(m(i, j) * m(i, j));
      }
    }
    const double terms = static_cast<double>(rows * cols);
    EXPECT_NEAR(found, squares.value, 2 * terms * std::numeric_limits<double>::epsilon() * squares.value);
    g.expect_padding_untouched("g"), m.expect_padding_untouched("m");
  }
}

// Bit by bit; |M|^2 is the same on one thread and on several.
TYPED_TEST(LowRank, AccumulatesAndMultipliesThereAndBackAsSeparatePassesDo) {
  using Real = TypeParam;
  std::vector<Shape> shapes = this->shapes();
  for (const Index r : {8, 12, 16})
    shapes.push_back({203, 770, r});  // several panels, the last a part of one
  for (const auto& [rows, cols, r] : shapes) {
    Padded<Real> m_once("m", rows, cols), g("g", rows, cols), q("q", cols, r);
    const int before = compute_threads();
    set_compute_threads(1);
    const double squares = accumulate<Real>(Real(0.7), g.view(), Real(0.9), m_once.view());
    for (const int threads : {1, std::min(2, most_compute_threads())}) {
      SCOPED_TRACE(cat(rows, " x ", cols, ", r ", r, ", threads ", threads));
      set_compute_threads(threads);
      Padded<Real> m_alone("m", rows, cols), p_alone("p", rows, r), back_alone("r", cols, r);
      EXPECT_EQ(accumulate<Real>(Real(0.7), g.view(), Real(0.9), m_alone.view()), squares);
      multiply<Real>(Op::kNone, m_alone.view(), q.view(), p_alone.view());
      multiply<Real>(Op::kTranspose, m_alone.view(), p_alone.view(), back_alone.view());
      Padded<Real> m("m", rows, cols), p("p", rows, r), both("q", cols, r);
      p.fill(std::numeric_limits<Real>::quiet_NaN());
      const double found = accumulate_and_multiply_there_and_back<Real>(
          Real(0.7), g.view(), Real(0.9), m.view(), both.view(), p.view(), both.view());
      set_compute_threads(before);
      ASSERT_EQ(found, squares);
      for (Index i = 0; i < rows; ++i) {
        for (Index j = 0; j < cols; ++j) ASSERT_EQ(m(i, j), m_alone(i, j));
        for (Index k = 0; k < r; ++k) ASSERT_EQ(p(i, k), p_alone(i, k));
      }
      for (Index j = 0; j < cols; ++j) {
        for (Index k = 0; k < r; ++k) ASSERT_EQ(both(j, k), back_alone(j, k)) << "in the memory of Q";
      }
      g.expect_padding_untouched("g"), m.expect_padding_untouched("m");
      p.expect_padding_untouched("p"), both.expect_padding_untouched("r in q");
    }
  }
}

TYPED_TEST(LowRank, AddsProducts) {
  using Real = TypeParam;
  for (const auto& [rows, cols, r] : this->shapes()) {
    for (const double beta : {0.0, 1.0, 0.5}) {
      SCOPED_TRACE(cat(rows, " x ", cols, ", r ", r, ", beta ", beta));
      Padded<Real> left("l", rows, r), right("r", cols, r), m("m", rows, cols);
      if (beta == 0) m.fill(std::numeric_limits<Real>::quiet_NaN());
      add_product<Real>(Real(-1.5), {left.view(), right.view()}, Real(beta), m.view());
      for (Index i = 0; i < rows; ++i) {
        for (Index j = 0; j < cols; ++j) {
          Sum sum = this->product(left, right, r, i, j);
          sum = {-1.5 * sum.value, 1.5 * sum.magnitude};
          sum.add(beta * m.before(i, j));
          this->expect_sum(m(i, j), sum, r + 1, "M");
        }
      }
      m.expect_padding_untouched("m");
    }
  }
}

TYPED_TEST(LowRank, DecompressesWithFeedback) {
  using Real = TypeParam;
  for (const auto& [rows, cols, r] : this->shapes()) {
    SCOPED_TRACE(cat(rows, " x ", cols, ", r ", r));
    Padded<Real> left("l", rows, r), right("r", cols, r), own("own", cols, r);
    Padded<Real> d("d", rows, cols), e("e", rows, cols);
    Padded<Real> e2("e", rows, cols), u("u", rows, cols), w("w", rows, cols);
    d.fill(std::numeric_limits<Real>::quiet_NaN());
    const FactorPair<Real> sent{left.view(), right.view()}, kept{left.view(), own.view()};
    decompress<Real>(sent, kept, d.view(), e.view());
    decompress_and_update<Real>(sent, kept, Real(0.5), Real(0.25), Real(0.875), e2.view(), u.view(),
                                w.view());
    for (Index i = 0; i < rows; ++i) {
      for (Index j = 0; j < cols; ++j) {
        const Sum product = this->product(left, right, r, i, j);
        this->expect_sum(d(i, j), product, r, "D");
        Sum residual = this->product(left, own, r, i, j);
        residual.value = -residual.value;
        residual.add(e.before(i, j));
        this->expect_sum(e(i, j), residual, r + 1, "E");
        this->expect_sum(e2(i, j), residual, r + 1, "E of the update");
        Sum momentum = product;
        momentum.add(0.5 * u.before(i, j));
        this->expect_sum(u(i, j), momentum, r + 2, "U");
        Sum weight{-0.25 * (product.value + momentum.value), 0.25 * (product.magnitude + momentum.magnitude)};
        weight.add(0.875 * w.before(i, j));
        this->expect_sum(w(i, j), weight, r + 4, "W");
      }
    }
    d.expect_padding_untouched("d"), e.expect_padding_untouched("e"), e2.expect_padding_untouched("e2");
    u.expect_padding_untouched("u"), w.expect_padding_untouched("w");
  }
}

// More rows than sums are kept for, and more columns than the first cache holds of the factor.
TYPED_TEST(LowRank, ProductsOfALargePanelHaveTheBitsOfItsRows) {
  using Real = TypeParam;
  constexpr Index kRows = 71, kCols = 1100, kColumns = 13, kPacks = (kCols + kFactorLanes - 1) / kFactorLanes;
  Padded<Real> m("m", kRows, kCols), factor("q", kPacks * kFactorLanes, kColumns), left("l", kRows, kColumns);
  Buffer<Real> q(kPacks * kFactorLanes * kColumns);
  for (Index j = 0; j < kCols; ++j) {
    for (Index k = 0; k < kColumns; ++k)
      q[(j / kFactorLanes * kColumns + k) * kFactorLanes + j % kFactorLanes] = factor.view()(j, k);
  }
  const auto results = [&](const LowRankKernels<Real>& kernels, Index step) {
    Buffer<Real> dots(kRows * kColumns), outer(q.size());
    for (Index i = 0; i < kRows; i += step) {
      const Index rows = std::min(step, kRows - i);
      kernels.dot(m.view().row(i), kCols + 2, rows, kCols, q.data(), kColumns, dots.data() + i * kColumns,
                  kColumns, {});
      kernels.add_outer(m.view().row(i), kCols + 2, rows, kCols, left.view().row(i), kColumns + 2, kColumns,
                        outer.data(), {});
    }
    std::vector<Real> all(dots.span().begin(), dots.span().end());
    all.insert(all.end(), outer.span().begin(), outer.span().end());
    return all;
  };
  const auto sets = runnable_low_rank_kernels<Real>();
  for (const auto& set : sets) {
    EXPECT_EQ(results(*set.kernels, kRows), results(*sets.back().kernels, 1)) << set.name;
    EXPECT_EQ(results(*set.kernels, 1), results(*set.kernels, kRows)) << set.name;
  }
}

TYPED_TEST(LowRank, BitsDependOnNeitherInstructionSetNorPanelsNorThreads) {
  using Real = TypeParam;
  for (const Shape shape : {Shape{8, 100, 13}, Shape{5, 37, 4}, Shape{8, 64, 32}}) {
    const auto [rows, cols, r] = shape;
    SCOPED_TRACE(cat(rows, " x ", cols, ", r ", r));
    Padded<Real> m("m", rows, cols), qt("q", r, cols);
    std::vector<Real> packed(static_cast<std::size_t>(kPanelRows * r));
    for (std::size_t i = 0; i < packed.size(); ++i) packed[i] = qt.view()(0, static_cast<Index>(i) % cols);
    Buffer<Real> blocks(cols * cols);
    for (Index i = 0; i < blocks.size(); ++i)
      blocks[i] = qt.view()(i % r, i % cols) / static_cast<Real>(8 * cols);
    const Index padded = (cols + kFactorLanes - 1) / kFactorLanes * kFactorLanes;
    const auto in_packs = [r](Index j, Index k) {
      return (j / kFactorLanes * r + k) * kFactorLanes + j % kFactorLanes;
    };
    Buffer<Real> q(padded * r);
    for (Index k = 0; k < r; ++k) {
      for (Index j = 0; j < cols; ++j) q[in_packs(j, k)] = qt.view()(k, j);
    }
    // All of the panel at once, and row by row.
    const auto results = [&](const LowRankKernels<Real>& kernels, Index step) {
      Padded<Real> out("out", rows, r), sum("sum", rows, cols);
      Buffer<Real> outer(padded * r);
      for (Index i = 0; i < rows; i += step) {
        const Index count = std::min(step, rows - i);
        kernels.dot(m.view().row(i), cols + 2, count, cols, q.data(), r, out.view().row(i), r + 2, {});
        kernels.add_outer(m.view().row(i), cols + 2, count, cols, packed.data() + i * r, r, r, outer.data(),
                          {});
        kernels.add_product(Real(0.5), sum.view().row(i), cols + 2, count, cols, packed.data() + i, r,
                            qt.view().data, cols + 2, {});
      }
      Padded<Real> p("m", rows, cols);
      const Index g_stride = gram_stride(cols);
      Buffer<double> wide(step * cols + kGramTile), g(g_stride * g_stride);
      for (Index i = 0; i < rows; i += step) {
        const Index count = std::min(step, rows - i);
        kernels.add_gram(m.view().row(i), cols + 2, count, cols, wide.data(), g.data());
        kernels.solve_upper(p.view().row(i), cols + 2, count, cols, blocks.data());
      }
      p.expect_padding_untouched("p");
      std::vector<double> all;
      for (Index i = 0; i < rows; ++i) {
        for (Index k = 0; k < r; ++k) all.push_back(out(i, k));
        for (Index j = 0; j < cols; ++j) all.insert(all.end(), {sum(i, j), p(i, j)});
      }
      for (Index i = 0; i < cols; ++i) {
        for (Index j = i; j < cols; ++j) all.push_back(g[i * g_stride + j]);
      }
      for (Index k = 0; k < r; ++k) {
        for (Index j = 0; j < cols; ++j) all.push_back(outer[in_packs(j, k)]);
      }
      return all;
    };
    const auto sets = runnable_low_rank_kernels<Real>();
    for (const auto& set : sets) {
      EXPECT_EQ(results(*set.kernels, kPanelRows), results(*sets.back().kernels, kPanelRows)) << set.name;
      EXPECT_EQ(results(*set.kernels, 1), results(*set.kernels, kPanelRows)) << set.name << " row by row";
    }
  }
  if (most_compute_threads() < 3) return;
  const int before = compute_threads();
  for (const Op op : {Op::kNone, Op::kTranspose}) {
    std::vector<std::vector<double>> runs;
    for (const int threads : {1, 3}) {
      set_compute_threads(threads);
      Padded<Real> g("g", 61, 203), m("m", 61, 203);
      const Index outer = op == Op::kNone ? 61 : 203;
      Padded<Real> q("q", 264 - outer, 7), out("out", outer, 7);
      accumulate_and_multiply<Real>(Real(0.3), g.view(), m.view(), op, q.view(), out.view());
      runs.emplace_back();
      for (Index i = 0; i < outer; ++i) {
        for (Index k = 0; k < 7; ++k) runs.back().push_back(out(i, k));
      }
    }
    set_compute_threads(before);
    EXPECT_EQ(runs[0], runs[1]);
  }
}

TYPED_TEST(LowRank, ShapesThatDoNotFitAreNamed) {
  using Real = TypeParam;
  Buffer<Real> store(64);
  const auto view = [&](Index rows, Index cols) { return store.matrix(0, rows, cols); };
  EXPECT_THROW(accumulate_and_multiply<Real>(1, view(3, 4), view(4, 3), Op::kNone, view(3, 2), view(4, 2)),
               InvalidArgument);
  EXPECT_THROW(multiply<Real>(Op::kTranspose, view(4, 3), view(3, 2), view(4, 2)), InvalidArgument);
  EXPECT_THROW(multiply_there_and_back<Real>(view(4, 3), view(3, 2), view(4, 2), view(4, 2)),
               InvalidArgument);
  EXPECT_THROW(accumulate<Real>(1, view(3, 4), 1, view(4, 3)), InvalidArgument);
  EXPECT_THROW(accumulate_and_multiply_there_and_back<Real>(1, view(3, 4), 1, view(4, 3), view(3, 2),
                                                            view(4, 2), view(3, 2)),
               InvalidArgument);
  EXPECT_THROW(accumulate_and_multiply_there_and_back<Real>(1, view(4, 3), 1, view(4, 3), view(3, 2),
                                                            view(4, 2), view(4, 2)),
               InvalidArgument);
  EXPECT_THROW(add_product<Real>(1, {view(4, 2), view(3, 1)}, 1, view(4, 3)), InvalidArgument);
  EXPECT_THROW(decompress<Real>({view(4, 2), view(3, 2)}, {view(3, 2), view(4, 2)}, view(4, 3), view(4, 3)),
               InvalidArgument);
}

}  // namespace
}  // namespace lowband
