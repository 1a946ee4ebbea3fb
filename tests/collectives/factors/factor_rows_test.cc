#include "collectives/factors/factor_rows.h"

#include "collectives/local/local_world.h"

#include <gtest/gtest.h>

namespace lowband {
namespace {

/// An integer that names its place, so that every sum is exact and a misplaced element shows.
double entry(Index matrix, Index row, Index col) {
  return static_cast<double>(10000 * matrix + 100 * row + col);
}

class FactorRowsOn : public testing::TestWithParam<int> {};

TEST_P(FactorRowsOn, SumsEveryRowOnceAndGivesItToAll) {
  run_world(GetParam(), [](Communicator& world) {
    const auto alone = world.split(world.process(), 0, "alone");
    // Three matrices that the axis sums, with fewer rows than processes among them, and one it does not.
    FactorRows<double> factor(
        {{"a", 11, 3, &world}, {"b", 2, 5, &world}, {"c", 7, 2, alone.get()}, {"d", 5, 1, &world}});
    for (Index m = 0; m < 4; ++m) {
      const MatrixView<double> piece = factor.piece(m);
      for (Index i = 0; i < piece.rows; ++i) {
        for (Index j = 0; j < piece.cols; ++j) piece(i, j) = entry(m, i, j) * (world.process() + 1);
      }
    }
    world.ledger().begin_step();
    factor.reduce_scatter();
    Index owned = 0;
    for (Index m = 0; m < 4; ++m) owned += factor.owned(m).elements();
    EXPECT_EQ(static_cast<Index>(factor.all_owned().size()), owned);
    // Whoever owns a row may change it before it returns to all.
    for (double& x : factor.all_owned()) x += 0.5;
    factor.all_gather();

    const double processes = world.size();
    const double sum_of_factors = processes * (processes + 1) / 2;
    for (Index m = 0; m < 4; ++m) {
      const MatrixView<double> piece = factor.piece(m);
      const double factor_of = m == 2 ? world.process() + 1 : sum_of_factors;
      for (Index i = 0; i < piece.rows; ++i) {
        for (Index j = 0; j < piece.cols; ++j)
          EXPECT_EQ(piece(i, j), entry(m, i, j) * factor_of + 0.5) << m << " " << i << " " << j;
      }
    }
    // One buffer each way, no padding, and nothing for the matrix that is not cut.
    const Index elements = world.size() > 1 ? 11 * 3 + 2 * 5 + 5 * 1 : 0;
    EXPECT_EQ(world.ledger().step_sum("world", Purpose::kFactor).payload_bytes, 2 * 8 * elements);
    EXPECT_EQ(world.ledger().step_sum().calls, world.size() > 1 ? 2 : 0);
  });
}

TEST_P(FactorRowsOn, OwnedRowsOfAllProcessesAreTheWholePiece) {
  run_world(GetParam(), [](Communicator& world) {
    FactorRows<float> factor({{"a", 11, 3, &world}, {"b", 2, 5, &world}});
    std::vector<std::int64_t> elements{static_cast<std::int64_t>(factor.all_owned().size())};
    world.all_reduce(std::span(elements), Reduction::kSum, {Purpose::kControl});
    EXPECT_EQ(elements[0], 11 * 3 + 2 * 5);
    EXPECT_EQ(factor.owned_shares()[1].parameter, "b");
    EXPECT_EQ(factor.owned_shares()[1].elements, factor.owned(1).elements());
  });
}

INSTANTIATE_TEST_SUITE_P(Processes, FactorRowsOn, testing::Values(1, 2, 3, 4, 7));

}  // namespace
}  // namespace lowband
