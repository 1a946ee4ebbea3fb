// GaLore against a reference in double, on every mesh, and by its identities.

#include "optimizers/galore.h"

#include "world_run.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include <gtest/gtest.h>

namespace lowband {
namespace {

using namespace test;

double dot_of_columns(const Dense& x, Index j, Index k) {
  double sum = 0;
  for (Index i = 0; i < x.rows; ++i) sum += x(i, j) * x(i, k);
  return sum;
}

/// Right singular vectors of the r largest singular values, by one-sided Jacobi rotations; the entry of
/// largest magnitude positive.
Dense right_vectors(Dense x, Index r) {
  Dense V(x.cols, x.cols);
  for (Index j = 0; j < x.cols; ++j) V(j, j) = 1;
  for (int sweep = 0; sweep < 15; ++sweep) {
    for (Index j = 0; j < x.cols; ++j) {
      for (Index k = j + 1; k < x.cols; ++k) {
        const double a = dot_of_columns(x, j, j), b = dot_of_columns(x, k, k), c = dot_of_columns(x, j, k);
        if (c == 0) continue;
        const double angle = 0.5 * std::atan2(2 * c, a - b);
        for (Dense* const m : {&x, &V}) {
          for (Index i = 0; i < m->rows; ++i) {
            const double p = (*m)(i, j), q = (*m)(i, k);
            (*m)(i, j) = std::cos(angle) * p + std::sin(angle) * q;
            (*m)(i, k) = std::cos(angle) * q - std::sin(angle) * p;
          }
        }
      }
    }
  }
  std::vector<Index> order(static_cast<std::size_t>(x.cols));
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, std::greater<>(), [&](Index j) { return dot_of_columns(x, j, j); });
  Dense vectors(x.cols, r);
  for (Index j = 0; j < r; ++j) {
    const Index from = order[static_cast<std::size_t>(j)];
    double largest = 0;
    for (Index i = 0; i < x.cols; ++i) {
      if (std::abs(V(i, from)) > std::abs(largest)) largest = V(i, from);
    }
    for (Index i = 0; i < x.cols; ++i) vectors(i, j) = largest < 0 ? -V(i, from) : V(i, from);
  }
  return vectors;
}

/// algorithms.md 2.11, "std" rule.
struct ReferenceGalore {
  ReferenceGalore(const TestParameter& parameter, const OptimizerOptions& options_)
      : info(parameter.info),
        options(options_),
        r(parameter.factor_rank),
        tall(info.rows >= info.cols),
        W(initial_weight(info)),
        B(std::min(info.rows, info.cols), r),
        m1(std::max(info.rows, info.cols), r),
        m2(m1) {
    for (Index j = 0; j < r; ++j) B(j, j) = 1;
  }

  void step(const Dense& gradient, Index number, double learning_rate, double update_scale) {
    const Dense G = tall ? gradient : transpose(gradient);
    if (takes_basis(number) && norm(G) > 0) B = right_vectors(G, r);
    const Dense H = update_scale * (G * B);
    ++t;
    Dense N = H;
    for (std::size_t k = 0; k < H.a.size(); ++k) {
      m1.a[k] = 0.9 * m1.a[k] + 0.1 * H.a[k];
      m2.a[k] = 0.999 * m2.a[k] + 0.001 * H.a[k] * H.a[k];
      N.a[k] =
          std::sqrt(1 - std::pow(0.999, t)) / (1 - std::pow(0.9, t)) * m1.a[k] / (std::sqrt(m2.a[k]) + 1e-6);
    }
    const Dense back = tall ? N * transpose(B) : B * transpose(N);
    W = W - (options.galore_scale * learning_rate) * back;
    W = (1 - learning_rate * options.weight_decay) * W;
  }

  bool takes_basis(Index number) const {
    return number == 0 || basis_steps(info, options.galore_interval).contains(number);
  }

  ParameterInfo info;
  OptimizerOptions options;
  Index r;
  bool tall;
  Dense W, B, m1, m2;
  int t = 0;
};

RunPlan plan_for(const MeshShape& mesh) {
  RunPlan plan;
  plan.mesh = mesh;
  plan.parameters = assorted_parameters();
  plan.options = {.kind = OptimizerKind::kGalore, .galore_interval = 6, .weight_decay = 0.1, .clip_norm = 0};
  plan.gradient = noisy_gradient;
  plan.shares = 12;
  plan.steps = 20;
  return plan;
}

bool same_bits(const Dense& x, const Dense& y) {
  return std::memcmp(x.a.data(), y.a.data(), x.a.size() * sizeof(double)) == 0;
}

// A basis follows G with one over the gap of its singular values, some hundred roundings; an entry of N with
// one over that of H, which for the smallest of 20,000 is some thousand more.
template <class Real>
void expect_equals_reference(const RunPlan& plan, double weight_tolerance, double state_tolerance) {
  const auto snapshots = run<Real>(plan);
  for (const TestParameter& parameter : plan.parameters) {
    if (parameter.factor_rank == 0) continue;
    const std::string& name = parameter.info.name;
    ReferenceGalore reference(parameter, plan.options);
    for (Index step = 0; step < plan.steps; ++step) {
      const Snapshot& snapshot = snapshots[static_cast<std::size_t>(step)];
      const Dense gradient = gradient_of(plan.gradient, parameter.info, step, 0, plan.shares);
      if (std::isfinite(norm(gradient)))
        reference.step(gradient, step, plan.learning_rate, snapshot.report.clip_scale);
      const auto state = [&](const char* letter) { return snapshot.states[0].at(name + letter); };
      ASSERT_LE(largest(snapshot.weights.at(name) - reference.W), weight_tolerance) << name << " at " << step;
      ASSERT_LE(largest(state(".basis") - reference.B), state_tolerance) << name << " at " << step;
      ASSERT_LE(largest(state(".m1") - reference.m1), state_tolerance) << name << " at " << step;
      ASSERT_LE(largest(state(".m2") - reference.m2), state_tolerance) << name << " at " << step;
      ASSERT_EQ(state(".t")(0, 0), reference.t) << name << " at " << step;
    }
  }
}

class GaloreOn : public testing::TestWithParam<MeshShape> {};

TEST_P(GaloreOn, EqualsTheReferenceInDouble) {
  expect_equals_reference<double>(plan_for(GetParam()), 1e-11, 1e-11);
}

TEST_P(GaloreOn, EqualsTheReferenceInFloat) {
  expect_equals_reference<float>(plan_for(GetParam()), 5e-5, 2e-4);
}

// Nothing in the first step, when bases stay, and a step that skips a matrix.
TEST_P(GaloreOn, EqualsTheReferenceWhenClippedAndSkipped) {
  for (const Index skipped : {6, 7}) {
    RunPlan plan = plan_for(GetParam());
    plan.steps = 10;
    plan.options.clip_norm = 3;
    plan.options.galore_scale = 1;
    plan.options.galore_interval = 2;
    plan.gradient = [=](const ParameterInfo& info, Index step, int share, Index row, Index col) {
      if (step == skipped && share == 0 && info.name == "q" && row == 3 && col == 1)
        return std::numeric_limits<double>::quiet_NaN();
      return step == 0 ? 0.0 : noisy_gradient(info, step, share, row, col);
    };
    expect_equals_reference<double>(plan, 1e-11, 1e-11);
  }
}

// On the replica axis r max(m, n) elements of H, or m n and the basis; within a replica the rows of H of the
// block, summed and gathered.
TEST_P(GaloreOn, SendsTheProjectionOrTheGradient) {
  const MeshShape mesh = GetParam();
  for (const FactorWire wire : {FactorWire::kAsComputed, FactorWire::kBF16}) {
    RunPlan plan = plan_for(mesh);
    plan.options.wire = wire;
    plan.steps = 8;
    const auto snapshots = run<float>(plan);
    bool mixed = false;
    for (Index step = 0; step < plan.steps; ++step) {
      const Snapshot& snapshot = snapshots[static_cast<std::size_t>(step)];
      Index factor = 0, dense = 0, bases = 0, matrices = 0;
      std::map<std::string, Index> within{{"shard", 0}, {"tensor", 0}};
      for (const TestParameter& parameter : plan.parameters) {
        const ParameterInfo& info = parameter.info;
        const Index r = parameter.factor_rank;
        if (r == 0) {
          dense += 4 * info.elements() * (info.cut == TensorCut::kNone ? mesh.tensor : 1);
          continue;
        }
        ++matrices;
        if (ReferenceGalore(parameter, plan.options).takes_basis(step)) {
          ++bases;
          dense += 4 * info.elements();
          factor += 4 * r * std::min(info.rows, info.cols);
        } else {
          factor += (wire == FactorWire::kBF16 ? 2 : 4) * r * std::max(info.rows, info.cols);
        }
        const MatrixLayout layout(info.rows, info.cols, info.cut, mesh.tensor, mesh.shard);
        const bool tall = info.rows >= info.cols;
        const Index rows = (tall ? layout.owned_rows(0, 0) : layout.owned_cols(0, 0)).size();
        const bool by_shard = layout.shard_cuts_rows() != tall;
        if ((by_shard ? mesh.shard : mesh.tensor) > 1)
          within[by_shard ? "shard" : "tensor"] += 2 * 4 * rows * r;
        const Index basis_rows = (tall ? layout.owned_cols(0, 0) : layout.owned_rows(0, 0)).size();
        if ((by_shard ? mesh.tensor : mesh.shard) > 1)
          within[by_shard ? "tensor" : "shard"] += 4 * basis_rows * r;
      }
      mixed = mixed || (bases > 0 && bases < matrices);
      EXPECT_TRUE(step > 0 || bases == matrices);
      EXPECT_EQ(snapshot.factor_bytes, factor) << step;
      EXPECT_EQ(snapshot.planned_factor_bytes, factor) << step;
      EXPECT_EQ(snapshot.dense_bytes, dense) << step;
      EXPECT_EQ(snapshot.planned_dense_bytes, dense) << step;
      EXPECT_EQ(snapshot.update_bytes, 0);
      EXPECT_EQ(snapshot.periodic_bytes, 0);
      for (const auto& [axis, bytes] : within) EXPECT_EQ(snapshot.factor_bytes_on.at(axis), bytes) << axis;
    }
    EXPECT_TRUE(mixed);
  }
}

INSTANTIATE_TEST_SUITE_P(Meshes, GaloreOn,
                         testing::Values(MeshShape{1, 1, 1}, MeshShape{1, 1, 2}, MeshShape{1, 2, 1},
                                         MeshShape{2, 1, 1}, MeshShape{2, 2, 2}, MeshShape{1, 3, 1},
                                         MeshShape{3, 1, 1}, MeshShape{1, 1, 3}, MeshShape{2, 1, 2}));

// With r = min(m, n) nothing is lost: |H| is the norm of the mean gradient, which is reported.
TEST(Galore, TheWholeSpaceLosesNothing) {
  RunPlan plan = plan_for({2, 2, 1});
  plan.steps = 8;
  for (TestParameter& parameter : plan.parameters) {
    if (parameter.factor_rank > 0) parameter.factor_rank = std::min(parameter.info.rows, parameter.info.cols);
  }
  const auto snapshots = run<double>(plan);
  for (Index step = 0; step < plan.steps; ++step) {
    double squares = 0;
    for (const TestParameter& parameter : plan.parameters)
      squares += std::pow(norm(gradient_of(plan.gradient, parameter.info, step, 0, plan.shares)), 2);
    EXPECT_NEAR(snapshots[static_cast<std::size_t>(step)].report.gradient_norm, std::sqrt(squares),
                1e-12 * std::sqrt(squares));
  }
}

// Steps lie in the span of the basis, which is orthonormal.
TEST(Galore, StepsStayInTheSubspace) {
  RunPlan plan = plan_for({2, 1, 2});
  plan.options.weight_decay = 0;
  const auto snapshots = run<double>(plan);
  for (const TestParameter& parameter : plan.parameters) {
    if (parameter.factor_rank == 0) continue;
    const std::string& name = parameter.info.name;
    for (std::size_t step = 1; step < snapshots.size(); ++step) {
      const Dense& B = snapshots[step].states[0].at(name + ".basis");
      Dense unit(B.cols, B.cols);
      for (Index j = 0; j < B.cols; ++j) unit(j, j) = 1;
      EXPECT_LE(largest(transpose(B) * B - unit), 1e-13) << name;
      Dense moved = snapshots[step].weights.at(name) - snapshots[step - 1].weights.at(name);
      if (parameter.info.rows < parameter.info.cols) moved = transpose(moved);
      EXPECT_GT(norm(moved), 0) << name;
      EXPECT_LE(largest(moved - moved * B * transpose(B)), 1e-14) << name;
    }
  }
}

// For a new basis a matrix goes to its owner, within the replica of the owner, and B to all processes.
TEST(Galore, BasesCostWithinAReplicaWhatIsSaid) {
  for (const MeshShape& mesh :
       {MeshShape{2, 1, 1}, MeshShape{2, 2, 1}, MeshShape{2, 1, 3}, MeshShape{3, 2, 2}}) {
    RunPlan plan = plan_for(mesh);
    plan.options.galore_interval = 3;
    plan.steps = 7;
    const auto snapshots = run<float>(plan);
    const int processes = mesh.shard * mesh.tensor;
    for (Index step = 0; step < plan.steps; ++step) {
      std::map<int, Index> expected;
      for (int process = 0; process < mesh.processes(); ++process) {
        expected[process] = 0;
        for (const auto& [info, factor_rank] : plan.parameters) {
          if (processes == 1 || factor_rank == 0 || !basis_steps(info, 3).contains(step)) continue;
          const bool with_owner = basis_owner(info, mesh) / processes == process / processes;
          expected[process] +=
              4 * ((with_owner ? info.elements() : 0) + factor_rank * std::min(info.rows, info.cols));
        }
      }
      EXPECT_EQ(snapshots[static_cast<std::size_t>(step)].periodic_bytes_within, expected) << "step " << step;
    }
  }
}

// Every interval of steps has one of them, and names spread them: 20 of 200 expected in each step.
TEST(Galore, BasesAreTakenByTurns) {
  std::vector<Index> taken(10);
  for (int i = 0; i < 200; ++i) {
    const ParameterInfo info{.name = cat("matrix ", i), .role = Role::kUp, .rows = 4, .cols = 4};
    const StepPhase phase = basis_steps(info, 10);
    EXPECT_TRUE(phase.contains(0));
    Index found = 0;
    for (Index step = 20; step < 30; ++step) {
      found += phase.contains(step);
      taken[static_cast<std::size_t>(step - 20)] += phase.contains(step);
    }
    EXPECT_EQ(found, 1);
  }
  EXPECT_LE(*std::ranges::max_element(taken), 40);
}

TEST(Galore, OverlapChangesNoBit) {
  RunPlan plan = plan_for({2, 2, 1});
  plan.steps = 9;
  plan.options.clip_norm = 3;
  const auto expected = run<float>(plan);
  plan.options.overlap = true;
  plan.options.bucket_elements = 300;
  for (Index i = static_cast<Index>(plan.parameters.size()) - 1; i >= 0; --i) plan.announced.push_back(i);
  const auto found = run<float>(plan);
  for (std::size_t step = 0; step < expected.size(); ++step) {
    for (const auto& [name, weight] : expected[step].weights)
      EXPECT_TRUE(same_bits(found[step].weights.at(name), weight)) << name << " at " << step;
  }
}

TEST(Galore, RefusesWhatItCannotDo) {
  EXPECT_THROW(validate({.kind = OptimizerKind::kGalore, .exchange = ExchangeChoice::kAuto}),
               InvalidArgument);
  EXPECT_THROW(validate({.kind = OptimizerKind::kGalore, .residual = Residual::kAggregated}),
               InvalidArgument);
  RunPlan plan = plan_for({1, 1, 1});
  plan.options.wire = FactorWire::kBF16;
  EXPECT_THROW(run<double>(plan), InvalidArgument);
}

}  // namespace
}  // namespace lowband
