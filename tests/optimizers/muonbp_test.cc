// MuonBP against a reference in double that cuts matrices as the mesh does, and where it is Muon.

#include "runtime/linalg.h"
#include "world_run.h"

#include <cmath>
#include <cstring>

#include <gtest/gtest.h>

namespace lowband {
namespace {

using namespace test;

constexpr double kBlockRate = 0.6;

RunPlan plan_for(const MeshShape& mesh) {
  RunPlan plan;
  plan.mesh = mesh;
  plan.parameters = assorted_parameters();
  plan.options = {.kind = OptimizerKind::kMuonBp,
                  .muonbp_period = 3,
                  .muonbp_block_rate = kBlockRate,
                  .weight_decay = 0.1,
                  .clip_norm = 0};
  plan.gradient = noisy_gradient;
  plan.shares = 12;
  plan.steps = 20;
  return plan;
}

/// The update of a step between signs of the whole: every block that `mesh` cuts by itself.
Dense signs_of_blocks(const Dense& m, const ParameterInfo& info, const MeshShape& mesh,
                      const OptimizerOptions& options) {
  Dense update(m.rows, m.cols);
  const MatrixLayout layout(m.rows, m.cols, info.cut, mesh.tensor, mesh.shard);
  for (int shard = 0; shard < mesh.shard; ++shard) {
    for (int tensor = 0; tensor < mesh.tensor; ++tensor) {
      const Range rows = layout.owned_rows(shard, tensor), cols = layout.owned_cols(shard, tensor);
      if (rows.size() * cols.size() == 0) continue;
      Dense block(rows.size(), cols.size());
      for (Index i = 0; i < rows.size(); ++i) {
        for (Index j = 0; j < cols.size(); ++j) block(i, j) = m(rows.begin + i, cols.begin + j);
      }
      const Dense sign = reference_sign(block, options.sign);
      const double c = std::sqrt(static_cast<double>(rows.size()) / static_cast<double>(cols.size()));
      for (Index i = 0; i < rows.size(); ++i) {
        for (Index j = 0; j < cols.size(); ++j) update(rows.begin + i, cols.begin + j) = c * sign(i, j);
      }
    }
  }
  return update;
}

void expect_same_bits(const std::vector<Snapshot>& found, const std::vector<Snapshot>& expected) {
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t step = 0; step < expected.size(); ++step) {
    for (const auto& [name, weight] : expected[step].weights)
      ASSERT_EQ(std::memcmp(found[step].weights.at(name).a.data(), weight.a.data(),
                            weight.a.size() * sizeof(double)),
                0)
          << name << " at " << step;
  }
}

class MuonBpOn : public testing::TestWithParam<MeshShape> {};

TEST_P(MuonBpOn, EqualsTheReference) {
  const RunPlan plan = plan_for(GetParam());
  const auto exact = run<double>(plan);
  const auto rounded = run<float>(plan);
  for (const TestParameter& parameter : plan.parameters) {
    const ParameterInfo& info = parameter.info;
    if (!is_layer_matrix(info.role)) continue;
    Dense W = initial_weight(info), M(info.rows, info.cols);
    const double c = std::sqrt(static_cast<double>(info.rows) / static_cast<double>(info.cols));
    for (Index step = 0; step < plan.steps; ++step) {
      M = plan.options.mu * M + gradient_of(plan.gradient, info, step, 0, plan.shares);
      const Dense update = step % 3 == 0 ? c * reference_sign(M, plan.options.sign)
                                         : kBlockRate * signs_of_blocks(M, info, plan.mesh, plan.options);
      W = (1 - plan.learning_rate * plan.options.weight_decay) * W - plan.learning_rate * update;
      const auto s = static_cast<std::size_t>(step);
      ASSERT_LE(largest(exact[s].weights.at(info.name) - W), 1e-11) << info.name << " at " << step;
      ASSERT_LE(largest(exact[s].states[0].at(info.name + ".M") - M), 1e-13) << info.name << " at " << step;
      // As for Muon.
      ASSERT_LE(largest(rounded[s].weights.at(info.name) - W), 2e-5) << info.name << " at " << step;
    }
  }
}

TEST_P(MuonBpOn, SendsSignsInStepsOfItsPeriodOnly) {
  RunPlan plan = plan_for(GetParam());
  const auto found = run<float>(plan);
  plan.options.kind = OptimizerKind::kMuon;
  plan.steps = 1;
  const Snapshot whole = run<float>(plan)[0];
  for (std::size_t step = 0; step < found.size(); ++step) {
    EXPECT_EQ(found[step].update_bytes, step % 3 == 0 ? whole.update_bytes : 0) << step;
    EXPECT_EQ(found[step].planned_update_bytes, found[step].update_bytes) << step;
    EXPECT_EQ(found[step].dense_bytes, whole.dense_bytes) << step;
    EXPECT_EQ(found[step].planned_dense_bytes, whole.dense_bytes) << step;
  }
}

TEST_P(MuonBpOn, IsMuonWithPeriodOne) {
  RunPlan plan = plan_for(GetParam());
  plan.steps = 5;
  plan.options.muonbp_period = 1;
  const auto found = run<float>(plan);
  plan.options.kind = OptimizerKind::kMuon;
  expect_same_bits(found, run<float>(plan));
}

INSTANTIATE_TEST_SUITE_P(Meshes, MuonBpOn,
                         testing::Values(MeshShape{1, 1, 1}, MeshShape{1, 1, 2}, MeshShape{1, 2, 1},
                                         MeshShape{2, 1, 1}, MeshShape{2, 2, 2}, MeshShape{1, 3, 1},
                                         MeshShape{3, 1, 1}, MeshShape{1, 1, 3}, MeshShape{1, 2, 2}));

TEST(MuonBp, IsMuonOnReplicasOfOneProcessWithOneRate) {
  for (const int replicas : {1, 2}) {
    RunPlan plan = plan_for({.replica = replicas});
    plan.steps = 5;
    plan.options.muonbp_block_rate = 1;
    const auto found = run<float>(plan);
    plan.options.kind = OptimizerKind::kMuon;
    expect_same_bits(found, run<float>(plan));
  }
}

// K blocks of rows: 1 <= |U|_2 <= sqrt K, and |U|_F^2 = sum of min(m_j, n), to the accuracy of the
// polynomial.
TEST(MuonBp, BlocksOfRowsHaveABoundedNorm) {
  RunPlan plan = plan_for({1, 1, 3});
  plan.steps = 2;
  plan.options.weight_decay = 0;
  plan.options.sign = SignPolynomial::kPolarExpress8;
  plan.options.update_scale = UpdateScale::kNone;
  const auto snapshots = run<double>(plan);
  for (const TestParameter& parameter : plan.parameters) {
    const ParameterInfo& info = parameter.info;
    if (!is_layer_matrix(info.role) || info.cut != TensorCut::kRows) continue;
    const Dense step = (1 / (kBlockRate * plan.learning_rate)) *
                       (snapshots[1].weights.at(info.name) - snapshots[0].weights.at(info.name));
    double ranks = 0;
    for (int j = 0; j < 3; ++j)
      ranks += static_cast<double>(std::min(split_range(info.rows, 3, j).size(), info.cols));
    EXPECT_NEAR(norm(step) * norm(step), ranks, 2e-3 * ranks) << info.name;
    const double largest_value =
        singular_values(MatrixView<const double>(step.a.data(), step.rows, step.cols))[0];
    EXPECT_GE(largest_value, 1 - 1e-3) << info.name;
    EXPECT_LE(largest_value, std::sqrt(3.0) + 1e-3) << info.name;
  }
}

}  // namespace
}  // namespace lowband
