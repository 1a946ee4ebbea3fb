// SpecGD against a reference in double, and the descent that its majorisation promises.

#include "runtime/linalg.h"
#include "runtime/random.h"
#include "world_run.h"

#include <cmath>

#include <gtest/gtest.h>

namespace lowband {
namespace {

using namespace test;

double inner_product(const Dense& x, const Dense& y) {
  double sum = 0;
  for (std::size_t k = 0; k < x.a.size(); ++k) sum += x.a[k] * y.a[k];
  return sum;
}

RunPlan plan_for(const MeshShape& mesh) {
  RunPlan plan;
  plan.mesh = mesh;
  plan.parameters = assorted_parameters();
  plan.parameters.push_back(
      {{.name = "wide", .role = Role::kUp, .rows = 3, .cols = 201, .cut = TensorCut::kRows}, 1});
  plan.options = {.kind = OptimizerKind::kSpecGd, .weight_decay = 0.1, .clip_norm = 0};
  plan.gradient = noisy_gradient;
  plan.shares = 12;
  plan.steps = 20;
  plan.learning_rate = 0.001;
  return plan;
}

class SpecGdOn : public testing::TestWithParam<MeshShape> {};

TEST_P(SpecGdOn, EqualsTheReference) {
  const RunPlan plan = plan_for(GetParam());
  const auto exact = run<double>(plan);
  const auto rounded = run<float>(plan);
  for (const TestParameter& parameter : plan.parameters) {
    const ParameterInfo& info = parameter.info;
    if (!is_layer_matrix(info.role)) continue;
    Dense W = initial_weight(info);
    for (Index step = 0; step < plan.steps; ++step) {
      const Dense G = gradient_of(plan.gradient, info, step, 0, plan.shares);
      const Dense U = reference_sign(G, plan.options.sign);
      W = (1 - plan.learning_rate * plan.options.weight_decay) * W -
          plan.learning_rate * inner_product(G, U) * U;
      const auto s = static_cast<std::size_t>(step);
      ASSERT_LE(largest(exact[s].weights.at(info.name) - W), 1e-11) << info.name << " at " << step;
      // Per step, what Muon's signs are off by (2e-5 / 0.02 / 20) times rate and nuclear norm, at most 80
      // here.
      ASSERT_LE(largest(rounded[s].weights.at(info.name) - W), 2e-5) << info.name << " at " << step;
    }
    EXPECT_FALSE(exact[0].states[0].contains(info.name + ".M"));
  }
}

TEST_P(SpecGdOn, SendsWhatTheFormulaSays) {
  RunPlan plan = plan_for(GetParam());
  plan.steps = 1;
  const MeshShape& mesh = plan.mesh;
  const Snapshot snapshot = run<float>(plan)[0];
  Index update = 0;
  for (const TestParameter& parameter : plan.parameters) {
    const ParameterInfo& info = parameter.info;
    if (!is_layer_matrix(info.role) || mesh.shard * mesh.tensor == 1) continue;
    const bool gram = info.name == "wide" && mesh.tensor == 1;
    const Index expected = 8 + (gram ? 5 * 3 * 3 * 4 + 8 : 2 * 4 * info.elements());
    EXPECT_EQ(snapshot.update_bytes_of.at(info.name), expected) << info.name;
    update += expected;
  }
  EXPECT_EQ(snapshot.update_bytes, update);
  EXPECT_EQ(snapshot.planned_update_bytes, update);
}

INSTANTIATE_TEST_SUITE_P(Meshes, SpecGdOn,
                         testing::Values(MeshShape{1, 1, 1}, MeshShape{1, 1, 2}, MeshShape{1, 2, 1},
                                         MeshShape{2, 1, 1}, MeshShape{2, 2, 2}, MeshShape{1, 3, 1},
                                         MeshShape{3, 1, 1}, MeshShape{1, 1, 3}, MeshShape{1, 2, 2}));

// L(W) = |W X - Y|^2 / (2 n), G = (W X - Y) X^T / n. With rate 1 / L_op, L_op = |X|^2 / n, a step lowers the
// loss by at least |G|_*^2 / (2 L_op): eq. 1.4.
TEST(SpecGd, DescendsAsItsMajorisationPromises) {
  const Index rows = 12, features = 9, tokens = 40;
  Dense X(features, tokens), Y(rows, tokens);
  const RandomStream stream(3, "features");
  for (std::size_t k = 0; k < X.a.size(); ++k) X.a[k] = stream.normal(static_cast<Index>(k));
  for (std::size_t k = 0; k < Y.a.size(); ++k) Y.a[k] = stream.normal(static_cast<Index>(1000 + k));
  const double n = static_cast<double>(tokens);
  const double curvature = norm(X) * norm(X) / n;

  RunPlan plan;
  plan.parameters = {{{.name = "W", .role = Role::kUp, .rows = rows, .cols = features}, 1}};
  plan.options = {.kind = OptimizerKind::kSpecGd,
                  .sign = SignPolynomial::kPolarExpress8,
                  .weight_decay = 0,
                  .clip_norm = 0};
  plan.learning_rate = 1 / curvature;
  plan.steps = 1;
  const Dense W = initial_weight(plan.parameters[0].info);
  const auto loss = [&](const Dense& weight) {
    const double distance = norm(weight * X - Y);
    return distance * distance / (2 * n);
  };
  const Dense G = (1 / n) * ((W * X - Y) * transpose(X));
  plan.gradient = [&](const ParameterInfo&, Index, int, Index row, Index col) { return G(row, col); };
  double nuclear = 0;
  for (const double value : singular_values(MatrixView<const double>(G.a.data(), G.rows, G.cols)))
    nuclear += value;
  const Dense moved = run<double>(plan)[0].weights.at("W");
  EXPECT_LE(loss(moved), loss(W) - nuclear * nuclear / (2 * curvature) * (1 - 1e-3));
}

}  // namespace
}  // namespace lowband
