// Dion2 and NorDion2 against a reference in double, on every mesh.

#include "runtime/linalg.h"
#include "runtime/random.h"
#include "world_run.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include <gtest/gtest.h>

namespace lowband {
namespace {

using namespace test;

struct ReferenceDion2 {
  ReferenceDion2(const ParameterInfo& info_, const OptimizerOptions& options_)
      : info(info_),
        options(options_),
        of_rows(options_.kind == OptimizerKind::kNorDion2 || info_.rows <= info_.cols),
        W(initial_weight(info_)),
        M(info_.rows, info_.cols),
        v(static_cast<std::size_t>(info_.rows)) {}

  double& slice(Dense& x, Index s, Index k) const { return of_rows ? x(s, k) : x(k, s); }
  Index slices() const { return of_rows ? info.rows : info.cols; }
  Index length() const { return of_rows ? info.cols : info.rows; }

  std::vector<Index> selection(Index step) {
    std::vector<double> values(static_cast<std::size_t>(slices()));
    const RandomStream stream(options.seed, info.name + ".slices", step);
    for (Index s = 0; s < slices(); ++s) {
      double& value = values[static_cast<std::size_t>(s)];
      if (options.dion2_selection == SliceSelection::kRandom) value = stream.uniform(s);
      for (Index k = 0; k < length() && options.dion2_selection == SliceSelection::kLargest; ++k)
        value += std::abs(slice(M, s, k));
    }
    std::vector<Index> order(values.size());
    std::iota(order.begin(), order.end(), Index{0});
    std::ranges::stable_sort(order, std::ranges::greater{},
                             [&](Index s) { return values[static_cast<std::size_t>(s)]; });
    const double fraction =
        static_cast<double>(options.dion2_numerator) / static_cast<double>(options.dion2_denominator);
    order.resize(std::max(std::size_t{1}, static_cast<std::size_t>(
                                              std::ceil(fraction * static_cast<double>(slices()) - 1e-9))));
    std::ranges::sort(order);
    return order;
  }

  void step(const Dense& gradient, Index step_number, double learning_rate) {
    M = M + gradient;
    selected = selection(step_number);
    const auto k = static_cast<Index>(selected.size());
    Dense U = of_rows ? Dense(k, info.cols) : Dense(info.rows, k);
    for (Index s = 0; s < k; ++s) {
      for (Index j = 0; j < length(); ++j) {
        double& m = slice(M, selected[static_cast<std::size_t>(s)], j);
        slice(U, s, j) = m;
        m *= options.mu;
      }
    }
    taken = U;
    U = reference_sign(U, options.sign);
    if (options.kind == OptimizerKind::kNorDion2) scale_rows(U);
    const double c = std::sqrt(static_cast<double>(info.rows) / static_cast<double>(info.cols));
    W = (1 - learning_rate * options.weight_decay) * W;
    for (Index s = 0; s < k; ++s) {
      for (Index j = 0; j < length(); ++j)
        slice(W, selected[static_cast<std::size_t>(s)], j) -= learning_rate * c * slice(U, s, j);
    }
  }

  void scale_rows(Dense& U) {
    const double before = norm(U);
    for (Index s = 0; s < U.rows; ++s) {
      double squares = 0;
      for (Index j = 0; j < U.cols; ++j) squares += U(s, j) * U(s, j);
      double& mean = v[static_cast<std::size_t>(selected[static_cast<std::size_t>(s)])];
      mean =
          options.normuon_beta2 * mean + (1 - options.normuon_beta2) * squares / static_cast<double>(U.cols);
      for (Index j = 0; j < U.cols; ++j) U(s, j) /= std::sqrt(mean) + 1e-8;
    }
    U = (before / norm(U)) * U;
  }

  ParameterInfo info;
  OptimizerOptions options;
  bool of_rows;
  Dense W, M;
  std::vector<double> v;
  std::vector<Index> selected;
  Dense taken;
};

/// With two matrices long enough to be signed by their Gram matrices, wherever one axis cuts their long side.
RunPlan plan_for(const MeshShape& mesh, OptimizerKind kind) {
  RunPlan plan;
  plan.mesh = mesh;
  plan.parameters = assorted_parameters();
  plan.parameters.push_back(
      {{.name = "wide", .role = Role::kUp, .rows = 7, .cols = 201, .cut = TensorCut::kRows}, 1});
  plan.parameters.push_back(
      {{.name = "tall", .role = Role::kUp, .rows = 201, .cols = 5, .cut = TensorCut::kRows}, 1});
  plan.options = {.kind = kind, .weight_decay = 0.1, .clip_norm = 0, .seed = 5};
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
    ReferenceDion2 reference(parameter.info, plan.options);
    for (Index step = 0; step < plan.steps; ++step) {
      const auto s = static_cast<std::size_t>(step);
      reference.step(gradient_of(plan.gradient, parameter.info, step, 0, plan.shares), step,
                     plan.learning_rate);
      ASSERT_LE(largest(exact[s].weights.at(name) - reference.W), 1e-11) << name << " at " << step;
      ASSERT_LE(largest(exact[s].states[0].at(name + ".M") - reference.M), 1e-12) << name << " at " << step;
      // As for Muon.
      ASSERT_LE(largest(rounded[s].weights.at(name) - reference.W), 2e-5) << name << " at " << step;
    }
  }
}

class Dion2On : public testing::TestWithParam<MeshShape> {};

TEST_P(Dion2On, EqualsTheReference) { expect_reference(plan_for(GetParam(), OptimizerKind::kDion2)); }

TEST_P(Dion2On, EqualsTheReferenceWithNormalisedRows) {
  RunPlan plan = plan_for(GetParam(), OptimizerKind::kNorDion2);
  plan.options.normuon_beta2 = 0.9;
  expect_reference(plan);
}

TEST_P(Dion2On, EqualsTheReferenceWithDraws) {
  RunPlan plan = plan_for(GetParam(), OptimizerKind::kDion2);
  plan.options.dion2_selection = SliceSelection::kRandom;
  plan.options.dion2_numerator = 3;
  plan.options.dion2_denominator = 7;
  expect_reference(plan);
}

// Everything that is sent, from global shapes alone, whatever is selected.
TEST_P(Dion2On, SendsWhatTheFormulaSays) {
  const auto ceil_quarter = [](Index slices) { return (slices + 3) / 4; };
  for (const OptimizerKind kind : {OptimizerKind::kDion2, OptimizerKind::kNorDion2}) {
    for (const SliceSelection selection : {SliceSelection::kLargest, SliceSelection::kRandom}) {
      RunPlan plan = plan_for(GetParam(), kind);
      plan.options.dion2_selection = selection;
      plan.steps = 2;
      const MeshShape& mesh = plan.mesh;
      for (const Snapshot& snapshot : run<float>(plan)) {
        Index update = 0;
        for (const TestParameter& parameter : plan.parameters) {
          const ParameterInfo& info = parameter.info;
          if (!is_layer_matrix(info.role) || mesh.shard * mesh.tensor == 1) continue;
          const bool of_rows = kind == OptimizerKind::kNorDion2 || info.rows <= info.cols;
          const Index rows = of_rows ? ceil_quarter(info.rows) : info.rows;
          const Index cols = of_rows ? info.cols : ceil_quarter(info.cols);
          Index expected = selection == SliceSelection::kLargest ? 8 * (of_rows ? info.rows : info.cols) : 0;
          if (kind == OptimizerKind::kNorDion2) expected += 8 * (rows + 2);
          // "wide": 2 rows of 201, by Gram matrices (2, 2) where only columns are cut. "tall": 2 columns of
          // 201, likewise where only rows are; NorDion2's 51 rows of 5 by (5, 5) on two processes only.
          const bool gram =
              (info.name == "wide" && mesh.tensor == 1) ||
              (info.name == "tall" && mesh.shard == 1 && (kind == OptimizerKind::kDion2 || mesh.tensor == 2));
          const Index uncut = info.name == "wide" ? rows : cols;
          expected += gram ? 5 * uncut * uncut * 4 + 8 : 2 * 4 * rows * cols;
          EXPECT_EQ(snapshot.update_bytes_of.at(info.name), expected)
              << info.name << " of " << static_cast<int>(kind) << " selected by "
              << static_cast<int>(selection);
          update += expected;
        }
        EXPECT_EQ(snapshot.update_bytes, update);
        EXPECT_EQ(snapshot.planned_update_bytes, update);
        EXPECT_EQ(snapshot.dense_bytes, snapshot.planned_dense_bytes);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Meshes, Dion2On,
                         testing::Values(MeshShape{1, 1, 1}, MeshShape{1, 1, 2}, MeshShape{1, 2, 1},
                                         MeshShape{2, 1, 1}, MeshShape{2, 2, 2}, MeshShape{1, 3, 1},
                                         MeshShape{3, 1, 1}, MeshShape{1, 1, 3}, MeshShape{1, 2, 2}));

TEST(Dion2, IsMuonWhenAllSlicesAreSelected) {
  RunPlan plan = plan_for({1, 2, 2}, OptimizerKind::kDion2);
  plan.options.dion2_denominator = 1;
  const auto found = run<double>(plan);
  plan.options.kind = OptimizerKind::kMuon;
  const auto expected = run<double>(plan);
  for (std::size_t step = 0; step < found.size(); ++step) {
    for (const auto& [name, weight] : expected[step].weights)
      ASSERT_LE(largest(found[step].weights.at(name) - weight), 1e-11) << name << " at " << step;
  }
}

// M_before + G = M_after + (1 - mu) U on what is selected; elsewhere M keeps all and W only decays.
TEST(Dion2, MovesAndForgetsWhatItSelectsAlone) {
  const RunPlan plan = plan_for({2, 1, 2}, OptimizerKind::kDion2);
  const auto found = run<double>(plan);
  for (const TestParameter& parameter : plan.parameters) {
    const ParameterInfo& info = parameter.info;
    if (!is_layer_matrix(info.role)) continue;
    Dense M(info.rows, info.cols), W = initial_weight(info);
    const bool of_rows = info.rows <= info.cols;
    const Index slices = of_rows ? info.rows : info.cols;
    for (Index step = 0; step < plan.steps; ++step) {
      const Snapshot& snapshot = found[static_cast<std::size_t>(step)];
      const Dense sum = M + gradient_of(plan.gradient, info, step, 0, plan.shares);
      M = snapshot.states[0].at(info.name + ".M");
      const Dense decayed = (1 - plan.learning_rate * plan.options.weight_decay) * W;
      W = snapshot.weights.at(info.name);
      std::vector<bool> moved(static_cast<std::size_t>(slices)), forgot = moved;
      for (Index i = 0; i < info.rows; ++i) {
        for (Index j = 0; j < info.cols; ++j) {
          const auto s = static_cast<std::size_t>(of_rows ? i : j);
          moved[s] = moved[s] || std::abs(W(i, j) - decayed(i, j)) > 1e-15;
          forgot[s] = forgot[s] || std::abs(M(i, j) - sum(i, j)) > 1e-13;
          const double kept = forgot[s] ? plan.options.mu : 1;
          EXPECT_NEAR(M(i, j), kept * sum(i, j), 1e-13) << info.name;
        }
      }
      EXPECT_EQ(moved, forgot) << info.name << " at " << step;
      EXPECT_EQ(std::count(moved.begin(), moved.end(), true), (slices + 3) / 4) << info.name;
    }
  }
}

// A step whose gradient is unusable changes nothing, also where slices are drawn by step.
TEST(Dion2, LeavesAMatrixWithAnUnusableGradientAlone) {
  RunPlan plan = plan_for({1, 2, 2}, OptimizerKind::kNorDion2);
  plan.options.dion2_selection = SliceSelection::kRandom;
  plan.steps = 3;
  plan.gradient = [](const ParameterInfo& info, Index step, int share, Index row, Index col) {
    if (step == 1 && info.name == "gate" && row == 4) return std::numeric_limits<double>::infinity();
    return noisy_gradient(info, step, share, row, col);
  };
  const auto found = run<float>(plan);
  EXPECT_EQ(found[1].report.skipped_matrices, 1);
  EXPECT_EQ(found[1].weights.at("gate").a, found[0].weights.at("gate").a);
  EXPECT_EQ(found[1].states[0].at("gate.M").a, found[0].states[0].at("gate.M").a);
  EXPECT_NE(found[2].weights.at("gate").a, found[0].weights.at("gate").a);
}

// Ties go to the lower index: all slices equal, on every layout.
TEST(Dion2, BreaksTiesByIndex) {
  for (const MeshShape& mesh : {MeshShape{}, MeshShape{1, 2, 2}, MeshShape{1, 1, 3}}) {
    RunPlan plan = plan_for(mesh, OptimizerKind::kDion2);
    plan.steps = 1;
    plan.options.weight_decay = 0;
    plan.gradient = [](const ParameterInfo&, Index, int, Index row, Index col) {
      return (row + col) % 2 == 0 ? 1.0 : -1.0;
    };
    const Dense moved = run<double>(plan)[0].weights.at("o") - initial_weight(plan.parameters[2].info);
    for (Index i = 0; i < moved.rows; ++i) EXPECT_EQ(moved(i, 0) != 0, i < 4) << i;
  }
}

}  // namespace
}  // namespace lowband
