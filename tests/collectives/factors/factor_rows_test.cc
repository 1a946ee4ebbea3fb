#include "collectives/factors/factor_rows.h"

#include "collectives/local/local_world.h"

#include <algorithm>

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

TEST_P(FactorRowsOn, OwnedRowsLieByPartWithTheirGuestsBehindThem) {
  run_world(GetParam(), [](Communicator& world) {
    const auto alone = world.split(world.process(), 0, "alone");
    FactorRows<double> factor({{"a", 11, 3, &world, 2},
                               {"b", 2, 5, &world, 0},
                               {"c", 7, 2, alone.get(), 2},
                               {"d", 5, 1, &world, 0}},
                              {4, 1, 0});
    const auto elements = [&](Index i) { return factor.owned(i).elements(); };
    const std::vector<Index> expected{elements(1) + elements(3) + 4, 1, elements(0) + elements(2)};
    EXPECT_TRUE(std::ranges::equal(factor.part_elements(), expected));
    const double* place = factor.all_owned().data();
    for (const Index i : {1, 3}) {
      EXPECT_EQ(factor.owned(i).data, place);
      place += elements(i);
    }
    EXPECT_EQ(factor.guest(0).data(), place);
    EXPECT_EQ(factor.guest(0).size(), 4U);
    EXPECT_EQ(factor.part(1).data(), place + 4);
    EXPECT_EQ(factor.guest(1).data(), place + 4);
    EXPECT_EQ(factor.part(2).data(), place + 5);
    EXPECT_TRUE(factor.guest(2).empty());

    // Guests are nobody's rows.
    std::ranges::fill(factor.guest(0), 7.0);
    for (Index i = 0; i < 4; ++i) std::ranges::fill(factor.piece(i).flat(), 1.0);
    factor.reduce_scatter();
    for (const Index i : {0, 1, 3}) {
      for (const double x : factor.owned(i).flat()) EXPECT_EQ(x, world.size());
    }
    factor.all_gather();
    for (const Index i : {0, 1, 3}) {
      for (const double x : factor.piece(i).flat()) EXPECT_EQ(x, world.size());
    }
    for (const double x : factor.guest(0)) EXPECT_EQ(x, 7);
  });
}

INSTANTIATE_TEST_SUITE_P(Processes, FactorRowsOn, testing::Values(1, 2, 3, 4, 7));

}  // namespace
}  // namespace lowband
