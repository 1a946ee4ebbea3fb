// Whole optimizers with parameters and states in device memory against the same run in host memory.
#include "collectives/local/local_world.h"
#include "tests/optimizers/world_run.h"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband::test {
namespace {

struct Case {
  std::string name;
  MeshShape mesh;
  OptimizerOptions options;
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

std::vector<Case> cases() {
  const MeshShape alone{}, replicas{.replica = 2}, shards{.shard = 2},
      all{.replica = 2, .shard = 2, .tensor = 2};
  std::vector<Case> list;
  const auto add = [&](std::string name, MeshShape mesh, OptimizerKind kind, auto set) {
    OptimizerOptions options;
    options.kind = kind;
    set(options);
    list.push_back({std::move(name), mesh, options});
  };
  const auto plain = [](OptimizerOptions&) {};
  for (const auto& [name, mesh] : {std::pair{"alone", alone}, std::pair{"replicas", replicas},
                                   std::pair{"shards", shards}, std::pair{"mixed", all}}) {
    add(cat("adamw_", name), mesh, OptimizerKind::kAdamW, plain);
    add(cat("dion_", name), mesh, OptimizerKind::kDion, plain);
    add(cat("power_sgd_", name), mesh, OptimizerKind::kPowerSgd, plain);
  }
  for (const auto& [name, kind] :
       {std::pair{"acp_sgd", OptimizerKind::kAcpSgd}, std::pair{"galore", OptimizerKind::kGalore},
        std::pair{"spectra", OptimizerKind::kSpectra}, std::pair{"muon", OptimizerKind::kMuon},
        std::pair{"muonbp", OptimizerKind::kMuonBp}, std::pair{"normuon", OptimizerKind::kNorMuon},
        std::pair{"dion2", OptimizerKind::kDion2}, std::pair{"nordion2", OptimizerKind::kNorDion2},
        std::pair{"spec_gd", OptimizerKind::kSpecGd}}) {
    add(cat(name, "_alone"), alone, kind, plain);
    add(cat(name, "_mixed"), all, kind, plain);
  }
  add("lion_shards", shards, OptimizerKind::kLion, plain);
  add("sgd_shards", shards, OptimizerKind::kSgd, plain);
  const auto local = [](OptimizerOptions& o) { o.residual = Residual::kLocal; };
  add("dion_local_mixed", all, OptimizerKind::kDion, local);
  add("dion_bf16_replicas", replicas, OptimizerKind::kDion, [](OptimizerOptions& o) {
    o.residual = Residual::kLocal;
    o.wire = FactorWire::kBF16;
  });
  return list;
}

class OnDevice : public testing::TestWithParam<Case> {};

TEST_P(OnDevice, TrainsAsOnTheHost) {
  RunPlan plan{.mesh = GetParam().mesh,
               .parameters = assorted_parameters(),
               .options = GetParam().options,
               .gradient = noisy_gradient,
               .shares = 4,
               .steps = 2,
               .diagnose = exchanges_factors(GetParam().options.kind)};
  if (plan.mesh.processes() > 2) plan.parameters.resize(5);  // eight threads take turns on the emulation
  const std::vector<Snapshot> host = run<float>(plan);
  plan.on_device = true;
  const std::vector<Snapshot> device = run<float>(plan);
  for (std::size_t step = 0; step < host.size(); ++step) {
    const Snapshot &expected = host[step], &found = device[step];
    EXPECT_EQ(found.factor_bytes, expected.factor_bytes);
    EXPECT_EQ(found.factor_bytes, found.planned_factor_bytes);
    EXPECT_EQ(found.dense_bytes, expected.dense_bytes);
    EXPECT_EQ(found.update_bytes, expected.update_bytes);
    EXPECT_EQ(found.calls, expected.calls);
    EXPECT_EQ(found.report.dead_columns, expected.report.dead_columns);
    EXPECT_NEAR(found.report.gradient_norm, expected.report.gradient_norm,
                1e-5 * expected.report.gradient_norm);
    // Float sums of at most 37 terms in two orders differ by 37 u of their terms. Factors amplify that by the
    // condition number of B Q, of these matrices below 100; steps add up.
    const double tolerance = 37 * 0x1p-24 * 100 * static_cast<double>(step + 1);
    for (const auto& [name, weight] : expected.weights) {
      for (std::size_t k = 0; k < weight.a.size(); ++k)
        ASSERT_NEAR(found.weights.at(name).a[k], weight.a[k], tolerance)
            << name << " " << k << ", step " << step;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, OnDevice, testing::ValuesIn(cases()),
                         [](const auto& test) { return test.param.name; });

TEST(OnDevice, ParametersLieWhereTheCommunicatorSays) {
  run_world(1, [](Communicator& world) {
    const std::unique_ptr<Device> device = open_device();
    Buffer<float> storage(8);
    std::vector<Parameter<float>> parameters{{{.name = "norm", .role = Role::kNorm, .rows = 1, .cols = 4},
                                              storage.matrix(0, 1, 4),
                                              storage.matrix(4, 1, 4)}};
    world.set_device(device.get());
    ProcessMesh mesh(world, {});
    const RankProfile profile{.name = "none", .matrices = {}, .factor_ranks = {}};
    const auto make = [&](OptimizerKind kind) {
      OptimizerOptions options;
      options.kind = kind;
      const ShardedOptimizer<float> optimizer(mesh, parameters, profile, options);
    };
    EXPECT_THAT(
        [&] { make(OptimizerKind::kAdamW); },
        testing::ThrowsMessage<InvalidArgument>(testing::AllOf(
            testing::HasSubstr("norm: found in the memory of the host"), testing::HasSubstr("cuda:0"))));
    Buffer<float> there(8, device.get());
    parameters.front().weight = there.matrix(0, 1, 4);
    parameters.front().gradient = there.matrix(4, 1, 4);
    make(OptimizerKind::kAdamW);
  });
}

}  // namespace
}  // namespace lowband::test
