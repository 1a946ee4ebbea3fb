#include "collectives/factors/homes.h"

#include "runtime/random.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>

#include <gtest/gtest.h>

namespace lowband {
namespace {

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

/// The layer matrices of the 166M model, a is the longer side: q, k, v, o, gate, up, down of 18 layers.
std::vector<LeftExtent> rank166m(Index ffn, Index qko, Index v) {
  std::vector<LeftExtent> factors;
  for (int layer = 0; layer < 18; ++layer) {
    for (const Index rank : {qko, qko, v, qko}) factors.push_back({768, rank});
    for (int k = 0; k < 3; ++k) factors.push_back({2048, ffn});
  }
  return factors;
}

struct Imbalance {
  double elements, cost;  // largest over mean
};
Imbalance imbalance(const std::vector<LeftExtent>& factors, int homes) {
  const std::vector<int> home = choose_homes(factors, homes);
  std::vector<double> elements(at(homes)), cost(at(homes));
  for (std::size_t i = 0; i < factors.size(); ++i) {
    const auto load = static_cast<double>(factors[i].rows * factors[i].factor_rank);
    elements[at(home[i])] += load;
    cost[at(home[i])] += load * static_cast<double>(factors[i].factor_rank);
  }
  const auto ratio = [&](const std::vector<double>& loads) {
    return std::ranges::max(loads) * homes / std::accumulate(loads.begin(), loads.end(), 0.0);
  };
  return {ratio(elements), ratio(cost)};
}

TEST(Homes, ShareBytesAndCostOfThe166MModelEvenly) {
  const std::vector<std::vector<LeftExtent>> profiles{rank166m(620, 620, 620), rank166m(768, 512, 128),
                                                      rank166m(768, 128, 768), rank166m(64, 64, 64)};
  for (const auto& profile : profiles) {
    for (const int homes : {1, 2, 3, 4, 8, 12}) {
      const Imbalance found = imbalance(profile, homes);
      EXPECT_LE(found.elements, 1.03);
      EXPECT_LE(found.cost, 1.03);
    }
  }
}

// Before a matrix joins it, the home with the smallest larger load has at most the mean of elements + cost
// over homes, which is 2.
TEST(Homes, NeverExceedTwiceTheMeanAndOneMatrix) {
  const RandomStream random(1, "homes");
  for (Index trial = 0; trial < 50; ++trial) {
    std::vector<LeftExtent> factors;
    for (Index k = 0; k < 40; ++k) {
      const auto draw = [&](Index which) {
        return 1 + static_cast<Index>(random.uniform(trial * 80 + 2 * k + which) * 99);
      };
      factors.push_back({draw(0), draw(1)});
    }
    const int homes = 1 + static_cast<int>(trial % 7);
    double elements = 0, cost = 0, largest_elements = 0, largest_cost = 0;
    for (const LeftExtent& f : factors) {
      const auto e = static_cast<double>(f.rows * f.factor_rank);
      const double c = e * static_cast<double>(f.factor_rank);
      elements += e, cost += c;
      largest_elements = std::max(largest_elements, e), largest_cost = std::max(largest_cost, c);
    }
    const double slack = std::max(largest_elements / elements, largest_cost / cost) * homes;
    const Imbalance found = imbalance(factors, homes);
    EXPECT_LE(std::max(found.elements, found.cost), 2 + slack) << trial;
  }
}

TEST(Homes, AreLegalForFewAndEmptyMatrices) {
  EXPECT_TRUE(choose_homes({}, 3).empty());
  const std::vector<LeftExtent> one{{5, 2}};
  EXPECT_EQ(choose_homes(one, 4), std::vector<int>{0});
  const std::vector<LeftExtent> empty{{0, 2}, {0, 1}};
  for (const int home : choose_homes(empty, 2)) EXPECT_LT(home, 2);
}

TEST(FillUp, RaisesTheSmallestPartsToOneLevel) {
  EXPECT_EQ(fill_up(std::vector<Index>{5, 1, 3}, 0), (std::vector<Index>{0, 0, 0}));
  EXPECT_EQ(fill_up(std::vector<Index>{5, 1, 3}, 2), (std::vector<Index>{0, 2, 0}));
  EXPECT_EQ(fill_up(std::vector<Index>{5, 1, 3}, 5), (std::vector<Index>{0, 4, 1}));
  EXPECT_EQ(fill_up(std::vector<Index>{5, 1, 3}, 8), (std::vector<Index>{0, 5, 3}));
  EXPECT_EQ(fill_up(std::vector<Index>{0}, 7), (std::vector<Index>{7}));
  EXPECT_EQ(fill_up(std::vector<Index>{4, 4, 4}, 2), (std::vector<Index>{1, 1, 0}));
  const RandomStream random(2, "fill");
  for (Index trial = 0; trial < 200; ++trial) {
    std::vector<Index> parts;
    for (Index p = 0; p <= trial % 6; ++p)
      parts.push_back(static_cast<Index>(random.uniform(trial * 10 + p) * 50));
    const Index filler = static_cast<Index>(random.uniform(trial * 10 + 9) * 100);
    const std::vector<Index> fill = fill_up(parts, filler);
    EXPECT_EQ(std::accumulate(fill.begin(), fill.end(), Index{0}), filler);
    Index highest_filled = 0;
    Index lowest = std::numeric_limits<Index>::max();
    for (std::size_t p = 0; p < parts.size(); ++p) {
      EXPECT_GE(fill[p], 0);
      if (fill[p] > 0) highest_filled = std::max(highest_filled, parts[p] + fill[p]);
      lowest = std::min(lowest, parts[p] + fill[p]);
    }
    EXPECT_LE(highest_filled, lowest + 1) << trial;
  }
}

}  // namespace
}  // namespace lowband
