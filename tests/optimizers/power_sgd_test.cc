// PowerSGD against the published algorithm and by its identities; both optimizers with matrices that travel
// dense.

#include "world_run.h"

#include <cmath>
#include <cstring>
#include <limits>

#include <gtest/gtest.h>

namespace lowband {
namespace {

using namespace test;

std::string mesh_name(const testing::TestParamInfo<MeshShape>& mesh) {
  return cat("D", mesh.param.replica, "F", mesh.param.shard, "T", mesh.param.tensor);
}

const MeshShape kMeshes[] = {{1, 1, 1}, {1, 1, 2}, {1, 2, 1}, {2, 1, 1}, {2, 1, 2},
                             {2, 2, 1}, {2, 2, 2}, {3, 1, 1}, {1, 3, 1}, {7, 1, 1}};

RunPlan plan_for(const MeshShape& mesh, OptimizerKind kind = OptimizerKind::kPowerSgd) {
  RunPlan plan;
  plan.mesh = mesh;
  plan.parameters = assorted_parameters();
  plan.options = {.kind = kind, .weight_decay = 0.1, .clip_norm = 0, .seed = 3};
  plan.gradient = noisy_gradient;
  plan.shares = mesh.replica * mesh.shard == 7 ? 7 : 12;
  return plan;
}

bool same_bits(const Dense& x, const Dense& y) {
  return std::memcmp(x.a.data(), y.a.data(), x.a.size() * sizeof(double)) == 0;
}

class PowerSgdOn : public testing::TestWithParam<MeshShape> {};

// ---- Against the published algorithm

// 15 steps with errors of rounding, as for Dion (algorithms.md 2.7), and e instead of M. The gradients are of
// size 1 and rates 0.02, so W moves by less than 1 in all; u has the size of 1 / (1 - lambda) = 10 gradients.
template <class Real>
void expect_equals_reference(RunPlan plan, double weight_tolerance, double state_tolerance) {
  plan.steps = 15;
  const auto snapshots = run<Real>(plan);
  const int replicas = plan.mesh.replica;
  for (const TestParameter& parameter : plan.parameters) {
    if (parameter.factor_rank == 0) continue;
    const ParameterInfo& info = parameter.info;
    ReferencePowerSgd reference(info, parameter.factor_rank, replicas, plan.options.seed);
    reference.lambda = plan.options.lambda;
    reference.weight_decay = plan.options.weight_decay;
    reference.kept = plan.options.residual == Residual::kLocal ? Kept::kLocal : Kept::kAggregated;
    reference.W = initial_weight(info);
    for (Index step = 0; step < plan.steps; ++step) {
      std::vector<Dense> gradients;
      const int shares = plan.shares / replicas;
      for (int replica = 0; replica < replicas; ++replica)
        gradients.push_back(gradient_of(plan.gradient, info, step, replica * shares, shares));
      const Snapshot& snapshot = snapshots[static_cast<std::size_t>(step)];
      reference.step(gradients, step, plan.learning_rate, snapshot.report.clip_scale);
      ASSERT_LE(largest(snapshot.weights.at(info.name) - reference.W), weight_tolerance)
          << info.name << " at step " << step;
      ASSERT_LE(largest(snapshot.states[0].at(info.name + ".u") - reference.u), state_tolerance)
          << info.name << " at step " << step;
      for (int replica = 0; replica < replicas; ++replica)
        ASSERT_LE(largest(snapshot.states[static_cast<std::size_t>(replica)].at(info.name + ".e") -
                          reference.S[static_cast<std::size_t>(replica)]),
                  state_tolerance)
            << info.name << " at step " << step << ", replica " << replica;
    }
  }
}

TEST_P(PowerSgdOn, EqualsTheReferenceInDouble) {
  for (const Residual residual : {Residual::kLocal, Residual::kAggregated}) {
    RunPlan plan = plan_for(GetParam());
    plan.options.residual = residual;
    expect_equals_reference<double>(plan, 1e-11, 1e-10);
  }
}

TEST_P(PowerSgdOn, EqualsTheReferenceInFloat) {
  // e has the size of 10 gradients, and P follows mean B Q with its condition, some hundreds here.
  expect_equals_reference<float>(plan_for(GetParam()), 2e-5, 5e-4);
}

TEST_P(PowerSgdOn, EqualsTheReferenceWhenClippedAndRefilled) {
  RunPlan plan = plan_for(GetParam());
  plan.options.clip_norm = 3;
  plan.gradient = [](const ParameterInfo& info, Index step, int share, Index row, Index col) {
    if (step == 0 || (step == 1 && row >= 2)) return 0.0;
    return noisy_gradient(info, step, share, row, col);
  };
  expect_equals_reference<double>(plan, 1e-11, 1e-10);
}

// ---- Identities

// mean e_T = sum of mean G - sum of D, and the weights show D without momentum: W - W' = eta (D + u), u = D
// where lambda = 0. P^T mean e = 0, so <D, mean e> = 0. A skipped step keeps e, W and u.
TEST_P(PowerSgdOn, ErrorLosesExactlyWhatWasApplied) {
  for (const Residual residual : {Residual::kLocal, Residual::kAggregated}) {
    RunPlan plan = plan_for(GetParam());
    plan.steps = 8;
    plan.options.residual = residual;
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
      Dense mass(info.rows, info.cols);  // of all gradients
      Dense W = initial_weight(info);
      const Dense W_begin = W;
      for (Index step = 0; step < plan.steps; ++step) {
        const Snapshot& snapshot = snapshots[static_cast<std::size_t>(step)];
        if (step != 4) mass = mass + gradient_of(plan.gradient, info, step, 0, plan.shares);
        const Dense e = snapshot.mean(info.name + ".e");
        const Dense applied = (1 / (2 * plan.learning_rate)) * (W_begin - snapshot.weights.at(info.name));
        EXPECT_LE(largest(e + applied - mass), 1e-11) << info.name << " at step " << step;
        const Dense D = (1 / (2 * plan.learning_rate)) * (W - snapshot.weights.at(info.name));
        double dot = 0;
        for (std::size_t k = 0; k < D.a.size(); ++k) dot += D.a[k] * e.a[k];
        EXPECT_LE(std::abs(dot), 1e-10 * (1 + norm(D) * norm(e))) << info.name << " at step " << step;
        if (step == 4) {
          EXPECT_EQ(norm(D), 0) << info.name;
        }
        W = snapshot.weights.at(info.name);
      }
    }
  }
}

// D = mean S and nothing stays, when r = min(m, n).
TEST_P(PowerSgdOn, FullRankLeavesNoMeanError) {
  RunPlan plan = plan_for(GetParam());
  for (TestParameter& parameter : plan.parameters) {
    if (parameter.factor_rank > 0) parameter.factor_rank = std::min(parameter.info.rows, parameter.info.cols);
  }
  plan.steps = 4;
  for (const Snapshot& snapshot : run<double>(plan)) {
    for (const TestParameter& parameter : plan.parameters) {
      if (parameter.factor_rank == 0) continue;
      EXPECT_LE(largest(snapshot.mean(parameter.info.name + ".e")), 1e-11) << parameter.info.name;
    }
  }
}

// The norm is that of what was applied: |D|, and the mean gradient of the dense parameters.
TEST_P(PowerSgdOn, ClipsByTheNormOfWhatItApplies) {
  RunPlan plan = plan_for(GetParam());
  plan.options.weight_decay = 0;
  plan.options.lambda = 0;
  plan.options.clip_norm = 3;
  const Snapshot snapshot = run<double>(plan)[0];
  double squares = 0;
  double clipped_squares = 0;
  for (const TestParameter& parameter : plan.parameters) {
    const ParameterInfo& info = parameter.info;
    const Dense moved = initial_weight(info) - snapshot.weights.at(info.name);
    const Dense G = gradient_of(plan.gradient, info, 0, 0, plan.shares);
    if (parameter.factor_rank == 0) {
      squares += std::pow(norm(G), 2);
    } else {
      squares += std::pow(norm(G - snapshot.mean(info.name + ".e")), 2);
      clipped_squares += std::pow(norm(moved) / (2 * plan.learning_rate), 2);
      EXPECT_LE(largest((1 / (2 * plan.learning_rate)) * moved -
                        snapshot.report.clip_scale * (G - snapshot.mean(info.name + ".e"))),
                1e-11)
          << info.name;
    }
  }
  EXPECT_NEAR(snapshot.report.gradient_norm, std::sqrt(squares), 1e-12 * std::sqrt(squares));
  EXPECT_NEAR(snapshot.report.clip_scale, 3 / std::sqrt(squares), 1e-12);
  EXPECT_LT(clipped_squares, 9);
}

TEST_P(PowerSgdOn, LayoutDoesNotMatter) {
  RunPlan plan = plan_for(GetParam());
  plan.steps = 12;
  plan.options.clip_norm = 3;
  RunPlan alone = plan;
  alone.mesh = {1, 1, 1};
  const auto expected = run<double>(alone);
  const auto found = run<double>(plan);
  for (std::size_t step = 0; step < expected.size(); ++step) {
    for (const auto& [name, weight] : expected[step].weights)
      EXPECT_LE(largest(found[step].weights.at(name) - weight), 1e-10) << name << " at step " << step;
  }
}

TEST_P(PowerSgdOn, OneBadElementSkipsThatParameterEverywhere) {
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), 1e30}) {
    RunPlan plan = plan_for(GetParam());
    plan.steps = 5;
    const auto clean = run<float>(plan);
    plan.gradient = [bad](const ParameterInfo& info, Index step, int share, Index row, Index col) {
      const bool hit = step == 3 && share == 0 && row == info.rows - 1 && col == info.cols - 1;
      return hit && info.name == "gate" ? bad : noisy_gradient(info, step, share, row, col);
    };
    const auto hit = run<float>(plan);
    EXPECT_EQ(hit[3].report.skipped_matrices, 1);
    EXPECT_TRUE(same_bits(hit[3].weights.at("gate"), hit[2].weights.at("gate")));
    EXPECT_FALSE(same_bits(hit[4].weights.at("gate"), hit[3].weights.at("gate")));
    for (std::size_t replica = 0; replica < hit[3].states.size(); ++replica) {
      for (const char* name : {"gate.e", "gate.Q", "gate.u"})
        EXPECT_TRUE(same_bits(hit[3].states[replica].at(name), hit[2].states[replica].at(name))) << name;
    }
    for (const char* name : {"q", "o", "k", "up", "down", "row", "column", "norm", "embed"})
      EXPECT_TRUE(same_bits(hit[4].weights.at(name), clean[4].weights.at(name))) << name;
  }
}

TEST_P(PowerSgdOn, ZeroGradientsOnZeroStateChangeNothing) {
  RunPlan plan = plan_for(GetParam());
  plan.steps = 2;
  plan.options.weight_decay = 0;
  plan.gradient = [](const ParameterInfo&, Index, int, Index, Index) { return 0.0; };
  const auto snapshots = run<float>(plan);
  for (const TestParameter& parameter : plan.parameters)
    EXPECT_TRUE(same_bits(snapshots[1].weights.at(parameter.info.name), initial_weight(parameter.info)));
  EXPECT_EQ(snapshots[1].report.gradient_norm, 0);
}

INSTANTIATE_TEST_SUITE_P(Meshes, PowerSgdOn, testing::ValuesIn(kMeshes), mesh_name);

// N_R = 1: both forms coincide, D = P P^T S.
TEST(PowerSgd, ResidualsAreTheSameWithOneReplica) {
  RunPlan plan = plan_for({1, 2, 2});
  plan.steps = 5;
  const auto local = run<double>(plan);
  plan.options.residual = Residual::kAggregated;
  const auto aggregated = run<double>(plan);
  for (const auto& [name, weight] : local.back().weights)
    EXPECT_TRUE(same_bits(weight, aggregated.back().weights.at(name))) << name;
  for (const auto& [name, state] : local.back().states[0])
    EXPECT_TRUE(same_bits(state, aggregated.back().states[0].at(name))) << name;
}

TEST(PowerSgd, EveryOptionOfItsOwnMatters) {
  RunPlan plan = plan_for({2, 1, 1});
  plan.steps = 3;
  const Dense reference = run<double>(plan).back().weights.at("q");
  plan.options.lambda = 0.5;
  EXPECT_FALSE(same_bits(run<double>(plan).back().weights.at("q"), reference));
}

// ---- Matrices that travel dense

class ExchangeOn : public testing::TestWithParam<MeshShape> {};

/// By bytes beside a float32 matrix, in float32 for k, up, down, row and column; factors when equal.
bool expected_dense(ExchangeChoice choice, Index factor_element_bytes, const TestParameter& parameter) {
  if (parameter.factor_rank == 0 || choice == ExchangeChoice::kFactors) return false;
  const Index sides = parameter.info.rows + parameter.info.cols;
  return choice == ExchangeChoice::kDense ||
         parameter.factor_rank * sides * factor_element_bytes >= parameter.info.elements() * 4;
}

// A skipped step is among them. Tolerances as against the references.
TEST_P(ExchangeOn, ChangesWhatIsSentAndNothingElse) {
  for (const OptimizerKind kind : {OptimizerKind::kDion, OptimizerKind::kPowerSgd}) {
    for (const Residual residual : {Residual::kLocal, Residual::kAggregated}) {
      for (const double clip_norm : {0.0, 3.0}) {
        RunPlan plan = plan_for(GetParam(), kind);
        plan.steps = 8;
        plan.options.residual = residual;
        plan.options.clip_norm = clip_norm;
        plan.gradient = [](const ParameterInfo& info, Index step, int share, Index row, Index col) {
          if (step == 3 && share == 0 && info.name == "q" && row == 1 && col == 2)
            return std::numeric_limits<double>::quiet_NaN();
          if (step == 0 && info.name == "gate" && row >= 2) return 0.0;  // dead columns
          return noisy_gradient(info, step, share, row, col);
        };
        const auto factors = run<double>(plan);
        for (const ExchangeChoice choice : {ExchangeChoice::kAuto, ExchangeChoice::kDense}) {
          plan.options.exchange = choice;
          const auto found = run<double>(plan);
          for (std::size_t step = 0; step < found.size(); ++step) {
            for (const auto& [name, weight] : factors[step].weights)
              ASSERT_LE(largest(found[step].weights.at(name) - weight), 1e-10) << name << " at " << step;
            for (std::size_t replica = 0; replica < found[step].states.size(); ++replica) {
              for (const auto& [name, state] : factors[step].states[replica])
                ASSERT_LE(largest(found[step].states[replica].at(name) - state), 1e-9) << name;
            }
            EXPECT_EQ(found[step].report.dead_columns, factors[step].report.dead_columns);
            EXPECT_EQ(found[step].report.skipped_matrices, factors[step].report.skipped_matrices);
          }
        }
      }
    }
  }
}

TEST_P(ExchangeOn, CountsExactlyThePlannedBytes) {
  for (const OptimizerKind kind : {OptimizerKind::kDion, OptimizerKind::kPowerSgd, OptimizerKind::kAdamW}) {
    for (const ExchangeChoice choice :
         {ExchangeChoice::kFactors, ExchangeChoice::kAuto, ExchangeChoice::kDense}) {
      for (const auto& [clip_norm, wire] :
           {std::pair{0.0, FactorWire::kAsComputed}, std::pair{3.0, FactorWire::kAsComputed},
            std::pair{3.0, FactorWire::kBF16}}) {
        RunPlan plan = plan_for(GetParam(), kind);
        plan.options.exchange = choice;
        plan.options.clip_norm = clip_norm;
        plan.options.wire = wire;
        const Snapshot snapshot = run<float>(plan)[0];
        Index factor_bytes = 0;
        Index dense_bytes = 0;
        for (const TestParameter& parameter : plan.parameters) {
          const ParameterInfo& info = parameter.info;
          const bool factored = parameter.factor_rank > 0 && kind != OptimizerKind::kAdamW;
          const Index element_bytes = wire == FactorWire::kBF16 ? 2 : 4;
          const Index factor = factored && !expected_dense(choice, element_bytes, parameter)
                                   ? element_bytes * parameter.factor_rank * (info.rows + info.cols)
                                   : 0;
          const Index dense =
              factor > 0 ? 0 : 4 * info.elements() * (info.cut == TensorCut::kNone ? plan.mesh.tensor : 1);
          const auto counted = [&](const std::map<std::string, Index>& bytes) {
            return bytes.contains(info.name) ? bytes.at(info.name) : 0;
          };
          EXPECT_EQ(counted(snapshot.factor_bytes_of), factor) << info.name;
          EXPECT_EQ(counted(snapshot.dense_bytes_of), dense) << info.name;
          factor_bytes += factor;
          dense_bytes += dense;
        }
        EXPECT_EQ(snapshot.factor_bytes, factor_bytes);
        EXPECT_EQ(snapshot.planned_factor_bytes, factor_bytes);
        EXPECT_EQ(snapshot.dense_bytes, dense_bytes);
        EXPECT_EQ(snapshot.planned_dense_bytes, dense_bytes);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Meshes, ExchangeOn,
                         testing::Values(MeshShape{1, 1, 1}, MeshShape{2, 1, 1}, MeshShape{3, 1, 1},
                                         MeshShape{2, 2, 1}, MeshShape{2, 1, 2}, MeshShape{2, 2, 2}),
                         mesh_name);

}  // namespace
}  // namespace lowband
