#include "runtime/random.h"
#include "world_run.h"

#include <cmath>
#include <cstring>
#include <limits>

#include <gtest/gtest.h>

namespace lowband {
namespace {

using namespace test;

/// Names a mesh in a test's name: "D2F1T2".
std::string mesh_name(const testing::TestParamInfo<MeshShape>& mesh) {
  return cat("D", mesh.param.replica, "F", mesh.param.shard, "T", mesh.param.tensor);
}

const MeshShape kMeshes[] = {{1, 1, 1}, {1, 1, 2}, {1, 2, 1}, {2, 1, 1}, {2, 1, 2}, {2, 2, 1}, {2, 2, 2},
                             {1, 3, 1}, {3, 1, 1}, {1, 1, 3}, {1, 2, 2}, {7, 1, 1}, {1, 7, 1}};

RunPlan assorted_plan(const MeshShape& mesh) {
  RunPlan plan;
  plan.mesh = mesh;
  plan.parameters = assorted_parameters();
  plan.options = {.weight_decay = 0.1, .clip_norm = 0, .seed = 3};
  plan.gradient = noisy_gradient;
  plan.shares = mesh.replica * mesh.shard == 7 ? 7 : 12;  // a multiple of replica x shard
  return plan;
}

TestParameter matrix(const std::string& name, Index rows, Index cols, Index rank) {
  return {{.name = name, .role = Role::kQuery, .rows = rows, .cols = cols, .cut = TensorCut::kRows}, rank};
}

bool same_bits(const Dense& x, const Dense& y) {
  return std::memcmp(x.a.data(), y.a.data(), x.a.size() * sizeof(double)) == 0;
}

// ---- Against the published algorithm
// -------------------------------------------------------------------------

class DionOn : public testing::TestWithParam<MeshShape> {};

/// Errors of W and M over 20 steps against ReferenceDion fed with the same gradients.
template <class Real>
void expect_equals_reference(RunPlan plan, double weight_tolerance, double momentum_tolerance) {
  plan.steps = 20;
  const auto snapshots = run<Real>(plan);
  const int replicas = plan.mesh.replica;
  for (const TestParameter& parameter : plan.parameters) {
    if (parameter.factor_rank == 0) continue;
    const ParameterInfo& info = parameter.info;
    ReferenceDion reference(info, parameter.factor_rank, replicas, plan.options.seed);
    reference.mu = plan.options.mu;
    reference.weight_decay = plan.options.weight_decay;
    reference.kept = plan.options.residual == Residual::kLocal ? Kept::kLocal : Kept::kAggregated;
    reference.W = initial_weight(info);
    for (Index step = 0; step < plan.steps; ++step) {
      std::vector<Dense> gradients;
      const int shares = plan.shares / replicas;
      for (int replica = 0; replica < replicas; ++replica)
        gradients.push_back(gradient_of(plan.gradient, info, step, replica * shares, shares));
      reference.step(gradients, step, plan.learning_rate);

      const Snapshot& snapshot = snapshots[static_cast<std::size_t>(step)];
      ASSERT_LE(largest(snapshot.weights.at(info.name) - reference.W), weight_tolerance)
          << info.name << " at step " << step;
      for (int replica = 0; replica < replicas; ++replica)
        ASSERT_LE(largest(snapshot.states[static_cast<std::size_t>(replica)].at(info.name + ".M") -
                          reference.S[static_cast<std::size_t>(replica)]),
                  momentum_tolerance)
            << info.name << " at step " << step << ", replica " << replica;
    }
  }
}

TEST_P(DionOn, EqualsTheReferenceInDouble) {
  for (const Residual residual : {Residual::kLocal, Residual::kAggregated}) {
    RunPlan plan = assorted_plan(GetParam());
    plan.options.residual = residual;
    expect_equals_reference<double>(plan, 1e-12, 1e-10);
  }
}

TEST_P(DionOn, EqualsTheReferenceInFloat) {
  for (const Residual residual : {Residual::kLocal, Residual::kAggregated}) {
    RunPlan plan = assorted_plan(GetParam());
    plan.options.residual = residual;
    expect_equals_reference<float>(plan, 5e-7, 2e-5);
  }
}

// ---- Layouts
// ---------------------------------------------------------------------------------------------------

template <class Real>
void expect_same_weights(const RunPlan& plan, double tolerance) {
  RunPlan alone = plan;
  alone.mesh = {1, 1, 1};
  const auto expected = run<Real>(alone);
  const auto found = run<Real>(plan);
  for (std::size_t step = 0; step < expected.size(); ++step) {
    for (const auto& [name, weight] : expected[step].weights)
      EXPECT_LE(largest(found[step].weights.at(name) - weight), tolerance) << name << " at step " << step;
    EXPECT_NEAR(found[step].report.gradient_norm, expected[step].report.gradient_norm,
                tolerance * expected[step].report.gradient_norm * 10);
  }
}

TEST_P(DionOn, LayoutDoesNotMatterInDouble) {
  RunPlan plan = assorted_plan(GetParam());
  plan.steps = 20;
  plan.options.clip_norm = 3;
  expect_same_weights<double>(plan, 1e-10);
}

// One step of size eta |P Q^T| <= 0.02 sqrt(r m/n), from gradients whose sums differ by some ulps.
TEST_P(DionOn, LayoutDoesNotMatterForAStepInFloat) {
  RunPlan plan = assorted_plan(GetParam());
  plan.options.clip_norm = 3;
  expect_same_weights<float>(plan, 2e-7);
}

// ---- Bytes
// -----------------------------------------------------------------------------------------------------

TEST_P(DionOn, CountsExactlyThePlannedBytes) {
  RunPlan plan = assorted_plan(GetParam());
  plan.steps = 3;
  plan.gradient = [](const ParameterInfo& info, Index step, int share, Index row, Index col) {
    if (step == 1 && info.name == "q")
      return std::numeric_limits<double>::quiet_NaN();  // a skip sends as much
    if (step == 2) return 0.0;
    return noisy_gradient(info, step, share, row, col);
  };
  const auto snapshots = run<float>(plan);
  for (const Snapshot& snapshot : snapshots) {
    Index factor_elements = 0;
    Index dense_elements = 0;
    for (const TestParameter& parameter : plan.parameters) {
      const ParameterInfo& info = parameter.info;
      if (parameter.factor_rank > 0) {
        const Index elements = parameter.factor_rank * (info.rows + info.cols);
        EXPECT_EQ(snapshot.factor_bytes_of.at(info.name), 4 * elements) << info.name;
        EXPECT_FALSE(snapshot.dense_bytes_of.contains(info.name)) << info.name;
        factor_elements += elements;
      } else {
        // What the tensor axis does not cut is sent by each of its processes.
        const Index elements = info.elements() * (info.cut == TensorCut::kNone ? plan.mesh.tensor : 1);
        EXPECT_EQ(snapshot.dense_bytes_of.at(info.name), 4 * elements) << info.name;
        dense_elements += elements;
      }
    }
    EXPECT_EQ(snapshot.factor_bytes, 4 * factor_elements);
    EXPECT_EQ(snapshot.planned_factor_bytes, 4 * factor_elements);
    EXPECT_EQ(snapshot.dense_bytes, 4 * dense_elements);
    EXPECT_EQ(snapshot.planned_dense_bytes, 4 * dense_elements);
    EXPECT_EQ(snapshot.calls, snapshots[0].calls) << "the list of collectives depends on gradient values";
  }
}

// ---- Conservation
// ----------------------------------------------------------------------------------------------

// mean M_T = sum of mean G - (1 - mu) sum P R^T, step by step: with B = M + G, what is missing from M_new is
// `sent` = P R^T = P P^T B, and the weights show U = P Q^T. Then <U, sent> = <U, B> since P^T P = I, and
// |M_new|^2 = |B|^2 - (1 - mu^2) |R|^2. A skipped step changes neither M nor W.
TEST_P(DionOn, MomentumLosesExactlyWhatWasSent) {
  for (const Residual residual : {Residual::kLocal, Residual::kAggregated}) {
    RunPlan plan = assorted_plan(GetParam());
    plan.steps = 12;
    plan.options.residual = residual;
    plan.options.weight_decay = 0;
    plan.gradient = [](const ParameterInfo& info, Index step, int share, Index row, Index col) {
      if (step == 4 && share == 0 && row == 0 && col == 0) return std::numeric_limits<double>::infinity();
      return noisy_gradient(info, step, share, row, col);
    };
    const auto snapshots = run<double>(plan);
    for (const TestParameter& parameter : plan.parameters) {
      if (parameter.factor_rank == 0) continue;
      const ParameterInfo& info = parameter.info;
      Dense M(info.rows, info.cols);
      Dense W = initial_weight(info);
      for (Index step = 0; step < plan.steps; ++step) {
        const Snapshot& snapshot = snapshots[static_cast<std::size_t>(step)];
        const Dense M_new = snapshot.mean(info.name + ".M");
        if (step == 4) {
          EXPECT_TRUE(same_bits(snapshot.weights.at(info.name), W));
          EXPECT_LE(largest(M_new - M), 1e-15) << info.name;
          continue;
        }
        const Dense B = M + gradient_of(plan.gradient, info, step, 0, plan.shares);
        const Dense sent = (1 / (1 - plan.options.mu)) * (B - M_new);
        const double scale =
            plan.learning_rate * std::sqrt(static_cast<double>(info.rows) / static_cast<double>(info.cols));
        const Dense U = (1 / scale) * (W - snapshot.weights.at(info.name));
        double u_sent = 0;
        double u_b = 0;
        for (std::size_t k = 0; k < B.a.size(); ++k) {
          u_sent += U.a[k] * sent.a[k];
          u_b += U.a[k] * B.a[k];
        }
        EXPECT_NEAR(u_sent, u_b, 1e-9 * std::abs(u_b)) << info.name << " at step " << step;
        EXPECT_NEAR(norm(U), std::sqrt(static_cast<double>(parameter.factor_rank)), 1e-6) << info.name;
        EXPECT_NEAR(std::pow(norm(M_new), 2),
                    std::pow(norm(B), 2) - (1 - std::pow(plan.options.mu, 2)) * std::pow(norm(sent), 2),
                    1e-10 * std::pow(norm(B), 2))
            << info.name << " at step " << step;
        M = M_new;
        W = snapshot.weights.at(info.name);
      }
    }
  }
}

TEST_P(DionOn, FullRankLeavesMuTimesTheMomentum) {
  RunPlan plan = assorted_plan(GetParam());
  for (TestParameter& parameter : plan.parameters) {
    if (parameter.factor_rank > 0) parameter.factor_rank = std::min(parameter.info.rows, parameter.info.cols);
  }
  plan.steps = 5;
  const auto snapshots = run<double>(plan);
  for (const TestParameter& parameter : plan.parameters) {
    if (parameter.factor_rank == 0) continue;
    Dense M(parameter.info.rows, parameter.info.cols);
    for (Index step = 0; step < plan.steps; ++step) {
      M = plan.options.mu * (M + gradient_of(plan.gradient, parameter.info, step, 0, plan.shares));
      EXPECT_LE(largest(snapshots[static_cast<std::size_t>(step)].mean(parameter.info.name + ".M") - M),
                1e-11)
          << parameter.info.name << " at step " << step;
    }
  }
}

// ---- Failures of one process
// ------------------------------------------------------------------------------------

TEST_P(DionOn, OneBadElementSkipsThatParameterEverywhere) {
  for (const double bad :
       {std::numeric_limits<double>::quiet_NaN(), -std::numeric_limits<double>::infinity(), 1e30}) {
    RunPlan plan = assorted_plan(GetParam());
    plan.steps = 6;
    const auto clean = run<float>(plan);
    plan.gradient = [bad](const ParameterInfo& info, Index step, int share, Index row, Index col) {
      const bool hit = step == 3 && share == 0 && row == info.rows - 1 && col == info.cols - 1;
      if (hit && (info.name == "gate" || info.name == "embed")) return bad;
      return noisy_gradient(info, step, share, row, col);
    };
    const auto hit = run<float>(plan);
    EXPECT_EQ(hit[3].report.skipped_matrices, 1);
    EXPECT_EQ(hit[3].report.skipped_other, 1);
    EXPECT_EQ(hit[2].report.skipped_matrices + hit[4].report.skipped_matrices, 0);
    for (const char* name : {"gate", "embed"})
      EXPECT_TRUE(same_bits(hit[3].weights.at(name), hit[2].weights.at(name)));
    EXPECT_FALSE(same_bits(hit[4].weights.at("gate"), hit[3].weights.at("gate")));
    for (std::size_t replica = 0; replica < hit[3].states.size(); ++replica) {
      for (const char* name : {"gate.M", "gate.Q"})
        EXPECT_TRUE(same_bits(hit[3].states[replica].at(name), hit[2].states[replica].at(name))) << name;
      EXPECT_EQ(hit[5].states[replica].at("embed.t")(0, 0), 5);  // bias correction counts updates
      EXPECT_EQ(hit[5].states[replica].at("norm.t")(0, 0), 6);
    }
    // Nobody else noticed.
    for (const char* name : {"q", "o", "k", "up", "down", "row", "column", "norm"})
      EXPECT_TRUE(same_bits(hit[5].weights.at(name), clean[5].weights.at(name))) << name;
  }
}

TEST_P(DionOn, AZeroGradientOnOneProcessDoesNotActAlone) {
  RunPlan plan = assorted_plan(GetParam());
  plan.steps = 3;
  const int shares = plan.shares / (plan.mesh.replica * plan.mesh.shard);
  plan.gradient = [shares](const ParameterInfo& info, Index step, int share, Index row, Index col) {
    if (share < shares && step == 0) return 0.0;
    return noisy_gradient(info, step, share, row, col);
  };
  // That replicas agree bit by bit is checked after every step of every run.
  expect_equals_reference<double>(plan, 1e-12, 1e-10);
}

// Every column dead at step 0, all but two at step 1, none from step 2 on: refilled columns enter the
// weights, so every process has to have drawn its own rows of the same vectors.
TEST_P(DionOn, RefilledColumnsAreTheReferencesOnEveryLayout) {
  RunPlan plan = assorted_plan(GetParam());
  plan.gradient = [](const ParameterInfo& info, Index step, int share, Index row, Index col) {
    if (step == 0 || (step == 1 && row >= 2)) return 0.0;
    return noisy_gradient(info, step, share, row, col);
  };
  expect_equals_reference<double>(plan, 1e-12, 1e-10);
}

TEST_P(DionOn, ZeroGradientsOnZeroStateChangeNothing) {
  RunPlan plan = assorted_plan(GetParam());
  plan.steps = 2;
  plan.options.weight_decay = 0;
  plan.gradient = [](const ParameterInfo&, Index, int, Index, Index) { return 0.0; };
  const auto snapshots = run<float>(plan);
  Index columns = 0;
  for (const TestParameter& parameter : plan.parameters) {
    columns += parameter.factor_rank;
    EXPECT_TRUE(same_bits(snapshots[1].weights.at(parameter.info.name), initial_weight(parameter.info)));
  }
  EXPECT_EQ(snapshots[1].report.dead_columns, columns);
  EXPECT_EQ(snapshots[1].report.gradient_norm, 0);
  EXPECT_EQ(snapshots[1].report.clip_scale, 1);
}

INSTANTIATE_TEST_SUITE_P(Meshes, DionOn, testing::ValuesIn(kMeshes), mesh_name);

// ---- Dead columns
// -----------------------------------------------------------------------------------------------

double plain_noise(const ParameterInfo& info, Index step, Index row, Index col) {
  return RandomStream(31, info.name, step).normal(row * 65536 + col);
}

TEST(Dion, DeadColumnsAreRefilledAndLiveOnceThereIsSomethingToCapture) {
  RunPlan plan;
  plan.mesh = {2, 1, 1};
  plan.parameters = {matrix("a", 64, 48, 32)};
  plan.options = {.weight_decay = 0, .clip_norm = 0};
  plan.shares = 2;
  plan.steps = 8;
  plan.gradient = [](const ParameterInfo& info, Index step, int share, Index row, Index col) {
    return step < 5 && row >= 20 ? 0.0 : plain_noise(info, step + 100 * share, row, col);
  };
  const auto snapshots = run<float>(plan);
  Dense before = initial_weight(plan.parameters[0].info);
  for (std::size_t step = 0; step < snapshots.size(); ++step) {
    const Index live = step < 5 ? 20 : 32;
    EXPECT_EQ(snapshots[step].report.dead_columns, 32 - live) << step;
    const Dense& after = snapshots[step].weights.at("a");
    const double expected = plan.learning_rate * std::sqrt(64.0 / 48.0 * static_cast<double>(live));
    EXPECT_NEAR(norm(after - before), expected, 1e-4 * expected) << step;
    before = after;
  }
}

TEST(Dion, RankAboveTheNumericalRankOfTheMomentumIsNotMadeUp) {
  RunPlan plan;
  plan.parameters = {matrix("a", 96, 64, 32), matrix("b", 64, 96, 32)};
  plan.options = {.weight_decay = 0, .clip_norm = 0};
  plan.steps = 3;
  plan.shares = 2;
  // Rank 8, the same space at every step, rounded to float
  plan.gradient = [](const ParameterInfo& info, Index step, int, Index row, Index col) {
    double sum = 0;
    for (Index k = 0; k < 8; ++k)
      sum += RandomStream(1, info.name).normal(row * 8 + k) * RandomStream(2, info.name).normal(col * 8 + k) *
             (1 + 0.1 * static_cast<double>(step * k));
    return sum;
  };
  for (const MeshShape mesh : {MeshShape{1, 1, 1}, MeshShape{1, 2, 2}}) {
    plan.mesh = mesh;
    for (const Snapshot& snapshot : run<float>(plan)) EXPECT_EQ(snapshot.report.dead_columns, 2 * 24);
  }
}

TEST(Dion, EqualLayersAtRankOneDoNotShareANorm) {
  RunPlan plan;
  plan.options = {.clip_norm = 0};
  plan.steps = 4;
  plan.gradient = [](const ParameterInfo&, Index step, int, Index row, Index col) {
    return RandomStream(5, "same", step).normal(row * 64 + col);
  };
  plan.parameters = {matrix("0", 20, 12, 1)};
  const auto alone = run<double>(plan);
  plan.parameters = {matrix("0", 20, 12, 1), matrix("1", 20, 12, 1), matrix("2", 20, 12, 1),
                     matrix("3", 20, 12, 1), matrix("4", 20, 12, 1)};
  const auto together = run<double>(plan);
  for (std::size_t step = 0; step < alone.size(); ++step)
    EXPECT_TRUE(same_bits(alone[step].weights.at("0"), together[step].weights.at("0")));
}

// ---- Scale and order
// ----------------------------------------------------------------------------------------------

// Exact in float although 1e-8 is added to the norms of columns: it is less than half an ulp of any norm
// above 1/4, and the gradients here keep the norms above that.
TEST(Dion, PowersOfTwoOnTheGradientsChangeNoBitOfTheWeights) {
  RunPlan plan = assorted_plan({2, 1, 2});
  plan.parameters = {matrix("a", 24, 16, 5), matrix("b", 16, 31, 7)};
  plan.steps = 50;
  const auto reference = run<float>(plan);
  for (const int exponent : {10, 20, 40}) {
    plan.gradient = [exponent](const ParameterInfo& info, Index step, int share, Index row, Index col) {
      return std::ldexp(noisy_gradient(info, step, share, row, col), exponent);
    };
    const auto scaled = run<float>(plan);
    for (const char* name : {"a", "b"})
      EXPECT_TRUE(same_bits(scaled.back().weights.at(name), reference.back().weights.at(name))) << exponent;
  }
}

TEST(Dion, OrderOfParametersChangesNothing) {
  RunPlan plan = assorted_plan({2, 2, 1});
  plan.steps = 2;
  const auto reference = run<double>(plan);
  std::ranges::reverse(plan.parameters);
  const auto reversed = run<double>(plan);
  for (const TestParameter& parameter : plan.parameters)
    EXPECT_TRUE(
        same_bits(reference[1].weights.at(parameter.info.name), reversed[1].weights.at(parameter.info.name)))
        << parameter.info.name;
}

TEST(Dion, RefusesWhatItCannotDo) {
  RunPlan plan = assorted_plan({1, 1, 2});
  const auto message = [&](const RunPlan& bad) -> std::string {
    try {
      run<float>(bad);
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return "nothing thrown";
  };
  RunPlan bad = plan;
  bad.parameters[1].factor_rank = 17;
  EXPECT_NE(message(bad).find("factor rank of q: found 17, expected 1 .. min(24, 16)"), std::string::npos)
      << message(bad);
  bad = plan;
  bad.parameters[1].factor_rank = 0;
  EXPECT_NE(message(bad).find("found no rank for q"), std::string::npos) << message(bad);
  bad = plan;
  bad.parameters[0].factor_rank = 4;
  EXPECT_NE(message(bad).find("found a rank for embed"), std::string::npos) << message(bad);
  bad = plan;
  bad.parameters[1].info.cut = TensorCut::kNone;
  EXPECT_NE(message(bad).find("q is not cut along the tensor axis"), std::string::npos) << message(bad);
}

}  // namespace
}  // namespace lowband
