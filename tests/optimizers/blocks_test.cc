// Blocks of a parameter are matrices of their own: each as a parameter would be that is nothing else.

#include "world_run.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using namespace test;

constexpr Index kHeadDim = 8;

TestParameter parameter(const char* name, Role role, Index rows, Index cols, TensorCut cut,
                        ParameterBlocks blocks = {}) {
  return {{.name = name, .role = role, .rows = rows, .cols = cols, .cut = cut, .blocks = std::move(blocks)},
          1};
}

/// Heads, a fused projection of two interleaved groups, halves, columns, and a block of one row.
std::vector<TestParameter> blocked_parameters() {
  return {parameter("q", Role::kQuery, 24, 16, TensorCut::kRows),
          parameter("k", Role::kKey, 8, 16, TensorCut::kRows),
          parameter("o", Role::kOutput, 16, 24, TensorCut::kCols),
          parameter("qkv", Role::kUp, 18, 11, TensorCut::kRows,
                    {.ranges = {{{0, 4}, {9, 13}}, {{4, 6}, {13, 15}}, {{6, 9}, {15, 18}}}}),
          parameter("gate_up", Role::kUp, 26, 7, TensorCut::kRows, {.ranges = {{{0, 13}}, {{13, 26}}}}),
          parameter("columns", Role::kDown, 5, 21, TensorCut::kCols,
                    {.of_rows = false, .ranges = {{{0, 1}, {20, 21}}, {{1, 20}}}}),
          parameter("one_row", Role::kUp, 6, 9, TensorCut::kRows, {.ranges = {{{5, 6}}, {{0, 5}}}}),
          parameter("plain", Role::kUp, 10, 12, TensorCut::kRows)};
}

/// What the blocks of a parameter are said to be, or its heads are.
ParameterBlocks blocks_of(const ParameterInfo& info) {
  ParameterBlocks blocks = info.blocks;
  const bool of_columns = info.role == Role::kOutput;
  if (!of_columns && info.role != Role::kQuery && info.role != Role::kKey) return blocks;
  blocks.of_rows = !of_columns;
  for (Index head = 0; head < (of_columns ? info.cols : info.rows); head += kHeadDim)
    blocks.ranges.push_back({{head, head + kHeadDim}});
  return blocks;
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
  plan.options = {.kind = kind,
                  .blocks = BlockStructure::kPerHead,
                  .head_dim = kHeadDim,
                  .weight_decay = 0,
                  .clip_norm = 0};
  plan.gradient = noisy_gradient;
  plan.shares = 12;
  plan.steps = 5;
  return plan;
}

class BlocksOn : public testing::TestWithParam<MeshShape> {
 protected:
  /// Compares a run of blocked parameters with one, on one process, of every block as a parameter.
  static void expect_matrices_of_their_own(OptimizerKind kind) {
    const RunPlan blocked = plan_for(GetParam(), kind);
    const auto found = run<double>(blocked);
    for (const TestParameter& whole : blocked.parameters) {
      ParameterBlocks blocks = blocks_of(whole.info);
      if (blocks.empty()) blocks.ranges = {{{0, whole.info.rows}}};
      for (const std::vector<Range>& block : blocks.ranges) {
        const std::vector<Index> lines = lines_of(block);
        const auto count = static_cast<Index>(lines.size());
        RunPlan single = blocked;
        single.mesh = {};
        single.options.blocks = BlockStructure::kWhole;
        single.parameters = {parameter("block", Role::kUp, blocks.of_rows ? count : whole.info.rows,
                                       blocks.of_rows ? whole.info.cols : count, TensorCut::kNone)};
        const auto line = [&](Index i) { return lines[static_cast<std::size_t>(i)]; };
        single.gradient = [&](const ParameterInfo&, Index step, int share, Index row, Index col) {
          return noisy_gradient(whole.info, step, share, blocks.of_rows ? line(row) : row,
                                blocks.of_rows ? col : line(col));
        };
        const auto expected = run<double>(single);
        const ParameterInfo& info = single.parameters[0].info;
        const Dense before = initial_weight(whole.info), block_before = initial_weight(info);
        for (std::size_t step = 0; step < expected.size(); ++step) {
          const Dense moved = found[step].weights.at(whole.info.name) - before;
          const Dense block_moved = expected[step].weights.at("block") - block_before;
          for (Index i = 0; i < info.rows; ++i) {
            for (Index j = 0; j < info.cols; ++j)
              ASSERT_NEAR(moved(blocks.of_rows ? line(i) : i, blocks.of_rows ? j : line(j)),
                          block_moved(i, j), 1e-12)
                  << whole.info.name << " at " << step;
          }
        }
      }
    }
  }
};

TEST_P(BlocksOn, AreMatricesOfTheirOwnToMuon) { expect_matrices_of_their_own(OptimizerKind::kMuon); }
TEST_P(BlocksOn, AreMatricesOfTheirOwnToSpecGd) { expect_matrices_of_their_own(OptimizerKind::kSpecGd); }

INSTANTIATE_TEST_SUITE_P(Meshes, BlocksOn,
                         testing::Values(MeshShape{1, 1, 1}, MeshShape{1, 1, 2}, MeshShape{1, 2, 1},
                                         MeshShape{2, 1, 1}, MeshShape{2, 2, 2}, MeshShape{1, 3, 1},
                                         MeshShape{3, 1, 1}, MeshShape{1, 1, 3}, MeshShape{1, 2, 2}));

// Three heads on three processes: signed where they are. What several share travels as any matrix does.
TEST(Blocks, AreNotSentWhereOneProcessHoldsThem) {
  RunPlan plan = plan_for({1, 1, 3}, OptimizerKind::kMuon);
  plan.steps = 1;
  const Snapshot snapshot = run<float>(plan)[0];
  EXPECT_EQ(snapshot.update_bytes_of.count("q"), 0u);
  EXPECT_EQ(snapshot.update_bytes_of.count("o"), 0u);
  EXPECT_EQ(snapshot.update_bytes_of.at("k"), 2 * 4 * 8 * 16);
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
  EXPECT_EQ(found[1].weights.at("q").a, expected[1].weights.at("q").a);
  EXPECT_NE(found[1].weights.at("k").a, expected[1].weights.at("k").a);
}

TEST(Blocks, AreRefusedWhereTheyAreNone) {
  const auto error_of = [](OptimizerKind kind, ParameterBlocks blocks) -> std::string {
    RunPlan plan = plan_for({}, kind);
    plan.options.blocks = BlockStructure::kWhole;
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
  EXPECT_THAT(
      error_of(OptimizerKind::kNorMuon, {.ranges = {{{0, 5}}, {{5, 10}}}}),
      HasSubstr(
          "blocks of fused: found 2, expected none but of layer matrices under Muon, MuonBP and SpecGD"));
}

TEST(Blocks, HeadsDivideAParameter) {
  RunPlan plan = plan_for({}, OptimizerKind::kMuon);
  plan.options.head_dim = 7;
  try {
    run<float>(plan);
    FAIL();
  } catch (const InvalidArgument& error) {
    EXPECT_THAT(error.what(),
                testing::HasSubstr("optimizer.blocks: found per_head with 24 rows of q, expected a "
                                   "multiple of head_dim = 7"));
  }
}

}  // namespace
}  // namespace lowband
