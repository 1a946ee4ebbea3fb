// What every optimizer must do, whatever its mathematics.

#include "collectives/local/local_world.h"
#include "optimizers/planned_state.h"
#include "world_run.h"

#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>

#include <gtest/gtest.h>

namespace lowband {
namespace {

using namespace test;

struct Named {
  const char* name;
  OptimizerOptions options;
};

const Named kOptimizers[] = {
    {"Dion", {.kind = OptimizerKind::kDion}},
    {"DionBesideLion", {.kind = OptimizerKind::kDion, .scalar_optimizer = ElementwiseKind::kLion}},
    {"DionBesideSgd", {.kind = OptimizerKind::kDion, .scalar_optimizer = ElementwiseKind::kSgd}},
    {"PowerSgd", {.kind = OptimizerKind::kPowerSgd}},
    {"AdamW", {.kind = OptimizerKind::kAdamW}},
    {"Sgd", {.kind = OptimizerKind::kSgd}},
    {"SgdNesterov", {.kind = OptimizerKind::kSgd, .sgd_nesterov = true}},
    {"Lion", {.kind = OptimizerKind::kLion}},
    {"Muon", {.kind = OptimizerKind::kMuon}},
    {"NorMuon", {.kind = OptimizerKind::kNorMuon}},
    {"AcpSgd", {.kind = OptimizerKind::kAcpSgd}},
    {"Galore", {.kind = OptimizerKind::kGalore}},
    {"GaloreOften", {.kind = OptimizerKind::kGalore, .galore_scale = 0.5, .galore_interval = 3}},
    {"Spectra", {.kind = OptimizerKind::kSpectra, .spectra_fraction = 0.2}},
    {"SpectraTwice", {.kind = OptimizerKind::kSpectra, .spectra_fraction = 0.4, .spectra_iterations = 2}},
    {"MuonNesterov", {.kind = OptimizerKind::kMuon, .nesterov = true}},
    {"Dion2", {.kind = OptimizerKind::kDion2}},
    {"NorDion2", {.kind = OptimizerKind::kNorDion2}},
    {"SpecGd", {.kind = OptimizerKind::kSpecGd}},
    {"MuonBpOfPeriodOne", {.kind = OptimizerKind::kMuonBp}},
    {"MuonBp", {.kind = OptimizerKind::kMuonBp, .muonbp_period = 3, .muonbp_block_rate = 0.6}},
};

const MeshShape kMeshes[] = {{1, 1, 2}, {1, 2, 1}, {2, 1, 1}, {2, 2, 2}, {1, 3, 1}, {3, 1, 1}, {1, 2, 2}};

bool same_bits(const Dense& x, const Dense& y) {
  return x.a.size() == y.a.size() && std::memcmp(x.a.data(), y.a.data(), x.a.size() * sizeof(double)) == 0;
}

class EveryOptimizer : public testing::TestWithParam<Named> {
 protected:
  OptimizerOptions options() const {
    OptimizerOptions options = GetParam().options;
    options.weight_decay = 0.1;
    options.seed = 3;
    return options;
  }
  /// Also with blocks, but for what updates element by element.
  std::vector<TestParameter> parameters() const {
    std::vector<TestParameter> parameters = assorted_parameters();
    if (has_matrix_optimizer(options().kind))
      std::ranges::move(blocked_parameters(), std::back_inserter(parameters));
    return parameters;
  }
  RunPlan plan_for(const MeshShape& mesh) const {
    RunPlan plan;
    plan.mesh = mesh;
    plan.parameters = parameters();
    plan.options = options();
    plan.options.clip_norm = 0;
    plan.gradient = noisy_gradient;
    plan.shares = 12;
    plan.steps = 6;
    return plan;
  }
  /// The smallest mesh that must give what `mesh` gives.
  MeshShape equal_to(const MeshShape& mesh) const {
    const bool signs_blocks = options().kind == OptimizerKind::kMuonBp && options().muonbp_period > 1;
    return signs_blocks ? MeshShape{1, mesh.shard, mesh.tensor} : MeshShape{};
  }
};

// To the rounding of sums, which twenty steps of power iteration amplify: tolerance as for Dion's reference.
TEST_P(EveryOptimizer, DoesNotDependOnTheLayout) {
  for (const MeshShape& mesh : kMeshes) {
    const auto expected = run<double>(plan_for(equal_to(mesh)));
    const auto found = run<double>(plan_for(mesh));
    for (std::size_t step = 0; step < expected.size(); ++step) {
      for (const auto& [name, weight] : expected[step].weights)
        ASSERT_LE(largest(found[step].weights.at(name) - weight), 1e-10)
            << name << " at " << step << " on " << mesh.replica << mesh.shard << mesh.tensor;
    }
  }
}

TEST_P(EveryOptimizer, SendsWhatItPlans) {
  for (const MeshShape& mesh : kMeshes) {
    for (const Snapshot& snapshot : run<float>(plan_for(mesh))) {
      EXPECT_EQ(snapshot.factor_bytes, snapshot.planned_factor_bytes);
      EXPECT_EQ(snapshot.dense_bytes, snapshot.planned_dense_bytes);
      Index elements = 0;
      for (const TestParameter& parameter : plan_for(mesh).parameters)
        elements += parameter.info.elements() * (parameter.info.cut == TensorCut::kNone ? mesh.tensor : 1);
      if (!exchanges_factors(options().kind)) {
        EXPECT_EQ(snapshot.dense_bytes, 4 * elements);
      }
    }
  }
}

// Sums of 2 or 4 equal numbers are exact, and so are their means.
TEST_P(EveryOptimizer, EqualReplicasActAsOne) {
  const auto plan_of = [&](int replicas) {
    RunPlan plan = plan_for({.replica = replicas});
    plan.shares = replicas;
    plan.gradient = [](const ParameterInfo& info, Index step, int, Index row, Index col) {
      return noisy_gradient(info, step, 0, row, col);
    };
    return plan;
  };
  const auto expected = run<float>(plan_of(1));
  for (const int replicas : {2, 4}) {
    const auto found = run<float>(plan_of(replicas));
    for (std::size_t step = 0; step < expected.size(); ++step) {
      for (const auto& [name, weight] : expected[step].weights)
        ASSERT_TRUE(same_bits(found[step].weights.at(name), weight)) << name << " at " << step;
    }
  }
}

// A parameter with an unusable gradient keeps weight and state: as if that step had not been.
TEST_P(EveryOptimizer, LeavesAParameterWithAnUnusableGradientAlone) {
  const auto is_hit = [](const std::string& name) { return name == "gate" || name == "embed"; };
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), HUGE_VAL}) {
    for (const MeshShape& mesh : {MeshShape{2, 1, 1}, MeshShape{1, 2, 2}}) {
      RunPlan plan = plan_for(mesh);
      if (plan.options.muonbp_period > 1) plan.options.muonbp_period = 6;  // steps after the first are alike
      plan.gradient = [&](const ParameterInfo& info, Index step, int share, Index row, Index col) {
        if (step == 3 && share == 1 && is_hit(info.name) && row == 4 && col == 5) return bad;
        return noisy_gradient(info, step, share, row, col);
      };
      const auto hit = run<float>(plan);
      EXPECT_EQ(hit[3].report.skipped_matrices + hit[3].report.skipped_other, 2);
      EXPECT_EQ(hit[2].report.skipped_matrices + hit[4].report.skipped_other, 0);
      plan.gradient = [&](const ParameterInfo& info, Index step, int share, Index row, Index col) {
        return noisy_gradient(info, step + (is_hit(info.name) && step >= 3), share, row, col);
      };
      const auto without = run<float>(plan);
      for (const auto& [name, weight] : hit[3].weights) {
        ASSERT_TRUE(std::isfinite(largest(hit[5].weights.at(name)))) << name;
        // What travels next is another factor then.
        if (name == "gate" && exchange_follows_the_step(options().kind)) {
          EXPECT_TRUE(same_bits(weight, hit[2].weights.at(name)));
          continue;
        }
        const Dense& expected = is_hit(name) ? without[4].weights.at(name) : without[5].weights.at(name);
        EXPECT_TRUE(same_bits(hit[5].weights.at(name), expected)) << name;
        if (is_hit(name)) {
          EXPECT_TRUE(same_bits(weight, hit[2].weights.at(name))) << name;
        }
      }
    }
  }
}

TEST_P(EveryOptimizer, DoesNothingWithoutAGradient) {
  RunPlan plan = plan_for({2, 1, 2});
  plan.options.weight_decay = 0;
  plan.gradient = [](const ParameterInfo&, Index, int, Index, Index) { return 0.0; };
  for (const Snapshot& snapshot : run<float>(plan)) {
    EXPECT_EQ(snapshot.report.gradient_norm, 0);
    EXPECT_EQ(snapshot.report.skipped_matrices + snapshot.report.skipped_other, 0);
    for (const TestParameter& parameter : plan.parameters)
      EXPECT_TRUE(same_bits(snapshot.weights.at(parameter.info.name), initial_weight(parameter.info)))
          << parameter.info.name;
  }
}

// A process without a gradient, parameters without one for a while, and rows and columns without one.
TEST_P(EveryOptimizer, StandsPartsOfGradientsThatAreZero) {
  const auto plan_on = [&](const MeshShape& mesh) {
    RunPlan plan = plan_for(mesh);
    plan.shares = 2;
    plan.gradient = [](const ParameterInfo& info, Index step, int share, Index row, Index col) {
      const bool zero = (step == 0 && share == 0) || (step < 3 && info.name == "q") ||
                        (info.name == "gate" && row == 3) || (info.name == "up" && col == 2);
      return zero ? 0.0 : noisy_gradient(info, step, share, row, col);
    };
    return plan;
  };
  for (const MeshShape& mesh : {MeshShape{2, 1, 1}, MeshShape{1, 2, 2}, MeshShape{2, 1, 3}}) {
    const auto expected = run<double>(plan_on(equal_to(mesh)));
    const auto found = run<double>(plan_on(mesh));
    for (std::size_t step = 0; step < expected.size(); ++step) {
      for (const auto& [name, weight] : expected[step].weights) {
        ASSERT_TRUE(std::isfinite(largest(weight))) << name;
        ASSERT_LE(largest(found[step].weights.at(name) - weight), 1e-9) << name << " at " << step;
      }
    }
  }
}

// Two optimizers on one gradient sequence; the second takes over weights and state of the first half way.
TEST_P(EveryOptimizer, ContinuesFromItsStateBitByBit) {
  run_world(8, [&](Communicator& world) {
    ProcessMesh mesh(world, {2, 2, 2});
    const std::vector<TestParameter> tests = parameters();
    RankProfile profile{.name = "test", .matrices = {}, .factor_ranks = {}};
    for (const TestParameter& test : tests) add_ranks(profile, test);
    struct Model {
      std::vector<Buffer<float>> storage;
      std::vector<Parameter<float>> parameters;
    };
    const auto make_model = [&](float weight) {
      Model model;
      for (const TestParameter& test : tests) {
        const MatrixLayout layout(test.info.rows, test.info.cols, test.info.cut, 2, 2);
        const Index rows = layout.tensor_rows(mesh.position().tensor).size();
        const Index cols = layout.tensor_cols(mesh.position().tensor).size();
        model.storage.emplace_back(2 * rows * cols);
        model.parameters.push_back({test.info, model.storage.back().matrix(0, rows, cols),
                                    model.storage.back().matrix(rows * cols, rows, cols)});
        std::ranges::fill(model.parameters.back().weight.flat(), weight);
      }
      return model;
    };
    const auto set_gradients = [&](Model& model, Index step) {
      for (Parameter<float>& parameter : model.parameters) {
        for (Index i = 0; i < parameter.gradient.rows; ++i) {
          for (Index j = 0; j < parameter.gradient.cols; ++j)
            parameter.gradient(i, j) =
                static_cast<float>(noisy_gradient(parameter.info, step, world.process() / 2, i, j));
        }
      }
    };
    const auto step_of = [](Index step) {
      return StepInfo{.step = step, .learning_rate = 0.02, .scalar_learning_rate = 0.01};
    };

    Model first = make_model(0.5f);
    ShardedOptimizer<float> uninterrupted(mesh, first.parameters, profile, options());
    for (Index step = 0; step < 3; ++step) {
      set_gradients(first, step);
      uninterrupted.step(step_of(step));
    }
    Model second = make_model(-1.0f);
    ShardedOptimizer<float> resumed(mesh, second.parameters, profile, options());
    const auto from = uninterrupted.state();
    const auto to = resumed.state();
    ASSERT_EQ(from.size(), to.size());
    for (std::size_t i = 0; i < from.size(); ++i) {
      ASSERT_EQ(from[i].name, to[i].name);
      std::ranges::copy(from[i].value.flat(), to[i].value.flat().begin());
    }
    for (std::size_t i = 0; i < tests.size(); ++i)
      std::ranges::copy(first.parameters[i].weight.flat(), second.parameters[i].weight.flat().begin());
    for (Index step = 3; step < 6; ++step) {
      set_gradients(first, step);
      uninterrupted.step(step_of(step));
      set_gradients(second, step);
      resumed.step(step_of(step));
    }
    for (std::size_t i = 0; i < tests.size(); ++i)
      EXPECT_TRUE(std::ranges::equal(first.parameters[i].weight.flat(), second.parameters[i].weight.flat()))
          << tests[i].info.name;
  });
}

// On every process, from the shapes alone.
TEST_P(EveryOptimizer, KeepsTheStateThatIsPlanned) {
  for (const MeshShape& mesh : kMeshes) {
    run_world(mesh.processes(), [&](Communicator& world) {
      ProcessMesh processes(world, mesh);
      RankProfile profile{.name = "test", .matrices = {}, .factor_ranks = {}};
      std::vector<Buffer<float>> storage;
      std::vector<Parameter<float>> parameters;
      std::map<std::string, Index> planned;
      for (const TestParameter& test : this->parameters()) {
        const ParameterInfo& info = test.info;
        const MatrixLayout layout(info.rows, info.cols, info.cut, mesh.tensor, mesh.shard);
        const Index rows = layout.tensor_rows(processes.position().tensor).size();
        const Index cols = layout.tensor_cols(processes.position().tensor).size();
        storage.emplace_back(2 * rows * cols);
        parameters.push_back(
            {info, storage.back().matrix(0, rows, cols), storage.back().matrix(rows * cols, rows, cols)});
        RankProfile ranks{.name = "test", .matrices = {}, .factor_ranks = {}};
        add_ranks(ranks, test);
        add_ranks(profile, test);
        planned[info.name] =
            planned_state_elements(info, ranks.factor_ranks, mesh, processes.position(), options());
      }
      ShardedOptimizer<float> optimizer(processes, parameters, profile, options());
      std::map<std::string, Index> found;
      for (const auto& [name, elements] : planned) found[name] = 0;
      for (const StateTensor<float>& tensor : optimizer.state())
        found[tensor.name.substr(0, tensor.name.rfind('.'))] += tensor.value.elements();
      EXPECT_EQ(found, planned) << "process " << world.process() << " of " << mesh.replica << mesh.shard
                                << mesh.tensor;
    });
  }
}

INSTANTIATE_TEST_SUITE_P(Optimizers, EveryOptimizer, testing::ValuesIn(kOptimizers),
                         [](const auto& parameter) { return std::string(parameter.param.name); });

}  // namespace
}  // namespace lowband
