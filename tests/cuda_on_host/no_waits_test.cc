// An optimizer step on a device is enqueued: the host waits for nothing, and learns what happened afterwards.
// Kinds that decide something on the host in its middle wait, and compute the same.
#include "collectives/local/local_world.h"
#include "optimizers/sharded_optimizer.h"
#include "tests/cuda_on_host/small_training.h"
#include "tests/cuda_on_host/waits.h"

#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using cuda_on_host::host_waits;
using test::SmallTraining;

struct Kind {
  const char* name;
  OptimizerKind kind;
  double clip_norm = 1;  // far below the norm of these gradients
};
class NoWaits : public testing::TestWithParam<Kind> {};

// Step 0 makes what is made once, buffers and plans of products, and does not wait either.
TEST_P(NoWaits, AStepIsEnqueuedAndItsReportIsThatOfTheHost) {
  OptimizerOptions options;
  options.kind = GetParam().kind;
  options.clip_norm = GetParam().clip_norm;
  run_world(1, [&](Communicator& world) {
    std::vector<StepReport> expected;
    std::vector<float> expected_weights;
    // A matrix and something else have an unusable gradient in one step each.
    const auto bad = [](int step) { return step == 2 ? 1 : step == 3 ? 4 : -1; };
    {
      SmallTraining host(world, false, options);
      for (int step = 0; step < 5; ++step) {
        host.draw_gradients(step, bad(step));
        expected.push_back(host.step(step));
      }
      expected_weights = host.weights();
    }
    SmallTraining device(world, true, options);
    std::vector<PendingReport> pending;
    std::vector<float> kept;
    for (int step = 0; step < 5; ++step) {
      device.draw_gradients(step, bad(step));
      if (step == 2) kept = device.weight(1);
      const long before = host_waits();
      pending.push_back(device.step(step));
      const long waits = host_waits() - before;
      if (decides_on_the_host(options.kind)) {
        EXPECT_GT(waits, 0) << "it need not be among those that decide there";
      } else {
        EXPECT_EQ(waits, 0) << "step " << step;
      }
      if (step == 2) {
        EXPECT_EQ(device.weight(1), kept) << "an unusable gradient moved a weight";
      }
    }
    for (std::size_t step = 0; step < pending.size(); ++step) {
      const StepReport& found = pending[step].get();
      EXPECT_NEAR(found.gradient_norm / expected[step].gradient_norm, 1, 1e-4) << step;
      EXPECT_NEAR(found.clip_scale / expected[step].clip_scale, 1, 1e-4) << step;
      EXPECT_EQ(found.skipped_matrices, expected[step].skipped_matrices) << step;
      EXPECT_EQ(found.skipped_other, expected[step].skipped_other) << step;
      EXPECT_EQ(found.dead_columns, expected[step].dead_columns) << step;
    }
    EXPECT_EQ(expected[2].skipped_matrices + expected[2].skipped_other, 1);
    const std::vector<float> found = device.weights();
    // As TrainsAsOnTheHost: sums of at most 50 terms in another order, amplified by factors' condition.
    for (std::size_t i = 0; i < found.size(); ++i)
      ASSERT_NEAR(found[i], expected_weights[i], 5 * 50 * 0x1p-24 * 100) << i;
  });
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, NoWaits,
    testing::Values(Kind{"adamw", OptimizerKind::kAdamW}, Kind{"adamw_unclipped", OptimizerKind::kAdamW, 0},
                    Kind{"lion", OptimizerKind::kLion}, Kind{"sgd", OptimizerKind::kSgd},
                    Kind{"muon", OptimizerKind::kMuon}, Kind{"muonbp", OptimizerKind::kMuonBp},
                    Kind{"normuon", OptimizerKind::kNorMuon}, Kind{"dion", OptimizerKind::kDion},
                    Kind{"dion_unclipped", OptimizerKind::kDion, 0},
                    Kind{"power_sgd", OptimizerKind::kPowerSgd}, Kind{"acp_sgd", OptimizerKind::kAcpSgd},
                    Kind{"spectra", OptimizerKind::kSpectra}, Kind{"dion2", OptimizerKind::kDion2},
                    Kind{"nordion2", OptimizerKind::kNorDion2}, Kind{"spec_gd", OptimizerKind::kSpecGd},
                    Kind{"galore", OptimizerKind::kGalore}),
    [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace lowband
