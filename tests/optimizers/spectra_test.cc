// Spectra against a reference in double, on every mesh; what its update and its traffic must be.

#include "optimizers/spectra.h"

#include "runtime/linalg.h"
#include "runtime/random.h"
#include "world_run.h"

#include <cmath>

#include <gtest/gtest.h>

namespace lowband {
namespace {

using namespace test;

double column_norm(const Dense& x, Index j) {
  double squares = 0;
  for (Index i = 0; i < x.rows; ++i) squares += x(i, j) * x(i, j);
  return std::sqrt(squares);
}

/// algorithms.md 2.12, the tail written out.
struct ReferenceSpectra {
  ReferenceSpectra(const ParameterInfo& info_, const OptimizerOptions& options_)
      : info(info_), options(options_), W(initial_weight(info_)), M(info_.rows, info_.cols) {
    const double side = static_cast<double>(std::min(info.rows, info.cols));
    k = std::max(Index{1}, static_cast<Index>(std::floor(options.spectra_fraction * side + 0.5)));
    V = Dense(info.cols, k);
    const RandomStream stream(options.seed, info.name + ".V", 0);
    for (std::size_t e = 0; e < V.a.size(); ++e) V.a[e] = stream.normal(static_cast<Index>(e));
  }

  void step(const Dense& gradient, Index number, double learning_rate) {
    M = options.mu * M + gradient;
    Dense U, Z;
    for (Index t = 0; t < options.spectra_iterations + (number == 0 ? 4 : 0); ++t) {
      std::vector<bool> dead;
      U = orthonormal_factor(M * V, dead);
      Z = transpose(M) * U;
      V = Z;
      const RandomStream stream(options.seed, info.name + ".V", number + 1);
      for (Index j = 0; j < k; ++j) {
        if (dead[static_cast<std::size_t>(j)]) {
          for (Index i = 0; i < V.rows; ++i) V(i, j) = stream.normal(i * k + j);
        }
        const double length = column_norm(V, j);
        for (Index i = 0; i < V.rows; ++i) V(i, j) /= length;
      }
    }
    const Index side = std::min(info.rows, info.cols);
    const Dense tail = M - U * transpose(Z);
    Dense O = M;
    if (k < side && norm(tail) > 1e-6 * norm(M)) {
      Dense shaped = U;
      const double sigma = norm(tail) / std::sqrt(static_cast<double>(side - k));
      O = tail + sigma * (shaped * transpose(V));
    }
    const double rms = norm(O) / std::sqrt(static_cast<double>(info.elements()));
    W = (1 - learning_rate * options.weight_decay) * W - (0.2 * learning_rate / (rms + 1e-8)) * O;
  }

  ParameterInfo info;
  OptimizerOptions options;
  Dense W, M, V;
  Index k = 0;
};

RunPlan plan_for(const MeshShape& mesh) {
  RunPlan plan;
  plan.mesh = mesh;
  plan.parameters = assorted_parameters();
  plan.options = {
      .kind = OptimizerKind::kSpectra, .spectra_fraction = 0.25, .weight_decay = 0.1, .clip_norm = 0};
  plan.gradient = noisy_gradient;
  plan.shares = 12;
  plan.steps = 20;
  return plan;
}

class SpectraOn : public testing::TestWithParam<MeshShape> {};

// The subspace follows M with the condition of M V, some tens, so that a step rounds V to 1e-14 and W to
// less; in float a billion times more.
void expect_reference(const RunPlan& plan) {
  const auto exact = run<double>(plan);
  const auto rounded = run<float>(plan);
  for (const TestParameter& parameter : plan.parameters) {
    const std::string& name = parameter.info.name;
    if (!is_layer_matrix(parameter.info.role)) continue;
    ReferenceSpectra reference(parameter.info, plan.options);
    for (Index step = 0; step < plan.steps; ++step) {
      const auto s = static_cast<std::size_t>(step);
      reference.step(gradient_of(plan.gradient, parameter.info, step, 0, plan.shares), step,
                     plan.learning_rate);
      ASSERT_LE(largest(exact[s].weights.at(name) - reference.W), 1e-11) << name << " at " << step;
      ASSERT_LE(largest(exact[s].states[0].at(name + ".M") - reference.M), 1e-13) << name << " at " << step;
      ASSERT_LE(largest(exact[s].states[0].at(name + ".V") - reference.V), 1e-10) << name << " at " << step;
      ASSERT_LE(largest(rounded[s].weights.at(name) - reference.W), 2e-5) << name << " at " << step;
    }
  }
}

TEST_P(SpectraOn, EqualsTheReference) { expect_reference(plan_for(GetParam())); }

TEST_P(SpectraOn, EqualsTheReferenceWithMoreIterations) {
  RunPlan plan = plan_for(GetParam());
  plan.steps = 4;
  plan.options.mu = 0.8;
  plan.options.spectra_iterations = 3;
  plan.options.spectra_fraction = 0.4;
  expect_reference(plan);
}

// No tail is left where k = min(m, n); nor, while two rows only have gradients, where k exceeds 2.
TEST_P(SpectraOn, EqualsTheReferenceWithoutATail) {
  RunPlan plan = plan_for(GetParam());
  plan.steps = 4;
  plan.options.spectra_fraction = 1;
  expect_reference(plan);
  plan.options.spectra_fraction = 0.25;
  plan.gradient = [](const ParameterInfo& info, Index step, int share, Index row, Index col) {
    if (step == 0 || (step == 1 && row >= 2)) return 0.0;
    return noisy_gradient(info, step, share, row, col);
  };
  expect_reference(plan);
}

TEST_P(SpectraOn, SendsWhatTheFormulaSays) {
  const MeshShape mesh = GetParam();
  for (const Index iterations : {1, 3}) {
    RunPlan plan = plan_for(mesh);
    plan.steps = 2;
    plan.options.spectra_iterations = iterations;
    const auto snapshots = run<float>(plan);
    for (Index step = 0; step < plan.steps; ++step) {
      const Snapshot& snapshot = snapshots[static_cast<std::size_t>(step)];
      const Index rounds = iterations + (step == 0 ? 4 : 0);
      Index dense = 0, matrices = 0;
      std::map<std::string, Index> factors{{"shard", 0}, {"tensor", 0}};
      for (const TestParameter& parameter : plan.parameters) {
        const ParameterInfo& info = parameter.info;
        dense += 4 * info.elements() * (info.cut == TensorCut::kNone ? mesh.tensor : 1);
        if (!is_layer_matrix(info.role)) continue;
        ++matrices;
        const Index k = spectra_rank(info, plan.options.spectra_fraction);
        const MatrixLayout layout(info.rows, info.cols, info.cut, mesh.tensor, mesh.shard);
        const char* const across_rows = layout.shard_cuts_rows() ? "shard" : "tensor";
        const char* const across_cols = layout.shard_cuts_rows() ? "tensor" : "shard";
        const auto pieces = [&](const std::string& axis) {
          return axis == "shard" ? mesh.shard : mesh.tensor;
        };
        // U: summed and gathered; Z: likewise, and V gathered once. Of process 0.
        if (pieces(across_cols) > 1)
          factors[across_cols] += 4 * rounds * 2 * layout.owned_rows(0, 0).size() * k;
        if (pieces(across_rows) > 1)
          factors[across_rows] += 4 * (rounds * 2 + 1) * layout.owned_cols(0, 0).size() * k;
      }
      EXPECT_EQ(snapshot.dense_bytes, dense);
      EXPECT_EQ(snapshot.planned_dense_bytes, dense);
      EXPECT_EQ(snapshot.factor_bytes, 0);
      EXPECT_EQ(snapshot.update_bytes, mesh.shard * mesh.tensor > 1 ? 8 * matrices : 0);
      EXPECT_EQ(snapshot.planned_update_bytes, snapshot.update_bytes);
      for (const auto& [axis, bytes] : factors) EXPECT_EQ(snapshot.factor_bytes_on.at(axis), bytes) << axis;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Meshes, SpectraOn,
                         testing::Values(MeshShape{1, 1, 1}, MeshShape{1, 1, 2}, MeshShape{1, 2, 1},
                                         MeshShape{2, 1, 1}, MeshShape{2, 2, 2}, MeshShape{1, 3, 1},
                                         MeshShape{3, 1, 1}, MeshShape{1, 1, 3}, MeshShape{1, 2, 2}));

TEST(Spectra, EntriesOfAStepHaveTheRootMeanSquareOfAFifthOfTheRate) {
  RunPlan plan = plan_for({1, 2, 1});
  plan.options.weight_decay = 0;
  plan.steps = 3;
  const auto snapshots = run<double>(plan);
  for (const TestParameter& parameter : plan.parameters) {
    const ParameterInfo& info = parameter.info;
    if (!is_layer_matrix(info.role)) continue;
    const Dense step = snapshots[2].weights.at(info.name) - snapshots[1].weights.at(info.name);
    EXPECT_NEAR(norm(step) / std::sqrt(static_cast<double>(info.elements())), 0.2 * plan.learning_rate, 1e-9)
        << info.name;
  }
}

// Where V has converged to singular vectors: k singular values become sigma, the others stay.
TEST(Spectra, BringsTheLargestSingularValuesDown) {
  RunPlan plan = plan_for({2, 1, 2});
  plan.parameters = {
      {{.name = "q", .role = Role::kQuery, .rows = 24, .cols = 16, .cut = TensorCut::kRows}, 1}};
  plan.options.weight_decay = 0;
  plan.options.spectra_iterations = 20;
  plan.steps = 1;
  plan.gradient = [](const ParameterInfo& info, Index step, int share, Index row, Index col) {
    return noisy_gradient(info, step, share, row, col) + (row == col && row < 4 ? std::exp2(8 - row) : 0.0);
  };
  const Dense G = gradient_of(plan.gradient, plan.parameters[0].info, 0, 0, plan.shares);
  const Dense step = run<double>(plan)[0].weights.at("q") - initial_weight(plan.parameters[0].info);
  const auto values = [](const Dense& x) {
    return singular_values(MatrixView<const double>(x.a.data(), x.rows, x.cols));
  };
  std::vector<double> expected = values(G);
  double tail = 0;
  for (std::size_t i = 4; i < expected.size(); ++i) tail += expected[i] * expected[i];
  const double sigma = std::sqrt(tail / 12);
  std::fill_n(expected.begin(), 4, sigma);
  std::ranges::sort(expected, std::greater<>());
  const double scale = 0.2 * plan.learning_rate * std::sqrt(24.0) / sigma;
  const std::vector<double> found = values(step);
  for (std::size_t i = 0; i < expected.size(); ++i)
    EXPECT_NEAR(found[i], scale * expected[i], 1e-6 * scale * sigma) << i;
}

TEST(Spectra, CountsItsDirectionsInIntegers) {
  const auto rank = [](Index side, double fraction) {
    return spectra_rank({.name = "", .role = Role::kUp, .rows = side, .cols = 2 * side}, fraction);
  };
  EXPECT_EQ(rank(4096, 0.015), 61);  // 61.44
  EXPECT_EQ(rank(100, 0.015), 2);    // 1.5
  EXPECT_EQ(rank(10, 0.015), 1);
  EXPECT_EQ(rank(7, 1), 7);
  for (Index percent = 1; percent <= 100; ++percent) {
    for (Index side = 1; side <= 300; ++side)
      ASSERT_EQ(rank(side, static_cast<double>(percent) / 100),
                std::max(Index{1}, (2 * side * percent + 100) / 200))
          << percent << " of " << side;
  }
}

}  // namespace
}  // namespace lowband
