// Elementwise optimizers against references in double, on every mesh.

#include "world_run.h"

#include <cmath>

#include <gtest/gtest.h>

namespace lowband {
namespace {

using namespace test;

RunPlan plan_for(const MeshShape& mesh, OptimizerKind kind) {
  RunPlan plan;
  plan.mesh = mesh;
  plan.parameters = assorted_parameters();
  plan.options = {.kind = kind, .weight_decay = 0.1, .clip_norm = 0};
  plan.gradient = noisy_gradient;
  plan.shares = 12;
  plan.steps = 20;
  return plan;
}

class ElementwiseOn : public testing::TestWithParam<MeshShape> {
 protected:
  /// Weights of every step against those of `make(weight, weight decay)`.
  template <class Make>
  static void expect_reference(const RunPlan& plan, Make make, double float_tolerance) {
    const auto exact = run<double>(plan);
    const auto rounded = run<float>(plan);
    for (const TestParameter& parameter : plan.parameters) {
      auto reference = make(initial_weight(parameter.info));
      reference.weight_decay = parameter.info.role == Role::kNorm ? 0 : plan.options.weight_decay;
      for (Index step = 0; step < plan.steps; ++step) {
        const auto s = static_cast<std::size_t>(step);
        reference.step(gradient_of(plan.gradient, parameter.info, step, 0, plan.shares),
                       is_layer_matrix(parameter.info.role) ? plan.learning_rate : plan.scalar_learning_rate);
        ASSERT_LE(largest(exact[s].weights.at(parameter.info.name) - reference.W), 1e-12)
            << parameter.info.name << " at " << step;
        ASSERT_LE(largest(rounded[s].weights.at(parameter.info.name) - reference.W), float_tolerance)
            << parameter.info.name << " at " << step;
      }
    }
  }
};

// 0.02 per step, each accurate to some ulps of a ratio of moments.
TEST_P(ElementwiseOn, AdamWEqualsTheReference) {
  expect_reference(
      plan_for(GetParam(), OptimizerKind::kAdamW),
      [](Dense weight) { return ReferenceAdamW(std::move(weight)); }, 4e-6);
}

// Steps of 0.02 x at most 10 x |g|, |g| < 6, are rounded to 2^-24 of their size, twenty times.
TEST_P(ElementwiseOn, SgdEqualsTheReference) {
  for (const bool nesterov : {false, true}) {
    RunPlan plan = plan_for(GetParam(), OptimizerKind::kSgd);
    plan.options.sgd_momentum = 0.8;
    plan.options.sgd_nesterov = nesterov;
    plan.scalar_learning_rate = 0.01;
    expect_reference(
        plan,
        [&](Dense weight) {
          ReferenceSgd reference(std::move(weight));
          reference.mu = 0.8;
          reference.nesterov = nesterov;
          return reference;
        },
        3e-6);
  }
}

// Every step is exact but for the rounding of a weight below 1.
TEST_P(ElementwiseOn, LionEqualsTheReference) {
  RunPlan plan = plan_for(GetParam(), OptimizerKind::kLion);
  plan.options.lion_beta1 = 0.85;
  plan.options.lion_beta2 = 0.95;
  plan.scalar_learning_rate = 0.01;
  expect_reference(
      plan,
      [](Dense weight) {
        ReferenceLion reference(std::move(weight));
        reference.beta1 = 0.85;
        reference.beta2 = 0.95;
        return reference;
      },
      3e-6);
}

const MeshShape kMeshes[] = {{1, 1, 1}, {1, 1, 2}, {1, 2, 1}, {2, 1, 1}, {2, 2, 2}, {1, 3, 1}, {3, 1, 1}};
INSTANTIATE_TEST_SUITE_P(Meshes, ElementwiseOn, testing::ValuesIn(kMeshes));

TEST(AdamW, FirstStepMovesEveryEntryByTheLearningRate) {
  RunPlan plan = plan_for({1, 1, 1}, OptimizerKind::kAdamW);
  plan.options.weight_decay = 0;
  plan.options.adamw_epsilon = 1e-30;
  plan.scalar_learning_rate = 0.005;
  const auto snapshots = run<double>(plan);
  for (const TestParameter& parameter : plan.parameters) {
    const Dense moved = snapshots[0].weights.at(parameter.info.name) - initial_weight(parameter.info);
    const double rate = is_layer_matrix(parameter.info.role) ? plan.learning_rate : plan.scalar_learning_rate;
    for (const double step : moved.a) EXPECT_NEAR(std::abs(step), rate, 1e-14);
  }
}

TEST(Lion, StepsByTheRateWhateverTheGradientsSize) {
  RunPlan plan = plan_for({1, 1, 1}, OptimizerKind::kLion);
  plan.options.weight_decay = 0;
  plan.steps = 3;
  const auto expected = run<double>(plan);
  plan.gradient = [](const ParameterInfo& info, Index step, int share, Index row, Index col) {
    return 1024 * noisy_gradient(info, step, share, row, col);
  };
  const auto found = run<double>(plan);
  for (const TestParameter& parameter : plan.parameters) {
    const std::string& name = parameter.info.name;
    EXPECT_EQ(largest(found[2].weights.at(name) - expected[2].weights.at(name)), 0) << name;
    for (const double step : (expected[0].weights.at(name) - initial_weight(parameter.info)).a)
      EXPECT_NEAR(std::abs(step), plan.learning_rate, 1e-14);
  }
}

// Beside matrices, the head moves by rate / sqrt(fan-in); everything else that is not a matrix by the rate.
TEST(Lion, BesideMatricesSparesTheHead) {
  RunPlan plan = plan_for({1, 1, 1}, OptimizerKind::kDion);
  plan.parameters.push_back(
      {{.name = "head", .role = Role::kHead, .rows = 29, .cols = 16, .cut = TensorCut::kRows}, 0});
  plan.options.scalar_optimizer = ElementwiseKind::kLion;
  plan.options.weight_decay = 0;
  plan.scalar_learning_rate = 0.005;
  plan.steps = 1;
  const auto snapshots = run<double>(plan);
  for (const TestParameter& parameter : plan.parameters) {
    const ParameterInfo& info = parameter.info;
    if (is_layer_matrix(info.role)) continue;
    for (const double step : (snapshots[0].weights.at(info.name) - initial_weight(info)).a)
      EXPECT_NEAR(std::abs(step), info.role == Role::kHead ? 0.005 / 4 : 0.005, 1e-14);
  }
}

}  // namespace
}  // namespace lowband
