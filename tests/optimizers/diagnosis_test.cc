// What diagnosed steps report, against the definitions, and what they cost.

#include "world_run.h"

#include <cmath>
#include <cstring>
#include <limits>

#include <gtest/gtest.h>

namespace lowband {
namespace {

using namespace test;

RunPlan plan_for(const MeshShape& mesh, OptimizerKind kind) {
  RunPlan plan;
  plan.mesh = mesh;
  plan.parameters = assorted_parameters();
  plan.options = {.kind = kind, .clip_norm = 0, .seed = 3};
  plan.gradient = noisy_gradient;
  plan.shares = 12;
  plan.steps = 6;
  plan.diagnose = true;
  return plan;
}

bool same_bits(const Dense& x, const Dense& y) {
  return std::memcmp(x.a.data(), y.a.data(), x.a.size() * sizeof(double)) == 0;
}

class DiagnosisOn : public testing::TestWithParam<MeshShape> {};

TEST_P(DiagnosisOn, FollowsTheDefinitions) {
  for (const OptimizerKind kind : {OptimizerKind::kDion, OptimizerKind::kPowerSgd}) {
    for (const Residual residual : {Residual::kLocal, Residual::kAggregated}) {
      RunPlan plan = plan_for(GetParam(), kind);
      plan.options.residual = residual;
      plan.gradient = [](const ParameterInfo& info, Index step, int share, Index row, Index col) {
        if (step == 3 && share == 0 && info.name == "q") return std::numeric_limits<double>::quiet_NaN();
        if (step == 1 && info.name == "gate" && row >= 2) return 0.0;
        return noisy_gradient(info, step, share, row, col);
      };
      const auto snapshots = run<double>(plan);
      const std::string letter = kind == OptimizerKind::kDion ? ".M" : ".e";
      const double removed = kind == OptimizerKind::kDion ? 1 - plan.options.mu : 1;
      for (std::size_t step = 1; step < snapshots.size(); ++step) {
        std::size_t k = 0;
        Index dead_columns = 0;
        for (const TestParameter& parameter : plan.parameters) {
          if (parameter.factor_rank == 0) continue;
          const std::string name = parameter.info.name;
          const MatrixDiagnostics& found = snapshots[step].report.diagnostics[k++];
          EXPECT_EQ(found.name, name);
          EXPECT_EQ(found.factor_rank, parameter.factor_rank);
          const bool skipped = step == 3 && name == "q";
          Dense B = snapshots[step - 1].mean(name + letter);
          if (!skipped)
            B = B + gradient_of(plan.gradient, parameter.info, static_cast<Index>(step), 0, plan.shares);
          const Dense E = snapshots[step].mean(name + letter);
          double squares = 0;
          for (const auto& replica : snapshots[step].states)
            squares += std::pow(norm(replica.at(name + letter) - E), 2);
          squares /= static_cast<double>(plan.mesh.replica);
          EXPECT_NEAR(found.drift, std::sqrt(squares) / norm(B), 1e-10) << name;
          EXPECT_LE(found.mass_leak, 1e-13) << name;  // in double nothing leaks
          // |P R^T| = |R|
          EXPECT_NEAR(found.captured_energy, std::pow(norm(B - E) / removed / norm(B), 2), 1e-9) << name;
          dead_columns += found.dead_columns;
        }
        EXPECT_EQ(k, snapshots[step].report.diagnostics.size());
        EXPECT_EQ(dead_columns, snapshots[step].report.dead_columns);
      }
    }
  }
}

TEST_P(DiagnosisOn, CountsThePlannedBytesAndLeavesEveryBitAlone) {
  for (const OptimizerKind kind : {OptimizerKind::kDion, OptimizerKind::kPowerSgd, OptimizerKind::kAdamW}) {
    for (const bool overlap : {false, true}) {
      RunPlan plan = plan_for(GetParam(), kind);
      plan.options.exchange = ExchangeChoice::kAuto;
      plan.options.clip_norm = 3;
      plan.options.overlap = overlap;
      plan.options.bucket_elements = 600;
      const auto diagnosed = run<float>(plan);
      plan.diagnose = false;
      const auto plain = run<float>(plan);
      Index elements = 0;
      for (const TestParameter& parameter : plan.parameters)
        elements +=
            parameter.factor_rank > 0 && kind != OptimizerKind::kAdamW ? parameter.info.elements() : 0;
      for (std::size_t step = 0; step < plain.size(); ++step) {
        EXPECT_EQ(diagnosed[step].planned_periodic_bytes, 2 * 4 * elements);
        EXPECT_EQ(diagnosed[step].periodic_bytes, 2 * 4 * elements);
        EXPECT_EQ(plain[step].periodic_bytes, 0);
        EXPECT_TRUE(plain[step].report.diagnostics.empty());
        EXPECT_EQ(diagnosed[step].factor_bytes, plain[step].factor_bytes);
        EXPECT_EQ(diagnosed[step].dense_bytes, plain[step].dense_bytes);
        for (const auto& [name, weight] : plain[step].weights)
          EXPECT_TRUE(same_bits(diagnosed[step].weights.at(name), weight)) << name;
        for (std::size_t replica = 0; replica < plain[step].states.size(); ++replica) {
          for (const auto& [name, state] : plain[step].states[replica])
            EXPECT_TRUE(same_bits(diagnosed[step].states[replica].at(name), state)) << name;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Meshes, DiagnosisOn,
                         testing::Values(MeshShape{1, 1, 1}, MeshShape{2, 1, 1}, MeshShape{3, 1, 1},
                                         MeshShape{2, 2, 1}, MeshShape{2, 1, 2}, MeshShape{2, 2, 2}));

TEST(Diagnosis, OfNothingIsZero) {
  RunPlan plan = plan_for({2, 1, 1}, OptimizerKind::kPowerSgd);
  plan.steps = 1;
  plan.gradient = [](const ParameterInfo&, Index, int, Index, Index) { return 0.0; };
  for (const MatrixDiagnostics& found : run<float>(plan)[0].report.diagnostics) {
    EXPECT_EQ(found.drift, 0);
    EXPECT_EQ(found.mass_leak, 0);
    EXPECT_EQ(found.captured_energy, 0);
    EXPECT_EQ(found.dead_columns, found.factor_rank);
  }
}

}  // namespace
}  // namespace lowband
