#include "optimizers/gradient_sketch.h"

#include "runtime/buffer.h"
#include "runtime/random.h"

#include <cmath>
#include <functional>
#include <vector>

#include <gtest/gtest.h>

namespace lowband {
namespace {

constexpr Index k = GradientSketch::kBuckets;

struct Input {
  const char* name;
  Index rows, cols;
  std::function<double(Index, Index)> entry;
  bool spread = true;  // over many elements: errors are nearly normal
};

const Input kInputs[] = {
    {"gaussian", 40, 96, [](Index i, Index j) { return RandomStream(1, "g").normal(i * 96 + j); }},
    {"wide", 3, 3 * k + 17, [](Index i, Index j) { return RandomStream(1, "w").normal(i * 65536 + j); }},
    {"one_column", 300, 50, [](Index, Index j) { return j == 7 ? 1.0 : 0.0; }},
    {"one_row", 9, 700, [](Index i, Index) { return i == 3 ? 2.0 : 0.0; }},
    {"constant", 64, 64, [](Index, Index) { return 1.0; }},
    {"decaying", 60, 60, [](Index i, Index j) { return std::exp(-0.1 * static_cast<double>(i + j)); }, false},
};

double estimate(MatrixView<const float> g, std::uint64_t seed, Index step) {
  std::vector<double> buckets(static_cast<std::size_t>(k));
  GradientSketch sketch(buckets, seed, step);
  sketch.add("w", g, 0, 0);
  return estimated_sum_of_squares(buckets);
}

// Over many seeds: no bias, and the documented standard deviation. 400 estimates have a mean of standard
// error sigma / 20 and a standard deviation within 1 / sqrt(800) = 3.5 % of sigma; five times that is
// allowed.
TEST(GradientSketch, IsUnbiasedWithTheStatedDeviation) {
  for (const Input& input : kInputs) {
    SCOPED_TRACE(input.name);
    Buffer<float> storage(input.rows * input.cols);
    const MatrixView<float> g = storage.matrix(0, input.rows, input.cols);
    double squares = 0;
    for (Index i = 0; i < g.rows; ++i) {
      for (Index j = 0; j < g.cols; ++j) {
        g(i, j) = static_cast<float>(input.entry(i, j));
        squares += static_cast<double>(g(i, j)) * static_cast<double>(g(i, j));
      }
    }
    const int seeds = 400;
    const double sigma = std::sqrt(2.0 / static_cast<double>(k));
    double sum = 0;
    double sum_of_squares = 0;
    for (int seed = 0; seed < seeds; ++seed) {
      const double error = estimate(g, static_cast<std::uint64_t>(seed / 2), seed % 2) / squares - 1;
      if (input.spread) {
        EXPECT_LE(std::abs(error), 5 * sigma) << "seed " << seed;
      }
      sum += error;
      sum_of_squares += error * error;
    }
    EXPECT_LE(std::abs(sum / seeds), 5 * sigma / std::sqrt(seeds));
    EXPECT_LE(std::sqrt(sum_of_squares / seeds), 1.2 * sigma);
  }
}

TEST(GradientSketch, OfPiecesIsTheSketchOfTheWhole) {
  const Index rows = 6;
  const Index cols = k + 1000;
  Buffer<double> storage(rows * cols);
  for (Index i = 0; i < storage.size(); ++i) storage[i] = static_cast<double>(i % 1000 - 300);  // exact sums
  const MatrixView<const double> g = storage.matrix(0, rows, cols);
  std::vector<double> whole(static_cast<std::size_t>(k));
  GradientSketch(whole, 5, 2).add("w", g, 0, 0);
  std::vector<double> pieces(static_cast<std::size_t>(k));
  GradientSketch sketch(pieces, 5, 2);
  for (const Index row : {0, 2, 5}) {
    const Index row_end = row == 0 ? 2 : row == 2 ? 5 : 6;
    for (const Index col : {Index{0}, Index{333}, k + 5}) {
      const Index col_end = col == 0 ? 333 : col == 333 ? k + 5 : cols;
      sketch.add("w", g.block(row, row_end - row, col, col_end - col), row, col);
    }
  }
  EXPECT_EQ(whole, pieces);
}

TEST(GradientSketch, DependsOnNameSeedAndStep) {
  Buffer<float> storage(200);
  storage.fill(1);
  const MatrixView<const float> g = storage.matrix(0, 10, 20);
  const auto sketch = [&](const char* name, std::uint64_t seed, Index step) {
    std::vector<double> buckets(static_cast<std::size_t>(k));
    GradientSketch(buckets, seed, step).add(name, g, 0, 0);
    return buckets;
  };
  EXPECT_EQ(sketch("a", 1, 1), sketch("a", 1, 1));
  EXPECT_NE(sketch("a", 1, 1), sketch("b", 1, 1));
  EXPECT_NE(sketch("a", 1, 1), sketch("a", 2, 1));
  EXPECT_NE(sketch("a", 1, 1), sketch("a", 1, 2));
}

}  // namespace
}  // namespace lowband
