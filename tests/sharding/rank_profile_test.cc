#include "sharding/rank_profile.h"

#include <cmath>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using Kind = ProfileSpec::Kind;

struct LayerShape {
  Index width, head_dim, heads, kv_heads, ffn_width, layers;
};
// The published 166M model and a small one with grouped queries.
constexpr LayerShape kPublished{768, 128, 6, 6, 2048, 18};
constexpr LayerShape kGrouped{256, 32, 8, 2, 704, 4};

std::vector<ParameterInfo> parameters_of(const LayerShape& s) {
  const Index query_rows = s.heads * s.head_dim, kv_rows = s.kv_heads * s.head_dim;
  std::vector<ParameterInfo> parameters{{"embedding", Role::kEmbedding, 50257, s.width}};
  for (Index layer = 0; layer < s.layers; ++layer) {
    const auto add = [&](const char* name, Role role, Index rows, Index cols) {
      parameters.push_back({cat("layers.", layer, ".", name), role, rows, cols});
    };
    add("norm", Role::kNorm, 1, s.width);
    add("q", Role::kQuery, query_rows, s.width);
    add("k", Role::kKey, kv_rows, s.width);
    add("v", Role::kValue, kv_rows, s.width);
    add("o", Role::kOutput, s.width, query_rows);
    add("gate", Role::kGate, s.ffn_width, s.width);
    add("up", Role::kUp, s.ffn_width, s.width);
    add("down", Role::kDown, s.width, s.ffn_width);
  }
  return parameters;
}

ProfileSpec uniform(Index rank) { return {.kind = Kind::kUniform, .uniform_rank = rank}; }
ProfileSpec by_shape(Kind kind, const LayerShape& s, double scale = 1.0) {
  return {.kind = kind, .width = s.width, .head_dim = s.head_dim, .scale = scale};
}
ProfileSpec fraction(Index numerator, Index denominator) {
  return {.kind = Kind::kFraction, .fraction_numerator = numerator, .fraction_denominator = denominator};
}

std::string error_of(const ProfileSpec& spec, const LayerShape& shape) {
  try {
    make_profile(spec, parameters_of(shape));
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "";
}

// ---- The published budgets: width 768, head dimension 128, FFN 2048, 18 layers ----

TEST(PublishedBudgets, FactorElementsPerLayerAndInTotal) {
  LayerShape one_layer = kPublished;
  one_layer.layers = 1;
  const auto layer = parameters_of(one_layer), model = parameters_of(kPublished);
  const auto structural = by_shape(Kind::kStructural, kPublished);
  const auto inverted = by_shape(Kind::kInverted, kPublished);

  EXPECT_EQ(factor_elements(make_profile(uniform(620), layer)), 9'047'040);
  EXPECT_EQ(factor_elements(make_profile(structural, layer)), 9'043'968);
  EXPECT_EQ(factor_elements(make_profile(inverted, layer)), 8'257'536);
  EXPECT_EQ(dense_elements(make_profile(structural, layer)), 7'077'888);

  EXPECT_EQ(factor_elements(make_profile(uniform(620), model)), 162'846'720);
  EXPECT_EQ(factor_elements(make_profile(structural, model)), 162'791'424);
  EXPECT_EQ(factor_elements(make_profile(inverted, model)), 148'635'648);
  EXPECT_EQ(dense_elements(make_profile(structural, model)), 127'401'984);
}

TEST(PublishedBudgets, RatiosToTheStructuralProfile) {
  const auto model = parameters_of(kPublished);
  const auto structural = make_profile(by_shape(Kind::kStructural, kPublished), model);
  const auto ratio = [&](const ProfileSpec& spec) {
    return budget_ratio(make_profile(spec, model), structural);
  };
  EXPECT_NEAR(ratio(uniform(620)), 1.0003397, 1e-7);
  EXPECT_NEAR(ratio(by_shape(Kind::kInverted, kPublished)), 0.9130435, 1e-7);
  EXPECT_NEAR(ratio(uniform(619)), 0.9987262, 1e-7);
  EXPECT_LE(std::abs(ratio(uniform(620)) - 1), kMatchTolerance);
  EXPECT_GT(std::abs(ratio(uniform(619)) - 1), kMatchTolerance);
}

TEST(PublishedBudgets, MatchedUniformRankIsTheNearest) {
  const auto structural = make_profile(by_shape(Kind::kStructural, kPublished), parameters_of(kPublished));
  const auto matched = matched_uniform(structural);
  EXPECT_THAT(matched.factor_ranks, testing::Each(620));  // 619.789
  EXPECT_EQ(matched.name, "uniform:620");
}

// d_h = 64 gives (768, 256, 64) and a matched real rank of 532.21.
TEST(PublishedBudgets, HeadDimension64) {
  LayerShape shape{768, 64, 12, 12, 2048, 1};
  const auto structural = make_profile(by_shape(Kind::kStructural, shape), parameters_of(shape));
  EXPECT_THAT(structural.factor_ranks, testing::ElementsAre(256, 256, 64, 256, 768, 768, 768));
  EXPECT_EQ(factor_elements(structural), 7'766'016);
  EXPECT_NEAR(7'766'016 / 14'592.0, 532.21, 0.005);
  EXPECT_THAT(matched_uniform(structural).factor_ranks, testing::Each(532));
}

TEST(BreakEven, IsWhereFactorsCostWhatTheMatrixCosts) {
  EXPECT_DOUBLE_EQ(break_even_rank({}, 768, 768), 384);
  EXPECT_NEAR(break_even_rank({}, 768, 2048), 558.545, 5e-4);
  EXPECT_NEAR(break_even_rank({}, 4096, 14336), 3185.78, 5e-3);
  EXPECT_DOUBLE_EQ(break_even_rank({}, 4096, 4096), 2048);
}

// ---- The rules ----

TEST(Structural, ClipsAtTheNarrowMatricesOfGroupedQueries) {
  LayerShape shape = kGrouped;
  shape.layers = 1;  // k and v are 64 x 256
  EXPECT_THAT(make_profile(by_shape(Kind::kStructural, shape), parameters_of(shape)).factor_ranks,
              testing::ElementsAre(128, 64, 32, 128, 256, 256, 256));
  EXPECT_THAT(make_profile(by_shape(Kind::kInverted, shape), parameters_of(shape)).factor_ranks,
              testing::ElementsAre(32, 32, 64, 32, 256, 256, 256));
}

TEST(Structural, ScaleRoundsToNearestAndKeepsAtLeastOne) {
  LayerShape shape = kPublished;
  shape.layers = 1;
  EXPECT_THAT(make_profile(by_shape(Kind::kStructural, shape, 0.011), parameters_of(shape)).factor_ranks,
              testing::ElementsAre(6, 6, 1, 6, 8, 8, 8));  // 5.632, 1.408, 8.448
  EXPECT_THAT(make_profile(by_shape(Kind::kStructural, shape, 1e-9), parameters_of(shape)).factor_ranks,
              testing::Each(1));
}

// Double arithmetic gives 8 of 0.07 * 100 and 15 of 0.14 * 100.
TEST(Fraction, IsTheSmallestRankThatReachesTheFraction) {
  for (Index extent : {1, 2, 3, 7, 64, 99, 100, 101, 768, 4096}) {
    for (Index percent = 1; percent <= 100; ++percent) {
      const std::vector<ParameterInfo> square{{"w", Role::kQuery, extent, extent}};
      Index expected = 0;
      while (expected * 100 < percent * extent) ++expected;
      EXPECT_EQ(make_profile(fraction(percent, 100), square).factor_ranks.front(), expected)
          << percent << " % of " << extent;
    }
  }
  const std::vector<ParameterInfo> square{{"w", Role::kQuery, 100, 100}};
  EXPECT_EQ(make_profile(fraction(7, 100), square).factor_ranks.front(), 7);
  EXPECT_EQ(make_profile(fraction(14, 100), square).factor_ranks.front(), 14);
}

TEST(Fraction, StaysExactWhereProductsExceed64Bits) {
  const Index extent = 1'000'000'000'007;
  const std::vector<ParameterInfo> square{{"w", Role::kQuery, extent, extent}};
  EXPECT_EQ(make_profile(fraction(999'999'999, 1'000'000'000), square).factor_ranks.front(),
            999'999'999'007);  // 10^12 + 7 - 1000 - 7e-9, rounded up
}

TEST(Budget, CountsBeyond32Bits) {
  const std::vector<ParameterInfo> tall{{"w", Role::kUp, 3'000'000'000, 1000}};
  const RankProfile profile = make_profile(uniform(7), tall);
  EXPECT_EQ(factor_elements(profile), 21'000'007'000);
  EXPECT_EQ(dense_elements(profile), 3'000'000'000'000);
}

TEST(Explicit, TakesTheTableAsItIs) {
  const std::vector<ParameterInfo> two{{"a", Role::kQuery, 8, 6}, {"b", Role::kUp, 9, 4}};
  const ProfileSpec spec{.kind = Kind::kExplicit, .explicit_ranks = {{"b", 3}, {"a", 5}}};
  EXPECT_THAT(make_profile(spec, two).factor_ranks, testing::ElementsAre(5, 3));
}

TEST(Errors, NameTheFieldTheParameterAndTheLimit) {
  EXPECT_EQ(error_of(uniform(65), kGrouped),
            "profile.rank: found 65, expected 1 to min(m, n) = 64 of layers.0.k");
  EXPECT_EQ(error_of(uniform(0), kGrouped),
            "profile.rank: found 0, expected 1 to min(m, n) = 256 of layers.0.q");
  EXPECT_EQ(error_of(fraction(3, 2), kGrouped),
            "profile.numerator: found 3, expected 1 to the denominator 2");
  EXPECT_EQ(error_of(fraction(1, 0), kGrouped), "profile.denominator: found 0, expected 1 to 1000000000");
  EXPECT_EQ(error_of(by_shape(Kind::kInverted, kGrouped, -1), kGrouped),
            "profile.scale: found -1, expected a positive number");
  ProfileSpec scaled = uniform(8);
  scaled.scale = 2;
  EXPECT_EQ(error_of(scaled, kGrouped),
            "profile.scale: found 2, expected 1: only structural and inverted ranks are scaled");
  EXPECT_EQ(error_of({.kind = Kind::kStructural}, kGrouped), "profile: found width 0, expected the model's");

  ProfileSpec table{.kind = Kind::kExplicit};
  for (const auto& info : parameters_of(kGrouped))
    if (is_layer_matrix(info.role)) table.explicit_ranks[info.name] = 4;
  ProfileSpec missing = table, foreign = table, large = table;
  missing.explicit_ranks.erase("layers.2.o");
  EXPECT_EQ(error_of(missing, kGrouped), "profile: found no rank for layers.2.o, expected 1 to 256");
  foreign.explicit_ranks["layers.1.norm"] = 1;
  EXPECT_EQ(error_of(foreign, kGrouped),
            "profile: found a rank for layers.1.norm, expected the name of a layer matrix of this model");
  large.explicit_ranks["layers.3.v"] = 65;
  EXPECT_EQ(error_of(large, kGrouped), "profile: found rank 65 for layers.3.v, expected 1 to min(m, n) = 64");
}

// ---- Matching ----

/// Least |B / B(reference) - 1| after moving any two ranks of `profile` by up to one: by trying all of them.
Index nearest_by_pairs(const RankProfile& profile, Index budget) {
  const auto steps_of = [&](std::size_t l) {
    std::vector<Index> steps{0};
    const ParameterInfo& m = profile.matrices[l];
    if (profile.factor_ranks[l] > 1) steps.push_back(-(m.rows + m.cols));
    if (profile.factor_ranks[l] < std::min(m.rows, m.cols)) steps.push_back(m.rows + m.cols);
    return steps;
  };
  const Index left = budget - factor_elements(profile);
  Index nearest = std::abs(left);
  for (std::size_t i = 0; i < profile.matrices.size(); ++i)
    for (std::size_t j = 0; j < i; ++j)
      for (const Index a : steps_of(i))
        for (const Index b : steps_of(j)) nearest = std::min(nearest, std::abs(left - a - b));
  return nearest;
}

TEST(MatchedTo, QuickStartPairIsExact) {
  const LayerShape shape{256, 32, 8, 8, 704, 4};
  const auto reference = make_profile(uniform(24), parameters_of(shape));
  const auto matched = matched_to(by_shape(Kind::kStructural, shape), reference);
  EXPECT_EQ(factor_elements(matched), factor_elements(reference));
  EXPECT_EQ(matched.name, "structural matched to uniform:24");
}

TEST(MatchedTo, FindsTheProfileItselfWhenItIsTheReference) {
  for (const ProfileSpec& spec : {by_shape(Kind::kStructural, kPublished),
                                  by_shape(Kind::kInverted, kPublished), uniform(620), fraction(1, 4)}) {
    const auto reference = make_profile(spec, parameters_of(kPublished));
    EXPECT_EQ(matched_to(spec, reference).factor_ranks, reference.factor_ranks) << reference.name;
  }
}

// Every shape against every budget; a rank leaves its scaled value by at most 0.5 (rounding) + 1 + 1.
TEST(MatchedTo, MeetsTheBudgetAndKeepsTheShape) {
  for (const LayerShape& shape : {kPublished, kGrouped, LayerShape{97, 14, 7, 7, 263, 5}}) {
    const auto parameters = parameters_of(shape);
    for (const Index rank : {4, 12, 37, 60}) {
      const auto reference =
          make_profile(uniform(std::min(rank, shape.kv_heads * shape.head_dim)), parameters);
      for (const ProfileSpec& spec : {by_shape(Kind::kStructural, shape), by_shape(Kind::kInverted, shape),
                                      fraction(1, 2), uniform(1)}) {
        const auto matched = matched_to(spec, reference);
        const double off = std::abs(budget_ratio(matched, reference) - 1);
        EXPECT_LE(off, kMatchTolerance) << matched.name << ", width " << shape.width;
        const Index budget = factor_elements(reference);
        EXPECT_EQ(std::abs(budget - factor_elements(matched)), nearest_by_pairs(matched, budget))
            << matched.name;
        for (std::size_t l = 7; l < matched.factor_ranks.size(); ++l)
          EXPECT_LE(std::abs(matched.factor_ranks[l] - matched.factor_ranks[l - 7]), 5) << matched.name;
        EXPECT_EQ(matched_to(spec, reference).factor_ranks, matched.factor_ranks);
      }
    }
  }
}

TEST(MatchedTo, ScalesAnExplicitTable) {
  const std::vector<ParameterInfo> two{{"a", Role::kQuery, 100, 100}, {"b", Role::kKey, 100, 100}};
  const ProfileSpec table{.kind = Kind::kExplicit, .explicit_ranks = {{"a", 30}, {"b", 10}}};
  EXPECT_THAT(matched_to(table, make_profile(uniform(40), two)).factor_ranks, testing::ElementsAre(60, 20));
}

// Budget 31 ranks on shape 51 : 52 : 52 gives 10.2, 10.4, 10.4. All three round down; the rank left over goes
// to the first of the two largest remainders.
TEST(MatchedTo, GivesTheLastRankToTheLargestRemainder) {
  const std::vector<ParameterInfo> three{
      {"a", Role::kQuery, 90, 110}, {"b", Role::kKey, 100, 100}, {"c", Role::kKey, 100, 100}};
  const ProfileSpec shape{.kind = Kind::kExplicit, .explicit_ranks = {{"a", 51}, {"b", 52}, {"c", 52}}};
  const ProfileSpec budget{.kind = Kind::kExplicit, .explicit_ranks = {{"a", 11}, {"b", 10}, {"c", 10}}};
  EXPECT_THAT(matched_to(shape, make_profile(budget, three)).factor_ranks, testing::ElementsAre(10, 11, 10));
}

TEST(MatchedTo, StopsAtTheLimitsOfTheRanks) {
  const auto parameters = parameters_of(kGrouped);
  const auto full = make_profile(fraction(1, 1), parameters);
  EXPECT_EQ(matched_to(by_shape(Kind::kInverted, kGrouped), full).factor_ranks, full.factor_ranks);
  const auto least = make_profile(uniform(1), parameters);
  EXPECT_EQ(matched_to(by_shape(Kind::kStructural, kGrouped), least).factor_ranks, least.factor_ranks);
}

TEST(MatchedUniform, ClipsWhereTheNearestRankIsTooLarge) {
  const auto full = make_profile(fraction(1, 1), parameters_of(kGrouped));
  for (std::size_t l = 0; l < full.matrices.size(); ++l)
    EXPECT_LE(matched_uniform(full).factor_ranks[l], std::min(full.matrices[l].rows, full.matrices[l].cols));
}

}  // namespace
}  // namespace lowband
