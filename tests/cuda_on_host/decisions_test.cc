// What a step decides on a device: what is left alone, which columns are drawn again, what is an error.
#include "collectives/local/local_world.h"
#include "optimizers/sharded_optimizer.h"
#include "runtime/copy.h"
#include "runtime/passes.h"
#include "tests/cuda_on_host/waits.h"
#include "tests/optimizers/world_run.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband::test {
namespace {

struct Case {
  std::string name;
  OptimizerOptions options;
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

std::vector<Case> cases() {
  std::vector<Case> list;
  const auto add = [&](std::string name, OptimizerKind kind, auto set) {
    OptimizerOptions options;
    options.kind = kind;
    options.weight_decay = 0.1;
    set(options);
    list.push_back({std::move(name), options});
  };
  const auto plain = [](OptimizerOptions&) {};
  const auto clipped = [](OptimizerOptions& o) { o.clip_norm = 0.5; };
  add("adamw", OptimizerKind::kAdamW, plain);
  add("adamw_clipped", OptimizerKind::kAdamW, clipped);
  add("lion_clipped", OptimizerKind::kLion, clipped);
  add("sgd_clipped", OptimizerKind::kSgd, clipped);
  add("muon", OptimizerKind::kMuon, plain);
  add("muon_polar_express_clipped", OptimizerKind::kMuon, [&](OptimizerOptions& o) {
    clipped(o);
    o.sign = SignPolynomial::kPolarExpress5;
  });
  add("muonbp", OptimizerKind::kMuonBp, plain);
  add("dion", OptimizerKind::kDion, plain);
  add("dion_clipped", OptimizerKind::kDion, clipped);
  add("dion_true_norm_aggregated", OptimizerKind::kDion, [&](OptimizerOptions& o) {
    clipped(o);
    o.clip_estimator = NormEstimator::kTrueNorm;
    o.residual = Residual::kAggregated;
  });
  add("power_sgd_clipped", OptimizerKind::kPowerSgd, clipped);
  return list;
}

/// One process with the assorted parameters, on a device or the host.
class Model {
 public:
  Model(Communicator& world, const OptimizerOptions& options, Device* device)
      : mesh_((world.set_device(device), world), {}) {
    const std::vector<TestParameter> tests = assorted_parameters();
    RankProfile profile{.name = "test", .matrices = {}, .factor_ranks = {}};
    for (const TestParameter& test : tests) {
      add_ranks(profile, test);
      const Index rows = test.info.rows, cols = test.info.cols;
      weights_.emplace_back(rows * cols, device);
      gradients_.emplace_back(rows * cols, device);
      parameters_.push_back(
          {test.info, weights_.back().matrix(0, rows, cols), gradients_.back().matrix(0, rows, cols)});
      const Dense initial = initial_weight(test.info);
      write(initial.a, parameters_.back().weight);
    }
    optimizer_.emplace(mesh_, parameters_, profile, options);
  }

  /// Of this step; element 0 of the parameters in `unusable` is `spoiled`.
  void set_gradients(Index step, const std::vector<Index>& unusable = {}, double spoiled = 0) {
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      Dense g = gradient_of(noisy_gradient, parameters_[i].info, step, 0, 1);
      if (std::ranges::count(unusable, static_cast<Index>(i)) > 0) g.a.front() = spoiled;
      write(g.a, parameters_[i].gradient);
    }
  }
  void set_gradients_of_rank_one() {
    for (const Parameter<float>& parameter : parameters_) {
      const Index rows = parameter.info.rows, cols = parameter.info.cols;
      std::vector<double> values;
      for (Index k = 0; k < rows * cols; ++k)
        values.push_back(static_cast<double>((1 + k / cols % 5) * (1 + k % cols % 3)));
      write(values, parameter.gradient);
    }
  }
  /// The matrix whose M now holds a NaN.
  std::string spoil_a_momentum() {
    const StateTensor<float> momentum = optimizer_->state().front();
    fill<float>(std::numeric_limits<float>::quiet_NaN(), momentum.value.block(0, 1, 0, 1));
    return momentum.name.substr(0, momentum.name.rfind('.'));
  }
  PendingReport step(Index step) {
    return optimizer_->step({.step = step, .learning_rate = 0.02, .scalar_learning_rate = 0.01});
  }
  /// Of weights and states, by name.
  std::map<std::string, std::vector<float>> read() {
    std::map<std::string, std::vector<float>> values;
    const auto take = [&](const std::string& name, MatrixView<const float> view) {
      const OnHost<float> here(view);
      for (Index i = 0; i < view.rows; ++i) {
        const float* const row = here.view().row(i);
        values[name].insert(values[name].end(), row, row + view.cols);
      }
    };
    for (const Parameter<float>& parameter : parameters_) take(parameter.info.name, parameter.weight);
    for (const StateTensor<float>& state : optimizer_->state()) take(state.name, state.value);
    return values;
  }
  const std::string& name(Index i) const { return parameters_[static_cast<std::size_t>(i)].info.name; }
  Index parameters() const { return static_cast<Index>(parameters_.size()); }

 private:
  static void write(const std::vector<double>& values, MatrixView<float> to) {
    Buffer<float> here(to.elements());
    for (Index k = 0; k < here.size(); ++k) here[k] = static_cast<float>(values[static_cast<std::size_t>(k)]);
    copy<float>(here.matrix(0, to.rows, to.cols), to);
  }

  ProcessMesh mesh_;
  std::vector<Buffer<float>> weights_, gradients_;
  std::vector<Parameter<float>> parameters_;
  std::optional<ShardedOptimizer<float>> optimizer_;
};

class DecidedOnDeviceBy : public testing::TestWithParam<Case> {};

// Weight decay included: nothing of a parameter moves whose gradient is unusable; of the others what moves on
// the host.
TEST_P(DecidedOnDeviceBy, WhatIsSkippedStaysBitByBit) {
  for (const double spoiled : {std::numeric_limits<double>::quiet_NaN(), 1e20}) {
    std::map<std::string, std::vector<float>> ends[2];
    for (const bool on_device : {false, true}) {
      run_world(1, [&](Communicator& world) {
        const std::unique_ptr<Device> device = on_device ? open_device() : nullptr;
        Model model(world, GetParam().options, device.get());
        model.set_gradients(0);
        model.step(0);
        const auto before = model.read();
        const std::vector<Index> unusable{0, 2, model.parameters() - 1};
        model.set_gradients(1, unusable, spoiled);
        model.step(1);
        const auto after = model.read();
        for (const auto& [name, values] : after) {
          Index owner = -1;
          for (Index i = 0; i < model.parameters(); ++i) {
            if (name == model.name(i) || name.starts_with(model.name(i) + ".")) owner = i;
          }
          ASSERT_GE(owner, 0) << name;
          bool same = true;
          for (std::size_t k = 0; k < values.size(); ++k)
            same = same && std::bit_cast<std::uint32_t>(values[k]) ==
                               std::bit_cast<std::uint32_t>(before.at(name)[k]);
          EXPECT_EQ(same, std::ranges::count(unusable, owner) == 1) << name;
        }
        model.set_gradients(2);
        model.step(2);
        ends[on_device] = model.read();
      });
    }
    for (const auto& [name, values] : ends[0]) {
      for (std::size_t k = 0; k < values.size(); ++k)
        ASSERT_NEAR(ends[1].at(name)[k], values[k], 37 * 0x1p-24 * 300) << name << " " << k;
    }
  }
}

// A gradient of rank one leaves all columns but the first dead, of which the device draws new ones.
TEST(DecidedOnDevice, DeadColumnsAreRedrawnAsOnTheHost) {
  OptimizerOptions options;
  options.kind = OptimizerKind::kDion;
  std::map<std::string, std::vector<float>> ends[2];
  for (const bool on_device : {false, true}) {
    run_world(1, [&](Communicator& world) {
      const std::unique_ptr<Device> device = on_device ? open_device() : nullptr;
      Model model(world, options, device.get());
      model.set_gradients_of_rank_one();
      const long before = cuda_on_host::host_waits();
      PendingReport report = model.step(0);
      EXPECT_EQ(cuda_on_host::host_waits() - before, 0);
      EXPECT_GT(report.get().dead_columns, 10);
      ends[on_device] = model.read();
    });
  }
  for (const auto& [name, values] : ends[0]) {
    for (std::size_t k = 0; k < values.size(); ++k)
      ASSERT_NEAR(ends[1].at(name)[k], values[k], 1e-5) << name << " " << k;
  }
}

// A matrix whose state is not finite is left alone; whoever reads the report is told.
TEST(DecidedOnDevice, AStateThatIsNotFiniteIsReported) {
  OptimizerOptions options;
  options.kind = OptimizerKind::kDion;
  for (const bool on_device : {false, true}) {
    run_world(1, [&](Communicator& world) {
      const std::unique_ptr<Device> device = on_device ? open_device() : nullptr;
      Model model(world, options, device.get());
      const std::string spoiled = model.spoil_a_momentum();
      const auto before = model.read();
      model.set_gradients(0);
      const auto step_and_read = [&] { return model.step(0).get().dead_columns; };
      EXPECT_THAT(step_and_read,
                  testing::ThrowsMessage<Error>(testing::HasSubstr("M of " + spoiled + " is not finite")));
      EXPECT_EQ(model.read().at(spoiled), before.at(spoiled));
    });
  }
}

INSTANTIATE_TEST_SUITE_P(All, DecidedOnDeviceBy, testing::ValuesIn(cases()),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace lowband::test
