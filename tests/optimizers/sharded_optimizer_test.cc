// Clipping, options and parameters of the whole optimizer.

#include "collectives/local/local_world.h"
#include "world_run.h"

#include <cmath>
#include <cstring>

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
  return plan;
}

/// Norm of the mean gradient, all parameters.
double true_norm(const RunPlan& plan, Index step) {
  double squares = 0;
  for (const TestParameter& parameter : plan.parameters)
    squares += std::pow(norm(gradient_of(plan.gradient, parameter.info, step, 0, plan.shares)), 2);
  return std::sqrt(squares);
}

std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "nothing thrown";
}

const MeshShape kMeshes[] = {{1, 1, 1}, {1, 1, 2}, {1, 2, 1}, {2, 1, 1}, {2, 2, 2}, {1, 3, 1}, {3, 1, 1}};

class ClippingOn : public testing::TestWithParam<MeshShape> {};

TEST_P(ClippingOn, TrueNormIsTheNormOfTheMeanGradient) {
  for (const OptimizerKind kind : {OptimizerKind::kDion, OptimizerKind::kAdamW}) {
    RunPlan plan = plan_for(GetParam(), kind);
    if (kind == OptimizerKind::kDion && plan.mesh.replica > 1) continue;  // refused, below
    plan.options.clip_estimator = NormEstimator::kTrueNorm;
    plan.options.clip_norm = 3;
    plan.steps = 2;
    const auto snapshots = run<double>(plan);
    for (Index step = 0; step < plan.steps; ++step) {
      const StepReport& report = snapshots[static_cast<std::size_t>(step)].report;
      EXPECT_NEAR(report.gradient_norm, true_norm(plan, step), 1e-12 * report.gradient_norm);
      EXPECT_NEAR(report.clip_scale, 3 / true_norm(plan, step), 1e-12);
    }
  }
}

TEST_P(ClippingOn, SketchIsWithinItsErrorOverManySeeds) {
  RunPlan plan = plan_for(GetParam(), OptimizerKind::kDion);
  plan.steps = 30;  // each with a hash of its own
  plan.learning_rate = 0;
  plan.scalar_learning_rate = 0;
  const double sigma = 0.5 * std::sqrt(2.0 / 4096);  // of the norm
  double sum = 0;
  const auto snapshots = run<float>(plan);
  for (Index step = 0; step < plan.steps; ++step) {
    const double error =
        snapshots[static_cast<std::size_t>(step)].report.gradient_norm / true_norm(plan, step) - 1;
    EXPECT_LE(std::abs(error), 5 * sigma);
    sum += error;
  }
  EXPECT_LE(std::abs(sum / 30), 5 * sigma / std::sqrt(30.0));
}

TEST_P(ClippingOn, ScalesTheGradientOfEveryParameter) {
  RunPlan plan = plan_for(GetParam(), OptimizerKind::kDion);
  plan.options.clip_norm = 2;
  plan.steps = 3;
  const auto clipped = run<double>(plan);
  plan.options.clip_norm = 0;
  plan.gradient = [&](const ParameterInfo& info, Index step, int share, Index row, Index col) {
    return clipped[static_cast<std::size_t>(step)].report.clip_scale *
           noisy_gradient(info, step, share, row, col);
  };
  const auto scaled = run<double>(plan);
  for (std::size_t step = 0; step < clipped.size(); ++step) {
    EXPECT_LT(clipped[step].report.clip_scale, 0.5);
    EXPECT_EQ(scaled[step].report.clip_scale, 1);
    for (const auto& [name, weight] : clipped[step].weights)
      EXPECT_LE(largest(scaled[step].weights.at(name) - weight), 1e-11) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(Meshes, ClippingOn, testing::ValuesIn(kMeshes));

TEST(Clipping, LeavesSmallGradientsAlone) {
  RunPlan plan = plan_for({2, 1, 1}, OptimizerKind::kDion);
  plan.options.clip_norm = 1e6;
  EXPECT_EQ(run<float>(plan)[0].report.clip_scale, 1);
}

TEST(Clipping, RefusesATrueNormThatNobodyHolds) {
  RunPlan plan = plan_for({2, 1, 1}, OptimizerKind::kDion);
  plan.options.clip_estimator = NormEstimator::kTrueNorm;
  EXPECT_NE(message_of([&] { run<float>(plan); }).find("optimizer.clip_estimator: found true_norm"),
            std::string::npos);
}

TEST(Options, AreCheckedFieldByField) {
  const auto message = [](auto change) {
    OptimizerOptions options;
    change(options);
    return message_of([&] { validate(options); });
  };
  EXPECT_EQ(message([](OptimizerOptions&) {}), "nothing thrown");
  EXPECT_EQ(message([](OptimizerOptions& o) { o.mu = 1; }), "optimizer.mu: found 1, expected 0 <= mu < 1");
  EXPECT_EQ(message([](OptimizerOptions& o) { o.mu = -0.1; }),
            "optimizer.mu: found -0.1, expected 0 <= mu < 1");
  EXPECT_EQ(message([](OptimizerOptions& o) { o.lambda = 1; }),
            "optimizer.lambda: found 1, expected 0 <= lambda < 1");
  EXPECT_EQ(message([](OptimizerOptions& o) { o.bucket_elements = 0; }),
            "optimizer.bucket_elements: found 0, expected at least 1");
  EXPECT_EQ(message([](OptimizerOptions& o) { o.adamw_beta1 = std::nan(""); }),
            "optimizer.adamw_beta1: found nan, expected 0 <= adamw_beta1 < 1");
  EXPECT_EQ(message([](OptimizerOptions& o) { o.adamw_beta2 = 1.5; }),
            "optimizer.adamw_beta2: found 1.5, expected 0 <= adamw_beta2 < 1");
  EXPECT_EQ(message([](OptimizerOptions& o) { o.sgd_momentum = 1; }),
            "optimizer.sgd_momentum: found 1, expected 0 <= sgd_momentum < 1");
  EXPECT_EQ(message([](OptimizerOptions& o) {
              o.sgd_momentum = 0;
              o.sgd_nesterov = true;
            }),
            "optimizer.sgd_nesterov: found true with sgd_momentum 0, expected a positive momentum");
  EXPECT_EQ(message([](OptimizerOptions& o) { o.lion_beta1 = -1; }),
            "optimizer.lion_beta1: found -1, expected 0 <= lion_beta1 < 1");
  EXPECT_EQ(message([](OptimizerOptions& o) { o.lion_beta2 = 1; }),
            "optimizer.lion_beta2: found 1, expected 0 <= lion_beta2 < 1");
  EXPECT_EQ(message([](OptimizerOptions& o) { o.adamw_epsilon = 0; }),
            "optimizer.adamw_epsilon: found 0, expected a positive number");
  EXPECT_EQ(message([](OptimizerOptions& o) { o.weight_decay = -1; }),
            "optimizer.weight_decay: found -1, expected a number >= 0");
  EXPECT_EQ(message([](OptimizerOptions& o) { o.clip_norm = -1; }),
            "optimizer.clip_norm: found -1, expected a number >= 0 (0 = no clipping)");
}

TEST(Parameters, OfAnotherShapeAreRefused) {
  const auto message = message_of([] {
    run_world(1, [](Communicator& world) {
      ProcessMesh mesh(world, {});
      Buffer<float> storage(200);
      const ParameterInfo info{
          .name = "w", .role = Role::kQuery, .rows = 10, .cols = 9, .cut = TensorCut::kRows};
      Parameter<float> parameter{info, storage.matrix(0, 10, 10), storage.matrix(100, 10, 10)};
      ShardedOptimizer<float>(mesh, std::span(&parameter, 1), {}, {.kind = OptimizerKind::kAdamW});
    });
  });
  EXPECT_NE(message.find("piece of w: found (10, 10), row stride 10, expected a contiguous (10, 9)"),
            std::string::npos)
      << message;
}

TEST(Parameters, MayBeNone) {
  run_world(2, [](Communicator& world) {
    ProcessMesh mesh(world, {.replica = 2});
    ShardedOptimizer<float> optimizer(mesh, {}, {}, {});
    const StepReport report = optimizer.step({});
    EXPECT_EQ(report.gradient_norm, 0);
    EXPECT_EQ(optimizer.planned().of(0), StepBytes{});
    EXPECT_TRUE(optimizer.state().empty());
  });
}

}  // namespace
}  // namespace lowband
