// ACP-SGD against a reference in double, on every mesh, and by its identities.

#include "runtime/random.h"
#include "world_run.h"

#include <cmath>
#include <cstring>
#include <limits>

#include <gtest/gtest.h>

namespace lowband {
namespace {

using namespace test;

/// algorithms.md 2.10, replicas side by side in one process.
struct ReferenceAcpSgd {
  ReferenceAcpSgd(const TestParameter& parameter, int replicas, const OptimizerOptions& options_)
      : info(parameter.info),
        options(options_),
        r(parameter.factor_rank),
        W(initial_weight(info)),
        u(info.rows, info.cols),
        P(random("P", 0, info.rows)),
        Q(random("Q", 0, info.cols)),
        e(static_cast<std::size_t>(replicas), Dense(info.rows, info.cols)) {}

  void step(const std::vector<Dense>& gradients, Index number, double learning_rate, double update_scale) {
    const bool even = number % 2 == 0;
    std::vector<bool> dead;
    const Dense basis = orthonormal_factor(even ? Q : P, dead);
    Dense mean(even ? info.rows : info.cols, r);
    const auto product = [&](const Dense& x) { return even ? x * transpose(basis) : basis * transpose(x); };
    for (std::size_t i = 0; i < gradients.size(); ++i) {
      e[i] = e[i] + gradients[i];
      const Dense own = (even ? e[i] : transpose(e[i])) * basis;
      e[i] = e[i] - product(own);
      mean = mean + (1 / static_cast<double>(gradients.size())) * own;
    }
    const Dense D = update_scale * product(mean);
    u = options.lambda * u + D;
    W = (1 - learning_rate * options.weight_decay) * W - learning_rate * (D + u);
    const Dense fresh = random(even ? "P" : "Q", number + 1, mean.rows);
    dead_columns = 0;
    for (Index j = 0; j < r; ++j) {
      if (!dead[static_cast<std::size_t>(j)]) continue;
      ++dead_columns;
      double squares = 0;
      for (Index i = 0; i < mean.rows; ++i) squares += fresh(i, j) * fresh(i, j);
      for (Index i = 0; i < mean.rows; ++i) mean(i, j) = fresh(i, j) / std::sqrt(squares);
    }
    (even ? P : Q) = mean;
  }

  Dense random(const char* letter, Index number, Index rows) const {
    const RandomStream stream(options.seed, info.name + "." + letter, number);
    Dense x(rows, r);
    for (std::size_t k = 0; k < x.a.size(); ++k) x.a[k] = stream.normal(static_cast<Index>(k));
    return x;
  }

  ParameterInfo info;
  OptimizerOptions options;
  Index r;
  Dense W, u, P, Q;
  std::vector<Dense> e;
  Index dead_columns = 0;
};

RunPlan plan_for(const MeshShape& mesh) {
  RunPlan plan;
  plan.mesh = mesh;
  plan.parameters = assorted_parameters();
  plan.options = {.kind = OptimizerKind::kAcpSgd, .weight_decay = 0.1, .clip_norm = 0, .seed = 3};
  plan.gradient = noisy_gradient;
  plan.shares = mesh.replica * mesh.shard == 7 ? 7 : 12;
  plan.steps = 20;
  return plan;
}

bool same_bits(const Dense& x, const Dense& y) {
  return std::memcmp(x.a.data(), y.a.data(), x.a.size() * sizeof(double)) == 0;
}

std::vector<Dense> replica_gradients(const RunPlan& plan, const ParameterInfo& info, Index step) {
  std::vector<Dense> gradients;
  const int shares = plan.shares / plan.mesh.replica;
  for (int replica = 0; replica < plan.mesh.replica; ++replica)
    gradients.push_back(gradient_of(plan.gradient, info, step, replica * shares, shares));
  return gradients;
}

// Errors of rounding as for PowerSGD: e has the size of some tens of gradients, since each step sends r of
// min(m, n) directions, and a basis follows it with its condition.
template <class Real>
void expect_equals_reference(const RunPlan& plan, double weight_tolerance, double state_tolerance) {
  const auto snapshots = run<Real>(plan);
  std::vector<Index> dead_columns(snapshots.size());
  for (const TestParameter& parameter : plan.parameters) {
    if (parameter.factor_rank == 0) continue;
    const std::string& name = parameter.info.name;
    ReferenceAcpSgd reference(parameter, plan.mesh.replica, plan.options);
    for (Index step = 0; step < plan.steps; ++step) {
      const Snapshot& snapshot = snapshots[static_cast<std::size_t>(step)];
      const std::vector<Dense> gradients = replica_gradients(plan, parameter.info, step);
      const bool skipped =
          std::ranges::any_of(gradients, [](const Dense& g) { return !std::isfinite(norm(g)); });
      if (!skipped) {
        reference.step(gradients, step, plan.learning_rate, snapshot.report.clip_scale);
        dead_columns[static_cast<std::size_t>(step)] += reference.dead_columns;
      }
      const auto state = [&](std::size_t replica, const char* letter) {
        return snapshot.states[replica].at(name + letter);
      };
      ASSERT_LE(largest(snapshot.weights.at(name) - reference.W), weight_tolerance) << name << " at " << step;
      ASSERT_LE(largest(state(0, ".u") - reference.u), state_tolerance) << name << " at " << step;
      ASSERT_LE(largest(state(0, ".left") - reference.P), state_tolerance) << name << " at " << step;
      ASSERT_LE(largest(state(0, ".right") - reference.Q), state_tolerance) << name << " at " << step;
      for (std::size_t replica = 0; replica < reference.e.size(); ++replica)
        ASSERT_LE(largest(state(replica, ".e") - reference.e[replica]), state_tolerance)
            << name << " at " << step << ", replica " << replica;
    }
  }
  for (std::size_t step = 0; step < snapshots.size(); ++step)
    EXPECT_EQ(snapshots[step].report.dead_columns, dead_columns[step]) << step;
}

class AcpSgdOn : public testing::TestWithParam<MeshShape> {};

TEST_P(AcpSgdOn, EqualsTheReferenceInDouble) {
  expect_equals_reference<double>(plan_for(GetParam()), 1e-11, 1e-9);
}

TEST_P(AcpSgdOn, EqualsTheReferenceInFloat) {
  expect_equals_reference<float>(plan_for(GetParam()), 5e-5, 2e-3);
}

// Nothing at first, then two rows only, so that columns die in P and in Q; and a step that skips a matrix.
TEST_P(AcpSgdOn, EqualsTheReferenceWhenClippedRefilledAndSkipped) {
  RunPlan plan = plan_for(GetParam());
  plan.options.clip_norm = 3;
  plan.options.lambda = 0.5;
  plan.gradient = [](const ParameterInfo& info, Index step, int share, Index row, Index col) {
    if (step == 5 && share == 0 && info.name == "q" && row == 3 && col == 1)
      return std::numeric_limits<double>::quiet_NaN();
    if (step == 0 || (step <= 2 && row >= 2)) return 0.0;
    return noisy_gradient(info, step, share, row, col);
  };
  expect_equals_reference<double>(plan, 1e-11, 1e-9);
}

// mean e_T = sum of mean G - sum of D, through a skipped step, and e orthogonal to the basis of the last.
TEST_P(AcpSgdOn, ErrorLosesExactlyWhatWasApplied) {
  RunPlan plan = plan_for(GetParam());
  plan.steps = 7;
  plan.options.weight_decay = 0;
  plan.options.lambda = 0;
  plan.gradient = [](const ParameterInfo& info, Index step, int share, Index row, Index col) {
    if (step == 4 && share == 0 && row == 0 && col == 0) return std::numeric_limits<double>::infinity();
    return noisy_gradient(info, step, share, row, col);
  };
  const auto snapshots = run<double>(plan);
  for (const TestParameter& parameter : plan.parameters) {
    if (parameter.factor_rank == 0) continue;
    const ParameterInfo& info = parameter.info;
    Dense mass(info.rows, info.cols);
    for (Index step = 0; step < plan.steps; ++step) {
      const Snapshot& snapshot = snapshots[static_cast<std::size_t>(step)];
      if (step != 4) mass = mass + gradient_of(plan.gradient, info, step, 0, plan.shares);
      const Dense applied =
          (1 / (2 * plan.learning_rate)) * (initial_weight(info) - snapshot.weights.at(info.name));
      EXPECT_LE(largest(snapshot.mean(info.name + ".e") + applied - mass), 1e-11)
          << info.name << " at " << step;
      if (step == 4) continue;
      const bool even = step % 2 == 0;
      for (const auto& states : snapshot.states) {
        const Dense& e = states.at(info.name + ".e");
        const Dense rest =
            even ? e * states.at(info.name + ".right") : transpose(e) * states.at(info.name + ".left");
        EXPECT_LE(largest(rest), 1e-10) << info.name << " at " << step;
      }
    }
  }
}

// r m elements in even steps and r n in odd ones, on the replica axis, of a replica; within it every process
// gathers the rows of its block of the basis, and sums and gathers those of the factor that travels, with its
// own beside the mean.
TEST_P(AcpSgdOn, SendsOneFactorByTurns) {
  const MeshShape mesh = GetParam();
  for (const FactorWire wire : {FactorWire::kAsComputed, FactorWire::kBF16}) {
    RunPlan plan = plan_for(mesh);
    plan.steps = 4;
    plan.options.wire = wire;
    const auto snapshots = run<float>(plan);
    for (Index step = 0; step < plan.steps; ++step) {
      const Snapshot& snapshot = snapshots[static_cast<std::size_t>(step)];
      Index factor = 0, dense = 0;
      std::map<std::string, Index> within{{"shard", 0}, {"tensor", 0}};
      for (const TestParameter& parameter : plan.parameters) {
        const ParameterInfo& info = parameter.info;
        const Index r = parameter.factor_rank;
        if (r == 0) {
          dense += 4 * info.elements() * (info.cut == TensorCut::kNone ? mesh.tensor : 1);
          continue;
        }
        factor += (step % 2 == 0 ? info.rows : info.cols) * r * (wire == FactorWire::kBF16 ? 2 : 4);
        const MatrixLayout layout(info.rows, info.cols, info.cut, mesh.tensor, mesh.shard);
        const Index rows = layout.owned_rows(0, 0).size(), cols = layout.owned_cols(0, 0).size();
        const bool by_shard = layout.shard_cuts_rows();
        const Index across_rows = by_shard ? mesh.shard : mesh.tensor;
        const Index across_cols = by_shard ? mesh.tensor : mesh.shard;
        const Index own = mesh.replica > 1 ? 3 : 2;
        if (across_cols > 1)
          within[by_shard ? "tensor" : "shard"] += 4 * rows * r * (step % 2 == 0 ? own : 1);
        if (across_rows > 1)
          within[by_shard ? "shard" : "tensor"] += 4 * cols * r * (step % 2 == 0 ? 1 : own);
      }
      EXPECT_EQ(snapshot.factor_bytes, factor) << step;
      EXPECT_EQ(snapshot.planned_factor_bytes, factor) << step;
      EXPECT_EQ(snapshot.dense_bytes, dense);
      EXPECT_EQ(snapshot.planned_dense_bytes, dense);
      EXPECT_EQ(snapshot.update_bytes, 0);
      for (const auto& [axis, bytes] : within) EXPECT_EQ(snapshot.factor_bytes_on.at(axis), bytes) << axis;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Meshes, AcpSgdOn,
                         testing::Values(MeshShape{1, 1, 1}, MeshShape{1, 1, 2}, MeshShape{1, 2, 1},
                                         MeshShape{2, 1, 1}, MeshShape{2, 1, 2}, MeshShape{2, 2, 2},
                                         MeshShape{1, 3, 1}, MeshShape{3, 1, 1}, MeshShape{1, 1, 3},
                                         MeshShape{7, 1, 1}));

// With factors in bfloat16 mass is conserved to the rounding of float all the same: e loses what was sent.
TEST(AcpSgd, ARoundedWireLosesNothing) {
  RunPlan plan = plan_for({2, 1, 1});
  plan.options.weight_decay = 0;
  plan.options.lambda = 0;
  plan.options.wire = FactorWire::kBF16;
  const Snapshot snapshot = run<float>(plan).back();
  for (const TestParameter& parameter : plan.parameters) {
    if (parameter.factor_rank == 0) continue;
    const ParameterInfo& info = parameter.info;
    Dense mass(info.rows, info.cols);
    for (Index step = 0; step < plan.steps; ++step)
      mass = mass + gradient_of(plan.gradient, info, step, 0, plan.shares);
    const Dense applied =
        (1 / (2 * plan.learning_rate)) * (initial_weight(info) - snapshot.weights.at(info.name));
    // 20 steps, each rounding W of size 1 and e of size 10 by 1e-7; W is read through a rate of 0.04.
    EXPECT_LE(largest(snapshot.mean(info.name + ".e") + applied - mass), 20 * 1e-6 / 0.04) << info.name;
  }
}

TEST(AcpSgd, ReportsAndDiagnosesWhatItDecompressed) {
  RunPlan plan = plan_for({2, 1, 2});
  plan.steps = 3;
  plan.diagnose = true;
  plan.options.weight_decay = 0;
  plan.options.lambda = 0;
  plan.parameters = {plan.parameters[1], plan.parameters[5]};
  const auto snapshots = run<double>(plan);
  Dense before = initial_weight(plan.parameters[0].info);
  for (const Snapshot& snapshot : snapshots) {
    double squares = 0;
    for (const TestParameter& parameter : plan.parameters) {
      const std::string& name = parameter.info.name;
      const Dense& old =
          &snapshot == &snapshots[0] ? initial_weight(parameter.info) : (&snapshot)[-1].weights.at(name);
      squares += std::pow(norm(old - snapshot.weights.at(name)) / (2 * plan.learning_rate), 2);
    }
    EXPECT_NEAR(snapshot.report.gradient_norm, std::sqrt(squares), 1e-10);
    ASSERT_EQ(snapshot.report.diagnostics.size(), 2U);
    for (const MatrixDiagnostics& found : snapshot.report.diagnostics) {
      EXPECT_LE(found.mass_leak, 1e-14) << found.name;
      EXPECT_GT(found.captured_energy, 0.1) << found.name;
      EXPECT_LT(found.captured_energy, 1) << found.name;
    }
    EXPECT_EQ(snapshot.periodic_bytes, snapshot.planned_periodic_bytes);
  }
}

// Announced gradients are exchanged while the caller goes on, but for those of the first step.
TEST(AcpSgd, OverlapChangesNoBit) {
  RunPlan plan = plan_for({2, 2, 1});
  plan.steps = 5;
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

TEST(AcpSgd, RefusesWhatItCannotDo) {
  const auto refused = [](const OptimizerOptions& options, const char* field) {
    try {
      validate(options);
      ADD_FAILURE() << field;
    } catch (const InvalidArgument& error) {
      EXPECT_TRUE(std::string(error.what()).find(field) != std::string::npos) << error.what();
    }
  };
  refused({.kind = OptimizerKind::kAcpSgd, .residual = Residual::kAggregated}, "optimizer.residual: found");
  refused({.kind = OptimizerKind::kAcpSgd, .exchange = ExchangeChoice::kDense}, "optimizer.exchange: found");
  refused({.kind = OptimizerKind::kAcpSgd, .exchange = ExchangeChoice::kAuto}, "optimizer.exchange: found");
}

}  // namespace
}  // namespace lowband
