#include "launcher/bench/exact_data.h"

#include "runtime/buffer.h"
#include "runtime/linalg.h"

#include <cmath>
#include <cstdlib>
#include <vector>

#include <gtest/gtest.h>

namespace lowband {
namespace {

using Held = ExactSummands::Held;

std::vector<ExactSummands> everybody(int processes, Held held) {
  std::vector<ExactSummands> all;
  for (int p = 0; p < processes; ++p) all.emplace_back(p, processes, held, 3);
  return all;
}

TEST(ExactSummands, AddUpExactlyInAnyOrderWithinTheWireType) {
  for (const int n : {1, 2, 3, 4, 7, 16, 128}) {
    for (const Held held : {Held::kF32, Held::kBF16}) {
      const auto all = everybody(n, held);
      const Index largest = held == Held::kBF16 ? 256 : Index{1} << 24;
      Index nonzero = 0;
      for (Index e = 0; e < 500; ++e) {
        Index sum = 0;
        Index magnitudes = 0;
        for (const ExactSummands& data : all) {
          const Index x = data.mean(5, e) + data.deviation(5, e);
          sum += x;
          magnitudes += std::abs(x);
          nonzero += x != 0;
        }
        EXPECT_EQ(sum, all[0].sum(5, e));
        EXPECT_EQ(sum, n * all[0].mean(5, e));
        EXPECT_LE(magnitudes, largest);  // every partial sum is held
      }
      EXPECT_GT(nonzero, 500 * n / 2) << n;  // most processes contribute to most elements
    }
  }
}

TEST(ExactSummands, AChangedMissingOrMisplacedValueIsCounted) {
  const auto all = everybody(3, Held::kBF16);
  Buffer<float> sum(100);
  for (Index e = 0; e < 100; ++e) sum[e] = static_cast<float>(all[0].sum(2, e));
  const auto wrong = [&] { return all[1].count_not_sum(2, std::span<const float>(sum.span())); };
  EXPECT_EQ(wrong(), 0);
  sum[17] += 1;
  EXPECT_EQ(wrong(), 1);
  sum[18] = std::nanf("");
  EXPECT_EQ(wrong(), 2);
  // One process left out.
  Buffer<float> own(100);
  all[2].fill(2, own.span());
  for (Index e = 0; e < 100; ++e) sum[e] = static_cast<float>(all[0].sum(2, e)) - own[e];
  EXPECT_GT(wrong(), 80);
  // One place further, and another tensor's.
  for (Index e = 0; e < 100; ++e) sum[e] = static_cast<float>(all[0].sum(2, e + 1));
  EXPECT_GT(wrong(), 80);
  for (Index e = 0; e < 100; ++e) sum[e] = static_cast<float>(all[0].sum(3, e));
  EXPECT_GT(wrong(), 80);
}

TEST(ExactSummands, LeftFactorsHaveTheBasisThatHouseholderFinds) {
  struct Shape {
    Index rows, columns;
  };
  for (const auto [rows, columns] :
       {Shape{1, 1}, Shape{7, 7}, Shape{64, 5}, Shape{65, 4}, Shape{100, 100}, Shape{300, 2}}) {
    for (const int n : {1, 3, 4}) {
      const auto all = everybody(n, Held::kBF16);
      Buffer<double> sum(rows * columns);
      Buffer<float> own(rows * columns);
      for (const ExactSummands& data : all) {
        data.fill_left(8, own.matrix(0, rows, columns));
        for (Index e = 0; e < sum.size(); ++e) sum[e] += static_cast<double>(own[e]);
      }
      std::vector<std::uint8_t> dead(static_cast<std::size_t>(columns));
      householder_orthonormalise(sum.matrix(0, rows, columns), 1e-12, dead);
      // Householder in double is not exact; it is so after rounding to float, but for what should be zero.
      Buffer<float> p(rows * columns);
      for (Index e = 0; e < p.size(); ++e) p[e] = std::abs(sum[e]) < 1e-12 ? 0 : static_cast<float>(sum[e]);
      const auto found = std::as_const(p).matrix(0, rows, columns);
      EXPECT_EQ(all[0].count_not_orthonormal(8, found), 0) << rows << " x " << columns << ", " << n;
      p[rows * columns - 1] += 0.25F;
      EXPECT_EQ(all[0].count_not_orthonormal(8, found), 1);
      p[rows * columns - 1] -= 0.25F;
      EXPECT_GT(all[0].count_not_orthonormal(9, found) + all[0].count_not_orthonormal(10, found), 0)
          << "other tensors have other signs";
      if (rows < 64 || rows == columns) continue;
      // A row too far down.
      EXPECT_GT(all[0].count_not_orthonormal(8, found.row_block(1, rows - 1)), 0);
    }
  }
}

}  // namespace
}  // namespace lowband
