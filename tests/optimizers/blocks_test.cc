// Blocks of a parameter are matrices of their own: each as a parameter would be that is nothing else.

#include "sharding/rank_profile.h"
#include "world_run.h"

#include <algorithm>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using namespace test;

TestParameter parameter(const char* name, Role role, Index rows, Index cols, TensorCut cut,
                        ParameterBlocks blocks = {}) {
  return {{.name = name, .role = role, .rows = rows, .cols = cols, .cut = cut, .blocks = std::move(blocks)},
          3};
}

std::vector<Index> lines_of(const std::vector<Range>& block) {
  std::vector<Index> lines;
  for (const Range& range : block) {
    for (Index line = range.begin; line < range.end; ++line) lines.push_back(line);
  }
  return lines;
}

RunPlan plan_for(const MeshShape& mesh, OptimizerKind kind) {
  RunPlan plan;
  plan.mesh = mesh;
  plan.parameters = blocked_parameters();
  plan.parameters.push_back(parameter("plain", Role::kUp, 10, 12, TensorCut::kRows));
  plan.options = {.kind = kind,
                  .dion2_denominator = 2,
                  .spectra_fraction = 0.3,
                  .galore_interval = 2,
                  .weight_decay = 0,
                  .clip_norm = 0};
  plan.gradient = noisy_gradient;
  plan.shares = 12;
  plan.steps = 5;
  return plan;
}

/// A run, on one process for each replica, of a block as a parameter that is nothing else.
std::vector<Snapshot> run_of_block(const RunPlan& blocked, const TestParameter& whole, std::size_t j) {
  const ParameterBlocks& blocks = whole.info.blocks;
  const std::vector<Index> lines = lines_of(blocks.ranges[j]);
  RunPlan plan = blocked;
  plan.mesh = {.replica = blocked.mesh.replica};
  ParameterInfo info = matrices_of(whole.info)[j];
  info.cut = TensorCut::kNone;
  plan.parameters = {{info, std::min({whole.factor_rank, info.rows, info.cols})}};
  plan.gradient = [&](const ParameterInfo&, Index step, int share, Index row, Index col) {
    const auto line = [&](Index i) { return lines[static_cast<std::size_t>(i)]; };
    return noisy_gradient(whole.info, step, share, blocks.of_rows ? line(row) : row,
                          blocks.of_rows ? col : line(col));
  };
  return run<double>(plan);
}

/// What weights have moved by.
Dense moved(const Snapshot& snapshot, const ParameterInfo& info) {
  return snapshot.weights.at(info.name) - initial_weight(info);
}

struct Case {
  const char* name;
  OptimizerKind kind;
};
const Case kCases[] = {{"Muon", OptimizerKind::kMuon},     {"NorMuon", OptimizerKind::kNorMuon},
                       {"Dion2", OptimizerKind::kDion2},   {"NorDion2", OptimizerKind::kNorDion2},
                       {"SpecGd", OptimizerKind::kSpecGd}, {"Spectra", OptimizerKind::kSpectra},
                       {"Dion", OptimizerKind::kDion},     {"PowerSgd", OptimizerKind::kPowerSgd},
                       {"AcpSgd", OptimizerKind::kAcpSgd}, {"Galore", OptimizerKind::kGalore}};

class BlocksOf : public testing::TestWithParam<Case> {};

// Updates and states to the rounding of sums, which power iteration amplifies (tolerance of EveryOptimizer);
// states bit by bit where one process holds a replica and computes the same. Bytes exactly.
TEST_P(BlocksOf, AreMatricesOfTheirOwn) {
  for (const MeshShape& mesh :
       {MeshShape{1, 1, 1}, MeshShape{1, 1, 2}, MeshShape{1, 2, 1}, MeshShape{2, 1, 1}, MeshShape{2, 2, 2},
        MeshShape{1, 3, 1}, MeshShape{3, 1, 1}, MeshShape{1, 1, 3}, MeshShape{1, 2, 2}}) {
    SCOPED_TRACE(testing::Message() << "mesh " << mesh.replica << mesh.shard << mesh.tensor);
    const RunPlan blocked = plan_for(mesh, GetParam().kind);
    const auto found = run<double>(blocked);
    for (const TestParameter& whole : blocked.parameters) {
      const ParameterBlocks& blocks = whole.info.blocks;
      std::vector<Index> factor_bytes(found.size()), dense_bytes(found.size());
      for (std::size_t j = 0; j < blocks.ranges.size(); ++j) {
        const std::vector<Index> lines = lines_of(blocks.ranges[j]);
        const ParameterInfo info = matrices_of(whole.info)[j];
        const auto expected = run_of_block(blocked, whole, j);
        for (std::size_t step = 0; step < found.size(); ++step) {
          SCOPED_TRACE(testing::Message() << info.name << " at " << step);
          const Dense of_whole = moved(found[step], whole.info), of_block = moved(expected[step], info);
          for (Index i = 0; i < info.rows; ++i) {
            for (Index k = 0; k < info.cols; ++k) {
              const Index line = lines[static_cast<std::size_t>(blocks.of_rows ? i : k)];
              ASSERT_NEAR(of_whole(blocks.of_rows ? line : i, blocks.of_rows ? k : line), of_block(i, k),
                          1e-10);
            }
          }
          for (std::size_t replica = 0; replica < expected[step].states.size(); ++replica) {
            for (const auto& [name, state] : expected[step].states[replica]) {
              const std::string letter = name.substr(name.rfind('.') + 1);
              const Dense& own =
                  found[step].states[replica].at(cat(whole.info.name, ".", letter, "[", j, "]"));
              ASSERT_LE(largest(own - state), 1e-10) << letter;
              if (mesh.shard * mesh.tensor == 1) {
                ASSERT_EQ(own.a, state.a) << letter;
              }
            }
          }
          factor_bytes[step] += expected[step].factor_bytes;
          dense_bytes[step] += expected[step].dense_bytes;
        }
      }
      for (std::size_t step = 0; step < found.size() && !blocks.empty(); ++step) {
        const auto counted = [&](const std::map<std::string, Index>& bytes) {
          const auto of_parameter = bytes.find(whole.info.name);
          return of_parameter == bytes.end() ? 0 : of_parameter->second;
        };
        EXPECT_EQ(counted(found[step].factor_bytes_of), factor_bytes[step]) << whole.info.name;
        EXPECT_EQ(counted(found[step].dense_bytes_of), dense_bytes[step]) << whole.info.name;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Optimizers, BlocksOf, testing::ValuesIn(kCases),
                         [](const auto& parameter) { return std::string(parameter.param.name); });

// Three heads on three processes: signed where they are. What several share travels as any matrix does.
TEST(Blocks, AreNotSentWhereOneProcessHoldsThem) {
  RunPlan plan = plan_for({1, 1, 3}, OptimizerKind::kMuon);
  plan.steps = 1;
  const Snapshot snapshot = run<float>(plan)[0];
  EXPECT_EQ(snapshot.update_bytes_of.count("heads"), 0u);
  EXPECT_EQ(snapshot.update_bytes_of.count("out"), 0u);
  EXPECT_EQ(snapshot.update_bytes_of.at("head"), 2 * 4 * 8 * 16);
  EXPECT_EQ(snapshot.update_bytes_of.at("plain"), 2 * 4 * 10 * 12);
  // Rows 0 to 5, 6 to 11 and 12 to 17 on one process each: every block lies on two of them.
  EXPECT_EQ(snapshot.update_bytes_of.at("qkv"), 2 * 4 * 18 * 11);
  // Its last row on one process, the five others on three.
  EXPECT_EQ(snapshot.update_bytes_of.at("one_row"), 2 * 4 * 5 * 9);
}

TEST(Blocks, OfMuonBpAreCutFurtherBetweenItsPeriods) {
  RunPlan plan = plan_for({1, 1, 3}, OptimizerKind::kMuonBp);
  plan.options.muonbp_period = 2;
  plan.steps = 2;
  const auto found = run<double>(plan);
  plan.options.kind = OptimizerKind::kMuon;
  const auto expected = run<double>(plan);
  EXPECT_EQ(found[1].update_bytes, 0);
  // A head on one process is its own block.
  EXPECT_EQ(found[1].weights.at("heads").a, expected[1].weights.at("heads").a);
  EXPECT_NE(found[1].weights.at("head").a, expected[1].weights.at("head").a);
}

TEST(Blocks, AreRefusedWhereTheyAreNone) {
  const auto error_of = [](OptimizerKind kind, ParameterBlocks blocks) -> std::string {
    RunPlan plan = plan_for({}, kind);
    plan.parameters = {parameter("fused", Role::kUp, 10, 4, TensorCut::kRows, std::move(blocks))};
    try {
      run<float>(plan);
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return "";
  };
  using testing::HasSubstr;
  EXPECT_THAT(error_of(OptimizerKind::kMuon, {.ranges = {{{0, 5}}, {{6, 10}}}}),
              HasSubstr("blocks of fused: found rows 5 to 6 in no block, expected each in one"));
  EXPECT_THAT(error_of(OptimizerKind::kMuon, {.ranges = {{{0, 6}}, {{5, 10}}}}),
              HasSubstr("blocks of fused: found rows 5 to 6 in several blocks, expected each in one"));
  EXPECT_THAT(error_of(OptimizerKind::kMuon, {.ranges = {{{0, 9}}}}),
              HasSubstr("blocks of fused: found rows 9 to 10 in no block, expected each in one"));
  EXPECT_THAT(error_of(OptimizerKind::kMuon, {.of_rows = false, .ranges = {{{0, 5}}}}),
              HasSubstr("blocks of fused: found columns 0 to 5, expected increasing ranges within 0 to 4"));
  EXPECT_THAT(error_of(OptimizerKind::kMuon, {.ranges = {{{0, 10}}, {}}}),
              HasSubstr("blocks of fused: found one without rows, expected at least one range"));
  EXPECT_THAT(error_of(OptimizerKind::kMuon, {.ranges = {{{0, 5}}, {{5, 10}}}, .roles = {Role::kUp}}),
              HasSubstr("blocks of fused: found 1 roles, expected none or 2, one for each"));
  EXPECT_THAT(error_of(OptimizerKind::kMuon, {.ranges = {{{0, 10}}}, .roles = {Role::kHead}}),
              HasSubstr("blocks of fused: found the role head, expected roles of layer matrices"));
  for (const OptimizerKind kind : {OptimizerKind::kAdamW, OptimizerKind::kSgd, OptimizerKind::kLion})
    EXPECT_THAT(error_of(kind, {.ranges = {{{0, 5}}, {{5, 10}}}}),
                HasSubstr("blocks of fused: found 2, expected none of what is updated element by element"));
}

TEST(Blocks, HeadsDivideAParameter) {
  const auto q = parameter("q", Role::kQuery, 24, 16, TensorCut::kRows).info;
  EXPECT_EQ(with_heads(q, 8).blocks.ranges.size(), 3u);
  try {
    with_heads(q, 7);
    FAIL();
  } catch (const InvalidArgument& error) {
    EXPECT_THAT(error.what(),
                testing::HasSubstr("heads of q: found head_dim 7, expected a divisor of its 24 rows"));
  }
}

// The ranks of a profile by role are those of the blocks' roles.
TEST(Blocks, HaveTheRanksOfTheirRoles) {
  const ParameterInfo qkv = parameter("qkv", Role::kUp, 96, 32, TensorCut::kRows,
                                      {.ranges = {{{0, 32}}, {{32, 64}}, {{64, 96}}},
                                       .roles = {Role::kQuery, Role::kKey, Role::kValue}})
                                .info;
  const std::vector<ParameterInfo> parameters{qkv, parameter("up", Role::kUp, 48, 32, TensorCut::kRows).info};
  const RankProfile profile =
      make_profile({.kind = ProfileSpec::Kind::kStructural, .width = 24, .head_dim = 4}, parameters);
  EXPECT_EQ(factor_elements(profile), (16 + 16 + 4) * (32 + 32) + 24 * (48 + 32));
  EXPECT_EQ(ranks_by_parameter(profile, parameters), (std::vector<std::vector<Index>>{{16, 16, 4}, {24}}));
  EXPECT_EQ(profile.matrices[2].name, "qkv[2]");
}

}  // namespace
}  // namespace lowband
