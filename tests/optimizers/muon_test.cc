// Muon against a reference in double, on every mesh, and what its update must look like.

#include "runtime/linalg.h"
#include "world_run.h"

#include <cmath>

#include <gtest/gtest.h>

namespace lowband {
namespace {

using namespace test;

/// With two matrices long enough to be signed by their Gram matrices, wherever one axis cuts their long side.
RunPlan plan_for(const MeshShape& mesh) {
  RunPlan plan;
  plan.mesh = mesh;
  plan.parameters = assorted_parameters();
  plan.parameters.push_back(
      {{.name = "wide", .role = Role::kUp, .rows = 3, .cols = 201, .cut = TensorCut::kRows}, 1});
  plan.parameters.push_back(
      {{.name = "tall", .role = Role::kUp, .rows = 201, .cols = 3, .cut = TensorCut::kRows}, 1});
  plan.options = {.kind = OptimizerKind::kMuon, .weight_decay = 0.1, .clip_norm = 0};
  plan.gradient = noisy_gradient;
  plan.shares = 12;
  plan.steps = 20;
  return plan;
}

void expect_reference(const RunPlan& plan) {
  const auto exact = run<double>(plan);
  const auto rounded = run<float>(plan);
  for (const TestParameter& parameter : plan.parameters) {
    const std::string& name = parameter.info.name;
    if (!is_layer_matrix(parameter.info.role)) continue;
    ReferenceMuon reference(initial_weight(parameter.info));
    reference.mu = plan.options.mu;
    reference.nesterov = plan.options.nesterov;
    reference.weight_decay = plan.options.weight_decay;
    reference.normalises_rows = plan.options.kind == OptimizerKind::kNorMuon;
    reference.beta2 = plan.options.normuon_beta2;
    reference.polynomial = plan.options.sign;
    reference.scale = plan.options.update_scale;
    for (Index step = 0; step < plan.steps; ++step) {
      const auto s = static_cast<std::size_t>(step);
      reference.step(gradient_of(plan.gradient, parameter.info, step, 0, plan.shares), plan.learning_rate);
      ASSERT_LE(largest(exact[s].weights.at(name) - reference.W), 1e-11) << name << " at " << step;
      ASSERT_LE(largest(exact[s].states[0].at(name + ".M") - reference.M), 1e-13) << name << " at " << step;
      // Polynomials start with a slope of up to 1,000 at 0, which multiplies what products of float round in
      // small singular values: 1e-7 x 1,000 x rate x scale (at most 8) in a step, typically far less.
      ASSERT_LE(largest(rounded[s].weights.at(name) - reference.W), 2e-5) << name << " at " << step;
    }
  }
}

class MuonOn : public testing::TestWithParam<MeshShape> {};

TEST_P(MuonOn, EqualsTheReference) { expect_reference(plan_for(GetParam())); }

TEST_P(MuonOn, EqualsTheReferenceWithEveryOption) {
  RunPlan plan = plan_for(GetParam());
  plan.steps = 4;
  plan.options.mu = 0.9;
  plan.options.nesterov = true;
  for (const auto& [sign, scale] : {std::pair{SignPolynomial::kNewtonSchulz5, UpdateScale::kAdamRms},
                                    std::pair{SignPolynomial::kPolarExpress8, UpdateScale::kShape},
                                    std::pair{SignPolynomial::kPolarExpress5, UpdateScale::kNone}}) {
    plan.options.sign = sign;
    plan.options.update_scale = scale;
    expect_reference(plan);
  }
}

TEST_P(MuonOn, EqualsTheReferenceWithNormalisedRows) {
  RunPlan plan = plan_for(GetParam());
  plan.options.kind = OptimizerKind::kNorMuon;
  plan.options.normuon_beta2 = 0.9;
  expect_reference(plan);
}

// Everything that is sent, from global shapes alone.
TEST_P(MuonOn, SendsWhatTheFormulaSays) {
  for (const OptimizerKind kind : {OptimizerKind::kMuon, OptimizerKind::kNorMuon}) {
    RunPlan plan = plan_for(GetParam());
    plan.options.kind = kind;
    plan.steps = 1;
    const MeshShape& mesh = plan.mesh;
    const Index processes = Index{mesh.shard} * mesh.tensor;
    const Snapshot snapshot = run<float>(plan)[0];
    Index dense = 0, update = 0;
    for (const TestParameter& parameter : plan.parameters) {
      const ParameterInfo& info = parameter.info;
      dense += 4 * info.elements() * (info.cut == TensorCut::kNone ? mesh.tensor : 1);
      if (!is_layer_matrix(info.role) || processes == 1) continue;
      // Five Gram matrices (3, 3) and a norm in double, where the only axis cuts the side of 201.
      const bool gram = (info.name == "wide" && mesh.tensor == 1) || (info.name == "tall" && mesh.shard == 1);
      const Index rows = kind == OptimizerKind::kNorMuon ? 8 * (info.rows + 2) : 0;
      const Index expected = rows + (gram ? 5 * 3 * 3 * 4 + 8 : 2 * 4 * info.elements());
      EXPECT_EQ(snapshot.update_bytes_of.at(info.name), expected) << info.name;
      update += expected;
    }
    EXPECT_EQ(snapshot.dense_bytes, dense);
    EXPECT_EQ(snapshot.planned_dense_bytes, dense);
    EXPECT_EQ(snapshot.update_bytes, update);
    EXPECT_EQ(snapshot.planned_update_bytes, update);
    EXPECT_EQ(snapshot.factor_bytes, 0);
  }
}

// At the first step every row has the same norm.
TEST(NorMuon, FirstStepHasEqualRows) {
  RunPlan plan = plan_for({1, 2, 1});
  plan.steps = 1;
  plan.options.kind = OptimizerKind::kNorMuon;
  plan.options.weight_decay = 0;
  const auto snapshots = run<double>(plan);
  for (const TestParameter& parameter : plan.parameters) {
    const ParameterInfo& info = parameter.info;
    if (!is_layer_matrix(info.role)) continue;
    const Dense step = snapshots[0].weights.at(info.name) - initial_weight(info);
    for (Index i = 0; i < info.rows; ++i) {
      double squares = 0;
      for (Index j = 0; j < info.cols; ++j) squares += step(i, j) * step(i, j);
      EXPECT_NEAR(std::sqrt(squares), norm(step) / std::sqrt(static_cast<double>(info.rows)), 1e-6)
          << info.name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Meshes, MuonOn,
                         testing::Values(MeshShape{1, 1, 1}, MeshShape{1, 1, 2}, MeshShape{1, 2, 1},
                                         MeshShape{2, 1, 1}, MeshShape{2, 2, 2}, MeshShape{1, 3, 1},
                                         MeshShape{3, 1, 1}, MeshShape{1, 1, 3}, MeshShape{1, 2, 2}));

// With an iteration that has converged, every step is orthonormal times rate x c.
TEST(Muon, StepsAreOrthonormal) {
  RunPlan plan = plan_for({1, 2, 1});
  plan.steps = 2;
  plan.options.weight_decay = 0;
  plan.options.sign = SignPolynomial::kPolarExpress8;
  plan.options.update_scale = UpdateScale::kNone;
  const auto snapshots = run<double>(plan);
  for (const TestParameter& parameter : plan.parameters) {
    if (!is_layer_matrix(parameter.info.role)) continue;
    Dense step = snapshots[1].weights.at(parameter.info.name) - snapshots[0].weights.at(parameter.info.name);
    for (const double value : singular_values(MatrixView<const double>(step.a.data(), step.rows, step.cols)))
      EXPECT_NEAR(value, plan.learning_rate, 1e-3 * plan.learning_rate) << parameter.info.name;
  }
}

}  // namespace
}  // namespace lowband
