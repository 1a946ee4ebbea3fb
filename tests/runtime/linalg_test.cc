#include "runtime/linalg.h"

#include "runtime/random.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

template <class Real>
Buffer<Real> gaussian(Index elements, std::string_view name) {
  Buffer<Real> buffer(elements);
  const RandomStream stream(11, name);
  for (Index i = 0; i < elements; ++i) buffer[i] = static_cast<Real>(stream.normal(i));
  return buffer;
}

template <class Real>
class Linalg : public testing::Test {
 public:
  static constexpr double kEpsilon = std::numeric_limits<Real>::epsilon();
};
using Reals = testing::Types<float, double>;
TYPED_TEST_SUITE(Linalg, Reals);

TYPED_TEST(Linalg, GemmEqualsTripleLoopForEveryTransposition) {
  using Real = TypeParam;
  struct Shape {
    Index m, n, k;
  };
  for (const auto [m, n, k] : {Shape{5, 7, 3}, Shape{1, 1, 1}, Shape{64, 33, 17}, Shape{2, 130, 65}}) {
    for (const Op op_a : {Op::kNone, Op::kTranspose}) {
      for (const Op op_b : {Op::kNone, Op::kTranspose}) {
        // A stride larger than the row, and a C with neighbours that must not be touched.
        const Index a_rows = op_a == Op::kNone ? m : k, a_cols = op_a == Op::kNone ? k : m;
        const Index b_rows = op_b == Op::kNone ? k : n, b_cols = op_b == Op::kNone ? n : k;
        auto a_store = gaussian<Real>(a_rows * (a_cols + 2), "a");
        auto b_store = gaussian<Real>(b_rows * (b_cols + 1), "b");
        auto c_store = gaussian<Real>(m * (n + 3), "c");
        const auto before = gaussian<Real>(m * (n + 3), "c");
        const MatrixView<const Real> a{a_store.data(), a_rows, a_cols, a_cols + 2};
        const MatrixView<const Real> b{b_store.data(), b_rows, b_cols, b_cols + 1};
        const MatrixView<Real> c{c_store.data(), m, n, n + 3};
        gemm<Real>(op_a, op_b, Real{2}, a, b, Real{-1}, c);
        for (Index i = 0; i < m; ++i) {
          for (Index j = 0; j < n; ++j) {
            double sum = 0, magnitude = 0;
            for (Index l = 0; l < k; ++l) {
              const double term = static_cast<double>(op_a == Op::kNone ? a(i, l) : a(l, i)) *
                                  static_cast<double>(op_b == Op::kNone ? b(l, j) : b(j, l));
              sum += term;
              magnitude += std::abs(term);
            }
            const auto old = static_cast<double>(before[i * (n + 3) + j]);
            const double bound =
                TestFixture::kEpsilon * (static_cast<double>(k) + 3) * (2 * magnitude + std::abs(old));
            ASSERT_NEAR(static_cast<double>(c(i, j)), 2 * sum - old, bound);
          }
          for (Index j = n; j < n + 3; ++j) ASSERT_EQ(c_store[i * (n + 3) + j], before[i * (n + 3) + j]);
        }
      }
    }
  }
}

TYPED_TEST(Linalg, GemmWithBetaZeroIgnoresOldNaN) {
  using Real = TypeParam;
  Buffer<Real> a(1), b(1), c(1);
  a[0] = 3, b[0] = 5, c[0] = std::numeric_limits<Real>::quiet_NaN();
  gemm<Real>(Op::kNone, Op::kNone, 1, a.matrix(0, 1, 1), b.matrix(0, 1, 1), 0, c.matrix(0, 1, 1));
  EXPECT_EQ(c[0], Real{15});
  c[0] = std::numeric_limits<Real>::quiet_NaN();
  gemm<Real>(Op::kNone, Op::kNone, 1, MatrixView<Real>{a.data(), 1, 0}, MatrixView<Real>{b.data(), 0, 1}, 0,
             c.matrix(0, 1, 1));
  EXPECT_EQ(c[0], Real{0}) << "an empty inner extent is an empty sum";
}

TYPED_TEST(Linalg, GemmNamesShapesThatDoNotFit) {
  using Real = TypeParam;
  Buffer<Real> x(100);
  try {
    gemm<Real>(Op::kNone, Op::kTranspose, 1, x.matrix(0, 2, 3), x.matrix(0, 4, 5), 0, x.matrix(0, 2, 4));
    FAIL() << "shapes do not fit";
  } catch (const InvalidArgument& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("A (2, 3), B (4, 5)^T, C (2, 4)"));
  }
}

TYPED_TEST(Linalg, RowSplitOfAProductHasTheSameBits) {
  // Row-sharded P = B Q must equal the unsharded product bitwise: layouts agree because of it.
  using Real = TypeParam;
  const auto a = gaussian<Real>(96 * 40, "a"), b = gaussian<Real>(40 * 24, "b");
  Buffer<Real> whole(96 * 24), split(96 * 24);
  gemm<Real>(Op::kNone, Op::kNone, 1, a.matrix(0, 96, 40), b.matrix(0, 40, 24), 0, whole.matrix(0, 96, 24));
  for (const Index begin : {0, 32, 64}) {
    gemm<Real>(Op::kNone, Op::kNone, 1, a.matrix(begin * 40, 32, 40), b.matrix(0, 40, 24), 0,
               split.matrix(begin * 24, 32, 24));
  }
  EXPECT_TRUE(std::equal(whole.span().begin(), whole.span().end(), split.span().begin()));
}

TYPED_TEST(Linalg, GramIsExactForSmallIntegersAndFillsBothTriangles) {
  using Real = TypeParam;
  // Every remainder of the tiles, several blocks of rows, rows that follow one another and rows that do not.
  for (const auto& [rows, cols] :
       {std::pair<Index, Index>{0, 3}, {1, 1}, {70, 9}, {33, 16}, {2100, 17}, {300, 40}, {40, 300}}) {
    for (const Index padding : {0, 3}) {
      SCOPED_TRACE(cat(rows, " x ", cols, ", padding ", padding));
      Buffer<Real> store(rows * (cols + padding));
      for (Index i = 0; i < store.size(); ++i) store[i] = static_cast<Real>((i * 7) % 11 - 5);
      const MatrixView<const Real> p(store.data(), rows, cols, cols + padding);
      Buffer<double> g(cols * cols);
      gram<Real>(p, g.matrix(0, cols, cols));
      for (Index i = 0; i < cols; ++i) {
        for (Index j = 0; j < cols; ++j) {
          double sum = 0;
          for (Index k = 0; k < rows; ++k) sum += static_cast<double>(p(k, i)) * static_cast<double>(p(k, j));
          ASSERT_EQ(g[i * cols + j], sum) << i << ", " << j;
        }
      }
    }
  }
}

TYPED_TEST(Linalg, SolveUpperRightLeavesASmallResidual) {
  using Real = TypeParam;
  for (const auto& [rows, cols] : {std::pair<Index, Index>{0, 3},
                                   {5, 0},
                                   {1, 1},
                                   {9, 4},
                                   {33, 16},
                                   {20, 17},
                                   {70, 64},
                                   {7, 131},
                                   {30, 300}}) {
    SCOPED_TRACE(cat(rows, " x ", cols));
    // A diagonal between 1 and 2 and |U_ij| of about 1 / (4 sqrt(n)) to its right: condition below 10.
    auto u = gaussian<double>(cols * cols, "u");
    for (Index i = 0; i < cols; ++i) {
      for (Index j = 0; j < cols; ++j) {
        double& x = u[i * cols + j];
        x = i > j ? 0 : i == j ? 1.5 + 0.5 * std::sin(x) : x / (4 * std::sqrt(static_cast<double>(cols)));
      }
    }
    const auto before = gaussian<Real>(rows * (cols + 2), "p");
    auto p = gaussian<Real>(rows * (cols + 2), "p");
    solve_upper_right<Real>({p.data(), rows, cols, cols + 2}, std::as_const(u).matrix(0, cols, cols));
    for (Index i = 0; i < rows; ++i) {
      const Index row = i * (cols + 2);
      for (Index j = 0; j < cols; ++j) {
        double sum = 0, magnitude = 0;
        for (Index k = 0; k <= j; ++k) {
          const double term = static_cast<double>(p[row + k]) * u[k * cols + j];
          sum += term, magnitude += std::abs(term);
        }
        // |X U - P| <= (n + 2) eps |X| |U| by substitution; an inverse of condition < 10 within a block of 16
        // and the rounding of U add a multiple.
        ASSERT_NEAR(sum, static_cast<double>(before[row + j]),
                    10 * (static_cast<double>(cols) + 4) * TestFixture::kEpsilon * magnitude)
            << i << ", " << j;
      }
      for (Index j = cols; j < cols + 2; ++j) ASSERT_EQ(p[row + j], before[row + j]) << "padding";
    }
  }
}

TEST(Cholesky, ReproducesTheLiveColumnsAndFindsDeadOnesInEveryBlock) {
  // Several blocks of pivots, and a last one that is not full.
  const Index rows = 200, n = 150;
  auto p = gaussian<double>(rows * n, "p");
  for (Index i = 0; i < rows; ++i) {
    double* const row = p.data() + i * n;
    row[70] = row[3];
    row[100] = 0;
    row[149] = row[1] + row[66];
  }
  Buffer<double> g(n * n);
  gram<double>(std::as_const(p).matrix(0, rows, n), g.matrix(0, n, n));
  for (Index i = 0; i < n; ++i) g[20 * n + i] = g[i * n + 20] = std::numeric_limits<double>::quiet_NaN();
  Buffer<double> u(n * n);
  std::ranges::copy(g.span(), u.data());
  std::vector<std::uint8_t> dead(n);
  cholesky_with_dead_columns(u.matrix(0, n, n), 1e-5, dead);
  std::vector<std::uint8_t> expected(n);
  for (const int j : {20, 70, 100, 149}) expected[static_cast<std::size_t>(j)] = 1;
  ASSERT_EQ(dead, expected);
  for (Index i = 0; i < n; ++i) {
    for (Index j = 0; j < n; ++j) {
      const bool live = !dead[static_cast<std::size_t>(i)] && !dead[static_cast<std::size_t>(j)];
      if (i > j || !live) {
        ASSERT_EQ(u[i * n + j], i == j ? 1 : 0) << i << ", " << j;
        continue;
      }
      double sum = 0, magnitude = 0;
      for (Index k = 0; k <= i; ++k) {
        const double term = u[k * n + i] * u[k * n + j];
        sum += term, magnitude += std::abs(term);
      }
      // |U^T U - G| <= (n + 1) eps |U^T| |U|, and this sum again
      ASSERT_NEAR(sum, g[i * n + j], 2 * (n + 1) * std::numeric_limits<double>::epsilon() * magnitude)
          << i << ", " << j;
    }
  }
}

TYPED_TEST(Linalg, CholeskyQrAndHouseholderGiveTheSameOrthonormalFactor) {
  using Real = TypeParam;
  const Index rows = 50, cols = 12;
  auto by_cholesky = gaussian<Real>(rows * cols, "p"), by_householder = gaussian<Real>(rows * cols, "p");
  std::vector<std::uint8_t> dead(cols);
  for (int pass = 0; pass < 2; ++pass) {
    Buffer<double> g(cols * cols);
    gram<Real>(by_cholesky.matrix(0, rows, cols), g.matrix(0, cols, cols));
    cholesky_with_dead_columns(g.matrix(0, cols, cols), 1e-5, dead);
    EXPECT_THAT(dead, testing::Each(0));
    solve_upper_right<Real>(by_cholesky.matrix(0, rows, cols), g.matrix(0, cols, cols));
  }
  householder_orthonormalise<Real>(by_householder.matrix(0, rows, cols), 1e-5, dead);
  EXPECT_THAT(dead, testing::Each(0));
  for (Index i = 0; i < rows * cols; ++i) {
    // Condition of a 50 x 12 Gaussian is below 4; entries are below 1.
    ASSERT_NEAR(static_cast<double>(by_cholesky[i]), static_cast<double>(by_householder[i]),
                100 * TestFixture::kEpsilon);
  }
}

TYPED_TEST(Linalg, DeadColumnsLoseNoDirectionOfTheLiveOnes) {
  using Real = TypeParam;
  const Index rows = 20, cols = 5;
  // Columns: live, copy of it (dead), zero (dead), live, live.
  auto p = gaussian<Real>(rows * cols, "p");
  for (Index i = 0; i < rows; ++i) {
    p[i * cols + 1] = p[i * cols];
    p[i * cols + 2] = 0;
  }
  Buffer<Real> live(rows * 3);
  for (Index i = 0; i < rows; ++i) {
    live[i * 3] = p[i * cols];
    live[i * 3 + 1] = p[i * cols + 3];
    live[i * 3 + 2] = p[i * cols + 4];
  }
  std::vector<std::uint8_t> dead(cols), none(3);
  householder_orthonormalise<Real>(p.matrix(0, rows, cols), 1e-5, dead);
  householder_orthonormalise<Real>(live.matrix(0, rows, 3), 1e-5, none);
  EXPECT_THAT(dead, testing::ElementsAre(0, 1, 1, 0, 0));
  for (Index i = 0; i < rows; ++i) {
    EXPECT_EQ(p[i * cols + 1], Real{0});
    EXPECT_EQ(p[i * cols + 2], Real{0});
    EXPECT_NEAR(p[i * cols], live[i * 3], 10 * TestFixture::kEpsilon);
    EXPECT_NEAR(p[i * cols + 3], live[i * 3 + 1], 50 * TestFixture::kEpsilon);
    EXPECT_NEAR(p[i * cols + 4], live[i * 3 + 2], 50 * TestFixture::kEpsilon);
  }
}

TYPED_TEST(Linalg, SingularValuesOfAScaledOrthonormalFactor) {
  using Real = TypeParam;
  const Index rows = 30, cols = 4;
  auto p = gaussian<Real>(rows * cols, "p");
  std::vector<std::uint8_t> dead(cols);
  householder_orthonormalise<Real>(p.matrix(0, rows, cols), 1e-5, dead);
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < cols; ++j) p[i * cols + j] *= static_cast<Real>(8 >> j);
  }
  const auto values = singular_values<Real>(p.matrix(0, rows, cols));
  ASSERT_EQ(values.size(), 4u);
  for (std::size_t j = 0; j < 4; ++j) EXPECT_NEAR(values[j], 8 >> j, 100 * TestFixture::kEpsilon);
}

// A v_j = s_j u_j, and orthonormal vectors, of tall and wide matrices that are views with a stride.
TYPED_TEST(Linalg, SingularVectorsDiagonalise) {
  using Real = TypeParam;
  for (const auto& [rows, cols] : {std::pair<Index, Index>{30, 7}, {7, 30}, {9, 9}, {1, 5}, {5, 1}}) {
    const Index side = std::min(rows, cols), count = std::max<Index>(1, side - 2);
    auto storage = gaussian<Real>(rows * (cols + 3), "a");
    const MatrixView<const Real> a = storage.matrix(0, rows, cols + 3).block(0, rows, 1, cols);
    Buffer<Real> left(rows * count), right(cols * count), image(rows * count);
    left_singular_vectors<Real>(a, left.matrix(0, rows, count));
    right_singular_vectors<Real>(a, right.matrix(0, cols, count));
    const std::vector<double> values = singular_values<Real>(a);
    gemm<Real>(Op::kNone, Op::kNone, 1, a, right.matrix(0, cols, count), 0, image.matrix(0, rows, count));
    for (Index j = 0; j < count; ++j) {
      const double s = values[static_cast<std::size_t>(j)];
      double dot = 0;
      for (Index i = 0; i < rows; ++i) dot += static_cast<double>(left[i * count + j] * image[i * count + j]);
      const double sign = dot > 0 ? 1 : -1;  // either may be turned
      for (Index i = 0; i < rows; ++i)
        EXPECT_NEAR(image[i * count + j], sign * s * static_cast<double>(left[i * count + j]),
                    100 * TestFixture::kEpsilon * s);
    }
    for (const auto& [vectors, extent] : {std::pair{&left, rows}, {&right, cols}}) {
      Buffer<double> products(count * count);
      gram<Real>(vectors->matrix(0, extent, count), products.matrix(0, count, count));
      for (Index i = 0; i < count; ++i) {
        for (Index j = 0; j < count; ++j)
          EXPECT_NEAR(products[i * count + j], i == j ? 1 : 0, 20 * TestFixture::kEpsilon);
      }
    }
    Buffer<Real> many(rows * (side + 1));
    EXPECT_THROW(left_singular_vectors<Real>(a, many.matrix(0, rows, side + 1)), InvalidArgument) << rows;
  }
}

TYPED_TEST(Linalg, FiniteScanSeesEveryPosition) {
  using Real = TypeParam;
  const Index rows = 3, cols = 37;
  auto p = gaussian<Real>(rows * cols, "p");
  EXPECT_TRUE(all_finite<Real>(p.matrix(0, rows, cols)));
  for (Index i = 0; i < rows * cols; ++i) {
    const Real old = p[i];
    for (const Real bad : {std::numeric_limits<Real>::quiet_NaN(), std::numeric_limits<Real>::infinity()}) {
      p[i] = bad;
      ASSERT_FALSE(all_finite<Real>(p.matrix(0, rows, cols))) << i;
    }
    p[i] = old;
  }
  p[5] = std::numeric_limits<Real>::max();
  p[6] = std::numeric_limits<Real>::max();
  EXPECT_TRUE(all_finite<Real>(p.matrix(0, rows, cols))) << "large but finite";
}

TYPED_TEST(Linalg, SumOfSquaresOfAStridedView) {
  using Real = TypeParam;
  Buffer<Real> p(4 * 13);
  for (Index i = 0; i < p.size(); ++i) p[i] = static_cast<Real>(i % 5);
  const MatrixView<const Real> view{p.data() + 1, 4, 11, 13};
  double expected = 0;
  for (Index i = 0; i < 4; ++i) {
    for (Index j = 0; j < 11; ++j) expected += static_cast<double>(view(i, j) * view(i, j));
  }
  EXPECT_EQ(sum_of_squares<Real>(view), expected);
}

}  // namespace
}  // namespace lowband
