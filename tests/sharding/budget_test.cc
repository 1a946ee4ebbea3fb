#include "sharding/budget.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// Shapes whose m + n, m n and break-even ranks all differ: 10 x 6 (60 / 16 = 3.75), 6 x 14 (84 / 20 = 4.2)
// and 10 x 10 (5).
std::vector<ParameterInfo> three_matrices() {
  return {{"embedding", Role::kEmbedding, 100, 10},
          {"q", Role::kQuery, 10, 6},
          {"norm", Role::kNorm, 1, 10},
          {"up", Role::kUp, 6, 14},
          {"o", Role::kOutput, 10, 10}};
}

RankProfile explicit_profile(Index q, Index up, Index o) {
  return make_profile(
      {.kind = ProfileSpec::Kind::kExplicit, .explicit_ranks = {{"q", q}, {"up", up}, {"o", o}}},
      three_matrices());
}
RankProfile uniform_profile(Index factor_rank) {
  return make_profile({.kind = ProfileSpec::Kind::kUniform, .uniform_rank = factor_rank}, three_matrices());
}

constexpr ReplicaTraffic kFactorsF32{ExchangeChoice::kFactors, 4, 4};
constexpr ReplicaTraffic kAutoBF16{ExchangeChoice::kAuto, 2, 4};

std::string refusal(const RankProfile& profile, const RankProfile& reference, const ReplicaTraffic& traffic,
                    double tolerance) {
  try {
    expect_within_budget(profile, reference, traffic, tolerance);
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "";
}

TEST(MatrixBytes, CountsWhatTravelsInTheTypeItTravelsIn) {
  const RankProfile profile = explicit_profile(3, 5, 5);
  const MatrixBytes factors = matrix_bytes(profile, kFactorsF32);
  EXPECT_EQ(factors.factor, (3 * 16 + 5 * 20 + 5 * 20) * 4);
  EXPECT_EQ(factors.dense, 0);
  const MatrixBytes dense = matrix_bytes(profile, {ExchangeChoice::kDense, 4, 8});
  EXPECT_EQ(dense.factor, 0);
  EXPECT_EQ(dense.dense, (60 + 84 + 100) * 8);
  // Below break-even, above it, and at it, where factors save nothing.
  const MatrixBytes chosen = matrix_bytes(profile, {ExchangeChoice::kAuto, 4, 4});
  EXPECT_EQ(chosen.factor, 3 * 16 * 4);
  EXPECT_EQ(chosen.dense, (84 + 100) * 4);
  EXPECT_EQ(matrix_bytes(profile, kAutoBF16).factor, (3 * 16 + 5 * 20 + 5 * 20) * 2);
  EXPECT_EQ(matrix_bytes(profile, kAutoBF16).dense, 0);
}

// 10 x 10: an element of a factor costs as much as one of the matrix, half of it, or a quarter.
TEST(TravelsDense, FromTheBreakEvenRankByBytes) {
  struct Case {
    ReplicaTraffic traffic;
    Index break_even;
  };
  for (const auto& [traffic, break_even] : {Case{{ExchangeChoice::kAuto, 4, 4}, 5}, Case{kAutoBF16, 10},
                                            Case{{ExchangeChoice::kAuto, 2, 8}, 20}}) {
    EXPECT_EQ(break_even_rank(traffic, 10, 10), static_cast<double>(break_even));
    EXPECT_FALSE(travels_dense(traffic, 10, 10, break_even - 1));
    EXPECT_TRUE(travels_dense(traffic, 10, 10, break_even)) << "as many bytes";
    // 6 x 14 breaks even between two ranks: at 4.2, 8.4, 16.8.
    const auto below = static_cast<Index>(break_even_rank(traffic, 6, 14));
    EXPECT_FALSE(travels_dense(traffic, 6, 14, below));
    EXPECT_TRUE(travels_dense(traffic, 6, 14, below + 1));
  }
  EXPECT_FALSE(travels_dense({ExchangeChoice::kFactors, 4, 4}, 10, 10, 6));
  EXPECT_TRUE(travels_dense({ExchangeChoice::kDense, 2, 4}, 10, 10, 1));
}

TEST(BudgetRatio, ComparesBothSentInTheSameWay) {
  const RankProfile high = uniform_profile(6), higher = explicit_profile(6, 6, 7);
  EXPECT_EQ(budget_ratio(higher, high, kFactorsF32), 356.0 / 336.0);
  EXPECT_EQ(budget_ratio(higher, high, {ExchangeChoice::kAuto, 4, 4}), 1.0) << "both travel dense";
  EXPECT_EQ(budget_ratio(higher, high, {ExchangeChoice::kDense, 4, 4}), 1.0);
}

// 56 elements per rank.
TEST(NearestUniform, ComesNearestByBytesAndCanBeWritten) {
  EXPECT_EQ(nearest_uniform(explicit_profile(4, 3, 3), kFactorsF32).name, "uniform:3");
  EXPECT_EQ(nearest_uniform(explicit_profile(4, 4, 3), kFactorsF32).name, "uniform:4");
  EXPECT_EQ(nearest_uniform(explicit_profile(6, 6, 10), kFactorsF32).name, "uniform:6") << "min(m, n) of q";
  // From rank 5 on q and up travel dense, at 6 all do: 60 + 84 + 100 = 244 elements.
  const ReplicaTraffic automatic{ExchangeChoice::kAuto, 4, 4};
  EXPECT_EQ(nearest_uniform(explicit_profile(6, 6, 10), automatic).name, "uniform:5");
}

TEST(ExpectWithinBudget, AcceptsUpToTheTolerance) {
  // 16 of 224 elements more: ratio 1.0714.
  const RankProfile reference = uniform_profile(4), profile = explicit_profile(5, 4, 4);
  EXPECT_EQ(refusal(reference, reference, kFactorsF32, 0), "");
  EXPECT_EQ(refusal(profile, reference, kFactorsF32, 0.072), "");
  EXPECT_NE(refusal(profile, reference, kFactorsF32, 0.071), "");
  EXPECT_NE(refusal(explicit_profile(3, 4, 4), reference, kFactorsF32, 0.071), "") << "too few are no match";
}

TEST(ExpectWithinBudget, NamesTheRanksThatWouldMatch) {
  EXPECT_EQ(refusal(explicit_profile(5, 4, 4), uniform_profile(4), kFactorsF32, 0.0005),
            "budget.reference: found 960 bytes per step and replica of explicit, expected 896 of uniform:4 "
            "within 0.0005: ratio 1.071428571; nearest uniform rank 4: ratio 1; nearest ranks of this shape: "
            "q 5 -> 4: ratio 1");
}

TEST(ExpectWithinBudget, NamesTheNearestRanksWhereNoUniformOneMatches) {
  const std::string message = refusal(uniform_profile(6), explicit_profile(6, 6, 7), kFactorsF32, 0.0005);
  EXPECT_THAT(message, HasSubstr("ratio 0.9438202247; nearest uniform rank 6: ratio 0.9438202247"));
  EXPECT_THAT(message, testing::EndsWith("nearest ranks of this shape: o 6 -> 7: ratio 1"));
}

// m + n are 16 and 27: 86 elements, 5 short of the reference's 91, and 16 - 27 and 27 - 16 lead further away.
TEST(ExpectWithinBudget, SaysWhenNoRanksAreNearer) {
  const std::vector<ParameterInfo> two{{"q", Role::kQuery, 10, 6}, {"up", Role::kUp, 20, 7}};
  const auto profile = [&](Index q, Index up) {
    return make_profile({.kind = ProfileSpec::Kind::kExplicit, .explicit_ranks = {{"q", q}, {"up", up}}},
                        two);
  };
  EXPECT_THAT(refusal(profile(2, 2), profile(4, 1), kFactorsF32, 0.0005),
              testing::EndsWith("nearest ranks of this shape: these: ratio 0.9450549451"));
}

TEST(ExpectWithinBudget, NamesAFewOfManyChanges) {
  std::vector<ParameterInfo> six;
  for (const char* name : {"a", "b", "c", "d", "e", "f"}) six.push_back({name, Role::kQuery, 10, 6});
  const auto uniform = [&](Index factor_rank) {
    return make_profile({.kind = ProfileSpec::Kind::kUniform, .uniform_rank = factor_rank}, six);
  };
  EXPECT_THAT(refusal(uniform(2), uniform(3), kFactorsF32, 0.0005),
              testing::EndsWith("a 2 -> 3, b 2 -> 3, c 2 -> 3, d 2 -> 3 and 2 more: ratio 1"));
}

TEST(ExpectWithinBudget, NamesNoFactorRanksWhereMatricesTravelDense) {
  const std::string message =
      refusal(uniform_profile(2), uniform_profile(6), {ExchangeChoice::kAuto, 4, 4}, 0.0005);
  EXPECT_THAT(message, HasSubstr("found 448 bytes per step and replica of uniform:2, expected 976"));
  EXPECT_THAT(message, testing::EndsWith("nearest uniform rank 5: ratio 1"));
}

}  // namespace
}  // namespace lowband
