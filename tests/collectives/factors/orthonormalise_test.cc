#include "collectives/factors/orthonormalise.h"

#include "collectives/local/local_world.h"
#include "runtime/linalg.h"
#include "runtime/random.h"

#include <cmath>
#include <cstring>
#include <functional>
#include <mutex>

#include <gtest/gtest.h>

namespace lowband {
namespace {

template <class Real>
struct Matrix {
  Matrix(Index rows, Index cols) : storage(rows * cols), view(storage.matrix(0, rows, cols)) {}
  Matrix(const Matrix& other) : Matrix(other.view.rows, other.view.cols) {
    std::ranges::copy(other.storage.span(), storage.data());
  }
  Buffer<Real> storage;
  MatrixView<Real> view;
};

template <class Real>
struct Result {
  explicit Result(Index rows, Index cols) : q(rows, cols) {}
  Matrix<Real> q;
  std::vector<std::uint8_t> dead;
  Factorisation factorisation = Factorisation::kCholesky;
  Index dead_count() const { return std::ranges::count(dead, std::uint8_t{1}); }
};

/// Orthonormalises `inputs` together, their rows spread unevenly over processes (the second one of four has
/// none).
template <class Real>
std::vector<Result<Real>> orthonormalise(const std::vector<Matrix<Real>>& inputs, int processes) {
  std::vector<Result<Real>> results;
  for (const Matrix<Real>& input : inputs) results.emplace_back(input.view.rows, input.view.cols);
  std::mutex mutex;
  run_world(processes, [&](Communicator& world) {
    const auto begin = [&](Index rows, int process) {
      if (processes == 4 && process == 2) process = 1;
      return rows * process * (process + 1) / (processes * (processes + 1));
    };
    std::vector<Matrix<Real>> own;
    std::vector<MatrixView<Real>> blocks;
    for (const Matrix<Real>& input : inputs) {
      const Index first = begin(input.view.rows, world.process());
      const Index last = begin(input.view.rows, world.process() + 1);
      own.emplace_back(last - first, input.view.cols);
      std::copy_n(input.view.row(first), own.back().view.elements(), own.back().view.data);
    }
    for (Matrix<Real>& block : own) blocks.push_back(block.view);
    Orthonormaliser<Real> orthonormaliser(world, blocks);
    orthonormaliser.run();
    const std::lock_guard lock(mutex);
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      const Index first = begin(inputs[i].view.rows, world.process());
      std::copy_n(blocks[i].data, blocks[i].elements(), results[i].q.view.row(first));
      const auto dead = orthonormaliser.dead(static_cast<Index>(i));
      if (!results[i].dead.empty()) {
        EXPECT_TRUE(std::ranges::equal(results[i].dead, dead));
        EXPECT_EQ(results[i].factorisation, orthonormaliser.factorisation(static_cast<Index>(i)));
      }
      results[i].dead.assign(dead.begin(), dead.end());
      results[i].factorisation = orthonormaliser.factorisation(static_cast<Index>(i));
    }
  });
  return results;
}

template <class Real>
Result<Real> orthonormalise(const Matrix<Real>& input, int processes) {
  return orthonormalise<Real>(std::vector<Matrix<Real>>{input}, processes)[0];
}

/// max |Q^T Q - I| over live columns, and exact zeros demanded of dead ones.
template <class Real>
double orthogonality_error(const Result<Real>& result) {
  const MatrixView<const Real> q = result.q.view;
  double worst = 0;
  for (Index a = 0; a < q.cols; ++a) {
    for (Index b = a; b < q.cols; ++b) {
      double sum = 0;
      for (Index i = 0; i < q.rows; ++i) sum += static_cast<double>(q(i, a)) * static_cast<double>(q(i, b));
      const bool live =
          !result.dead[static_cast<std::size_t>(a)] && !result.dead[static_cast<std::size_t>(b)];
      worst = std::max(worst, std::abs(sum - (live && a == b ? 1.0 : 0.0)));
      if (std::isnan(sum)) return std::numeric_limits<double>::infinity();
    }
  }
  return worst;
}

/// ||P - Q Q^T P|| / ||P||, each column of P brought to comparable size by the caller's choice of P.
template <class Real>
double residual(MatrixView<const Real> p, MatrixView<const Real> q) {
  double scale = 0;
  for (Index k = 0; k < p.elements(); ++k) scale = std::max(scale, std::abs(static_cast<double>(p.data[k])));
  double lost = 0;
  double total = 0;
  for (Index j = 0; j < p.cols; ++j) {
    std::vector<double> column(static_cast<std::size_t>(p.rows));
    for (Index i = 0; i < p.rows; ++i) {
      column[static_cast<std::size_t>(i)] = static_cast<double>(p(i, j)) / scale;
      total += std::pow(column[static_cast<std::size_t>(i)], 2);
    }
    std::vector<double> rest = column;
    for (Index k = 0; k < q.cols; ++k) {
      double dot = 0;
      for (Index i = 0; i < p.rows; ++i)
        dot += static_cast<double>(q(i, k)) * column[static_cast<std::size_t>(i)];
      for (Index i = 0; i < p.rows; ++i)
        rest[static_cast<std::size_t>(i)] -= dot * static_cast<double>(q(i, k));
    }
    for (const double x : rest) lost += x * x;
  }
  return std::sqrt(lost / total);
}

template <class Real>
Matrix<Real> filled(Index rows, Index cols, const std::function<double(Index, Index)>& entry) {
  Matrix<Real> matrix(rows, cols);
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < cols; ++j) matrix.view(i, j) = static_cast<Real>(entry(i, j));
  }
  return matrix;
}

double noise(Index i, Index j) { return RandomStream(7, "orthonormalise").normal(i * 4096 + j); }

template <class Real>
Matrix<Real> gaussian(Index rows, Index cols, double scale = 1) {
  return filled<Real>(rows, cols, [&](Index i, Index j) { return scale * noise(i, j); });
}

/// Product of Gaussian factors, formed in double, rounded to Real.
template <class Real>
Matrix<Real> of_rank(Index rows, Index cols, Index rank) {
  const Matrix<double> left = gaussian<double>(rows, rank);
  const Matrix<double> right =
      filled<double>(rank, cols, [](Index i, Index j) { return noise(i + 9000, j); });
  return filled<Real>(rows, cols, [&](Index i, Index j) {
    double sum = 0;
    for (Index k = 0; k < rank; ++k) sum += left.view(i, k) * right.view(k, j);
    return sum;
  });
}

/// Q R with orthonormal Q and the R of Wilkinson's example: ones on the diagonal, -1 above. Every column
/// keeps a pivot of its own size, so nothing looks dead, and the condition number is about 2^cols.
template <class Real>
Matrix<Real> wilkinson(Index rows, Index cols) {
  const Result<double> q = orthonormalise(gaussian<double>(rows, cols), 1);
  return filled<Real>(rows, cols, [&](Index i, Index j) {
    double sum = q.q.view(i, j);
    for (Index k = 0; k < j; ++k) sum -= q.q.view(i, k);
    return sum;
  });
}

struct Case {
  const char* name;
  std::function<Matrix<float>()> input;
  Index dead;
  Factorisation factorisation = Factorisation::kCholesky;
};

double power(double base, double exponent) { return std::pow(base, exponent); }

/// The cases every implementation must survive, numerics.md 3.5, in its order; then the table of
/// algorithms.md 3.
const Case kCases[] = {
    {"gaussian", [] { return gaussian<float>(768, 64); }, 0},
    {"gaussian_1e15", [] { return gaussian<float>(768, 64, 1e15); }, 0},
    {"row_scales",
     [] {
       return filled<float>(
           768, 64, [](Index i, Index j) { return noise(i, j) * power(10, -10.0 * double(i) / 767); });
     },
     0},
    {"duplicated_column",
     [] { return filled<float>(768, 64, [](Index i, Index j) { return noise(i, j == 40 ? 3 : j); }); }, 1},
    {"zero_column",
     [] { return filled<float>(768, 64, [](Index i, Index j) { return j == 5 ? 0 : noise(i, j); }); }, 1},
    {"20_columns",
     [] { return filled<float>(768, 64, [](Index i, Index j) { return j < 20 ? noise(i, j) : 0; }); }, 44},
    {"rank_20", [] { return of_rank<float>(768, 64, 20); }, 44},
    {"equal_columns", [] { return filled<float>(768, 64, [](Index i, Index) { return noise(i, 0); }); }, 63},
    {"zero", [] { return Matrix<float>(768, 64); }, 64, Factorisation::kZero},
    {"gaussian_1e-12", [] { return gaussian<float>(768, 64, 1e-12); }, 0},
    {"gaussian_1e-19", [] { return gaussian<float>(768, 64, 1e-19); }, 0},
    {"gaussian_1e-22", [] { return gaussian<float>(768, 64, 1e-22); }, 0},
    {"gaussian_1e-30", [] { return gaussian<float>(768, 64, 1e-30); }, 0},
    {"gaussian_1e-38", [] { return gaussian<float>(768, 64, 1e-38); }, 0},
    {"gaussian_1e-42_denormal", [] { return gaussian<float>(768, 64, 1e-42); }, 0},
    {"gaussian_1e18", [] { return gaussian<float>(768, 64, 1e18); }, 0},
    {"gaussian_1e20", [] { return gaussian<float>(768, 64, 1e20); }, 0},
    {"gaussian_1e30", [] { return gaussian<float>(768, 64, 1e30); }, 0},
    {"gaussian_3e37", [] { return gaussian<float>(768, 64, 3e37); }, 0},
    {"column_scales",
     [] {
       return filled<float>(768, 64,
                            [](Index i, Index j) { return noise(i, j) * power(10, -30.0 * double(j) / 63); });
     },
     0},
    {"ones_and_noise",
     [] { return filled<float>(768, 64, [](Index i, Index j) { return 1 + 1e-4 * noise(i, j); }); }, 0},
    {"31_rows",
     [] {
       return filled<float>(256, 32,
                            [](Index i, Index j) { return i % 8 == 3 && i < 248 ? noise(i, j) : 0; });
     },
     1},
    {"20_rows",
     [] { return filled<float>(256, 32, [](Index i, Index j) { return i >= 236 ? noise(i, j) : 0; }); }, 12},
    {"rank_8", [] { return of_rank<float>(256, 32, 8); }, 24},
    {"gaussian_1e-25", [] { return gaussian<float>(256, 32, 1e-25); }, 0},
    {"one_column", [] { return gaussian<float>(33, 1); }, 0},
    {"one_entry", [] { return filled<float>(1, 1, [](Index, Index) { return 3e38; }); }, 0},
    {"square", [] { return gaussian<float>(48, 48); }, 0},
    {"wilkinson", [] { return wilkinson<float>(96, 28); }, 0, Factorisation::kHouseholder},
};

class OrthonormaliseCases : public testing::TestWithParam<int> {};

TEST_P(OrthonormaliseCases, LiveColumnsAreOrthonormalAndSpanTheInput) {
  for (const Case& test : kCases) {
    SCOPED_TRACE(test.name);
    const Matrix<float> input = test.input();
    const Result<float> result = orthonormalise(input, GetParam());
    EXPECT_EQ(result.factorisation, test.factorisation);
    EXPECT_EQ(result.dead_count(), test.dead);
    EXPECT_LE(orthogonality_error(result), 1e-6);
    // 2e-6 of ||P||; a pivot below 1e-5 of its column is given up, and the denormals have 10 bits only.
    if (test.factorisation != Factorisation::kZero) {
      EXPECT_LE(residual<float>(input.view, result.q.view), test.dead > 0 ? 1e-5 : 2e-6);
    }
  }
}

TEST_P(OrthonormaliseCases, NonFiniteInputIsReportedAndLeftAlone) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Matrix<float> input = gaussian<float>(64, 8);
    input.view(63, 5) = bad;
    const auto results = orthonormalise<float>({input, gaussian<float>(64, 8)}, GetParam());
    EXPECT_EQ(results[0].factorisation, Factorisation::kNonFinite);
    EXPECT_EQ(std::memcmp(results[0].q.view.data, input.view.data, sizeof(float) * 64 * 8), 0);
    EXPECT_EQ(results[1].factorisation, Factorisation::kCholesky);
    EXPECT_LE(orthogonality_error(results[1]), 1e-6);
  }
}

TEST_P(OrthonormaliseCases, EqualsGramSchmidtInDoubleElementByElement) {
  const Matrix<float> input = gaussian<float>(101, 13);
  const Result<float> result = orthonormalise(input, GetParam());
  // Classical definition, two sweeps for accuracy: positive diagonal, no pivoting.
  Matrix<double> q =
      filled<double>(101, 13, [&](Index i, Index j) { return static_cast<double>(input.view(i, j)); });
  for (Index j = 0; j < 13; ++j) {
    for (int sweep = 0; sweep < 2; ++sweep) {
      for (Index k = 0; k < j; ++k) {
        double dot = 0;
        for (Index i = 0; i < 101; ++i) dot += q.view(i, k) * q.view(i, j);
        for (Index i = 0; i < 101; ++i) q.view(i, j) -= dot * q.view(i, k);
      }
    }
    double squares = 0;
    for (Index i = 0; i < 101; ++i) squares += q.view(i, j) * q.view(i, j);
    for (Index i = 0; i < 101; ++i) q.view(i, j) /= std::sqrt(squares);
  }
  for (Index k = 0; k < q.view.elements(); ++k)
    EXPECT_NEAR(static_cast<double>(result.q.view.data[k]), q.view.data[k], 1e-6) << "element " << k;
}

TEST_P(OrthonormaliseCases, PowersOfTwoChangeNoBit) {
  const Matrix<float> input = gaussian<float>(90, 7);
  const Result<float> reference = orthonormalise(input, GetParam());
  for (const int exponent : {-100, -3, 60}) {
    const Matrix<float> scaled = filled<float>(
        90, 7, [&](Index i, Index j) { return std::ldexp(static_cast<double>(input.view(i, j)), exponent); });
    const Result<float> result = orthonormalise(scaled, GetParam());
    EXPECT_EQ(std::memcmp(result.q.view.data, reference.q.view.data, sizeof(float) * 90 * 7), 0) << exponent;
  }
}

TEST_P(OrthonormaliseCases, MatricesDoNotSeeOneAnother) {
  const std::vector<Matrix<double>> inputs{gaussian<double>(40, 3), of_rank<double>(64, 16, 5),
                                           Matrix<double>(9, 2), wilkinson<double>(80, 60),
                                           gaussian<double>(7, 7, 1e-200)};
  const auto together = orthonormalise<double>(inputs, GetParam());
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const auto alone = orthonormalise(inputs[i], GetParam());
    EXPECT_EQ(std::memcmp(together[i].q.view.data, alone.q.view.data,
                          sizeof(double) * static_cast<std::size_t>(inputs[i].view.elements())),
              0)
        << i;
    EXPECT_LE(orthogonality_error(together[i]), 1e-14);
  }
}

INSTANTIATE_TEST_SUITE_P(Processes, OrthonormaliseCases, testing::Values(1, 2, 3, 4));

TEST(Orthonormalise, HouseholderAndCholeskyGiveOneFactor) {
  const Matrix<float> input = gaussian<float>(120, 31);
  const Result<float> fast = orthonormalise(input, 1);
  Matrix<float> slow = input;
  std::vector<std::uint8_t> dead(31);
  householder_orthonormalise<float>(slow.view, kDeadColumnTolerance, dead);
  for (Index k = 0; k < slow.view.elements(); ++k)
    EXPECT_NEAR(static_cast<double>(fast.q.view.data[k]), static_cast<double>(slow.view.data[k]), 1e-6);
}

/// V whose columns are e_j + lean e_0, so that those of B V for a B with orthogonal columns of equal length
/// meet at angles of about 1 / lean; column j times 2^-4j.
template <class Real>
Matrix<Real> leaning(Index rows, Index cols, double lean, double scale) {
  return filled<Real>(rows, cols, [&](Index i, Index j) {
    return scale *
           std::ldexp((i == j ? 1.0 : 0.0) + (i == 0 && j > 0 ? lean : 0.0), static_cast<int>(-4 * j));
  });
}

// F = B^T P_in and P = P_in U^-1. Element (i, j) of F is a sum over n rows, rounded by at most
// n eps |b_i| |P_in_j|, which F U^-1 multiplies by no more than the amplification; two triangular solutions
// of F and of P, which it is compared with, round by some r eps |b_i| more.
template <class Real>
void expect_follows(double lean, double scale, bool followed) {
  SCOPED_TRACE(testing::Message() << "lean " << lean << ", scale " << scale);
  constexpr Index kRows = 96, kCols = 40, kRank = 7;
  const Matrix<Real> b = gaussian<Real>(kRows, kCols);
  const Matrix<Real> v = leaning<Real>(kCols, kRank, lean, scale);
  Matrix<Real> p(kRows, kRank), f(kCols, kRank);
  gemm<Real>(Op::kNone, Op::kNone, 1, b.view, v.view, 0, p.view);
  gemm<Real>(Op::kTranspose, Op::kNone, 1, b.view, p.view, 0, f.view);
  std::vector<std::uint8_t> dead;
  run_world(1, [&](Communicator& world) {
    Orthonormaliser<Real> orthonormaliser(world, {p.view}, {f.view});
    orthonormaliser.run();
    EXPECT_EQ(orthonormaliser.followed(0), followed);
    followed = orthonormaliser.followed(0);
    dead.assign(orthonormaliser.dead(0).begin(), orthonormaliser.dead(0).end());
  });
  if (!followed) return;
  for (Index i = 0; i < kCols; ++i) {
    double squares = 0;
    for (Index row = 0; row < kRows; ++row) squares += std::pow(static_cast<double>(b.view(row, i)), 2);
    const double bound = kLargestAmplification * (kRows + 8 * kRank) * std::sqrt(squares) *
                         static_cast<double>(std::numeric_limits<Real>::epsilon());
    for (Index j = 0; j < kRank; ++j) {
      double exact = 0;
      for (Index row = 0; row < kRows; ++row)
        exact += static_cast<double>(b.view(row, i)) * static_cast<double>(p.view(row, j));
      ASSERT_NEAR(static_cast<double>(f.view(i, j)), exact, bound) << i << ", " << j;
    }
  }
}

// Columns of any size follow, but neither such as are nearly parallel nor products that leave the range of
// Real, here below and above.
TEST(Orthonormalise, FollowersAreAccurateOrRefused) {
  for (const double scale : {1.0, 0x1p30, 0x1p-30}) {
    expect_follows<float>(0, scale, true);
    expect_follows<float>(2, scale, true);
    expect_follows<float>(1e3, scale, false);
    expect_follows<double>(0, scale, true);
    expect_follows<double>(1e3, scale, false);
  }
  expect_follows<float>(0, 0x1p-120, false);
}

TEST(Orthonormalise, FollowersOverflowBeforeTheirMatrix) {
  Matrix<float> p = gaussian<float>(30, 3, 1e30);
  Matrix<float> f = gaussian<float>(20, 3, 1);
  f.view(4, 1) = std::numeric_limits<float>::infinity();
  run_world(1, [&](Communicator& world) {
    Orthonormaliser<float> orthonormaliser(world, {p.view}, {f.view});
    orthonormaliser.run();
    EXPECT_EQ(orthonormaliser.factorisation(0), Factorisation::kCholesky);
    EXPECT_FALSE(orthonormaliser.followed(0));
  });
}

// Of equal columns the second is dead and zero, of a zero matrix all are.
TEST(Orthonormalise, FollowersOfDeadColumnsAreZero) {
  for (const double scale : {0.0, 1.0}) {
    Matrix<float> p =
        filled<float>(30, 3, [&](Index i, Index j) { return scale * noise(i, j == 1 ? 0 : j); });
    Matrix<float> f =
        filled<float>(20, 3, [&](Index i, Index j) { return scale * noise(i + 40, j == 1 ? 0 : j); });
    run_world(1, [&](Communicator& world) {
      Orthonormaliser<float> orthonormaliser(world, {p.view}, {f.view});
      orthonormaliser.run();
      EXPECT_TRUE(orthonormaliser.followed(0));
      for (Index i = 0; i < 20; ++i) {
        for (Index j = 0; j < 3; ++j) {
          EXPECT_EQ(f.view(i, j) == 0, orthonormaliser.dead(0)[static_cast<std::size_t>(j)] == 1);
        }
      }
      EXPECT_EQ(std::ranges::count(orthonormaliser.dead(0), std::uint8_t{1}), scale == 0 ? 3 : 1);
    });
  }
}

TEST(Orthonormalise, RefusesFollowersInAGroup) {
  EXPECT_THROW(run_world(2,
                         [](Communicator& world) {
                           Buffer<float> storage(40);
                           Orthonormaliser<float> refused(world, {storage.matrix(0, 5, 2)},
                                                          {storage.matrix(20, 4, 2)});
                         }),
               InvalidArgument);
}

TEST(Orthonormalise, RefusesAMatrixWiderThanTall) {
  EXPECT_THROW(run_world(2,
                         [](Communicator& world) {
                           Buffer<float> storage(10);
                           Orthonormaliser<float> refused(world, {storage.matrix(0, 2, 5)});
                         }),
               InvalidArgument);
}

TEST(Orthonormalise, SendsOneMaximumAndTwoTriangles) {
  run_world(3, [](Communicator& world) {
    Buffer<float> storage(70);
    for (Index k = 0; k < 70; ++k) storage[k] = static_cast<float>(noise(k, world.process()));
    Orthonormaliser<float> orthonormaliser(world, {storage.matrix(0, 10, 4), storage.matrix(40, 10, 3)});
    world.ledger().begin_step();
    orthonormaliser.run();
    EXPECT_EQ(world.ledger().step_sum("", Purpose::kControl).payload_bytes, 8 * (2 + 2 * (10 + 6)));
    EXPECT_EQ(world.ledger().step_sum().calls, 3);
  });
}

}  // namespace
}  // namespace lowband
