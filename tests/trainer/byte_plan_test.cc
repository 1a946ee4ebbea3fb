// What is planned is what is sent, process by process, and nothing more can be.

#include "trainer/byte_plan.h"

#include "collectives/local/local_world.h"
#include "tests/trainer/scratch_directory.h"
#include "tests/trainer/small_run.h"
#include "trainer/trainer.h"

#include <atomic>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

struct Case {
  MeshShape mesh;
  std::vector<const char*> settings;
};

RunConfig run_of(const Case& c, const ScratchDirectory& scratch) {
  RunConfig config = small_run(scratch.path(), c.mesh);
  for (const char* setting : c.settings) apply_override(config, setting);
  if (!has_factor_ranks(config)) config.clear_profile();
  return config;
}

/// Steps after which what is sent repeats itself.
Index period_of(const RunConfig& config) {
  const auto& optimizer = config.optimizer();
  if (optimizer.kind() == RunConfig::Optimizer::GALORE) return optimizer.galore_interval();
  return optimizer.kind() == RunConfig::Optimizer::ACPSGD ? 2 : 1;
}

class ByteBudgetOfARun : public testing::TestWithParam<Case> {};

TEST_P(ByteBudgetOfARun, LetsAStepSendWhatIsPlannedAndNotAnElementMore) {
  const ScratchDirectory scratch;
  const RunConfig config = run_of(GetParam(), scratch);
  const MeshShape& mesh = GetParam().mesh;
  run_world(mesh.processes(), [&](Communicator& world) {
    Trainer<float> trainer(config, world, {});
    const MeshPosition position = mesh_position(mesh, world.process());
    const auto replica =
        world.split(position.tensor + mesh.tensor * position.shard, position.replica, "replica");
    trainer.step();
    const auto before = world.ledger().total();
    std::vector<float> more{1};
    for (const auto& parameter : trainer.parameters()) {
      for (const Purpose purpose : {Purpose::kFactor, Purpose::kDense}) {
        const PayloadShare share{parameter.info.name, 1};
        EXPECT_THROW(replica->all_reduce<float>(more, Reduction::kSum, {purpose, {&share, 1}}),
                     BudgetExceeded)
            << parameter.info.name << " " << purpose_name(purpose);
      }
    }
    EXPECT_THROW(replica->all_reduce<float>(more, Reduction::kSum, {Purpose::kPeriodic}), BudgetExceeded);
    EXPECT_EQ(world.ledger().total().size(), before.size());
    for (const auto& [key, totals] : before) EXPECT_EQ(world.ledger().total().at(key).calls, totals.calls);
    trainer.step();  // a new step has its whole budget again
  });
}

TEST_P(ByteBudgetOfARun, CountsTheStepAsPlanned) {
  const ScratchDirectory scratch;
  const RunConfig config = run_of(GetParam(), scratch);
  const BytePlan plan = byte_plan(config);
  const MeshShape& mesh = GetParam().mesh;
  const Index period = period_of(config);
  const auto mean = [period](Index sum) { return (sum + period / 2) / period; };
  std::atomic<Index> factor = 0, dense = 0;
  run_world(mesh.processes(), [&](Communicator& world) {
    Trainer<float> trainer(config, world, {});
    Index update = 0;
    for (Index step = 0; step < 2 * period; ++step) {
      trainer.step();
      const auto payload = [&](const char* axis, Purpose purpose) {
        return world.ledger().step_sum(axis, purpose).payload_bytes;
      };
      EXPECT_EQ(payload("replica", Purpose::kControl) + payload("world", Purpose::kControl),
                plan.control_bytes);
      if (step < period) continue;  // the first step may be another
      update += payload("within_replica", Purpose::kUpdate);
      factor += payload("replica", Purpose::kFactor);
      dense += payload("replica", Purpose::kDense);
    }
    EXPECT_EQ(mean(update), plan.update_bytes);
  });
  EXPECT_EQ(mean(factor / mesh.replica), plan.matrices.factor);
  EXPECT_EQ(mean(dense / mesh.replica), plan.matrices.dense + plan.other_dense_bytes);
}

// Sizes that divide by none of the axes; rank 12 lies above the break-even rank of some matrices.
INSTANTIATE_TEST_SUITE_P(
    Runs, ByteBudgetOfARun,
    testing::Values(
        Case{{1, 1, 1}, {}}, Case{{2, 1, 2}, {}}, Case{{2, 2, 1}, {}}, Case{{3, 1, 1}, {}},
        Case{{2, 3, 1}, {}}, Case{{2, 2, 3}, {"optimizer.kind=POWERSGD"}},
        Case{{2, 1, 1}, {"optimizer.kind=POWERSGD", "optimizer.wire=BF16"}},
        Case{{2, 2, 1}, {"optimizer.kind=ACPSGD", "optimizer.overlap=true", "optimizer.bucket_mib=0.01"}},
        Case{{3, 1, 2}, {"optimizer.kind=ACPSGD", "optimizer.wire=BF16"}},
        Case{{2, 2, 2}, {"optimizer.kind=GALORE", "optimizer.galore_interval=4"}},
        Case{{3, 1, 2},
             {"optimizer.kind=GALORE", "optimizer.galore_interval=5", "optimizer.wire=BF16",
              "optimizer.overlap=true", "optimizer.bucket_mib=0.01"}},
        Case{{2, 1, 3}, {"optimizer.exchange=DENSE"}},
        Case{{3, 2, 1}, {"optimizer.exchange=AUTO", "profile.rank=12"}},
        Case{{2, 2, 1},
             {"optimizer.exchange=AUTO", "profile.rank=12", "optimizer.wire=BF16", "optimizer.overlap=true",
              "optimizer.bucket_mib=0.01"}},
        Case{{2, 2, 2}, {"optimizer={kind: ADAMW learning_rate: 0.01}"}},
        Case{{2, 2, 1}, {"optimizer={kind: LION learning_rate: 0.001}"}},
        Case{{2, 1, 1}, {"optimizer={kind: MUON learning_rate: 0.01}"}},
        Case{{2, 2, 3}, {"optimizer={kind: MUON learning_rate: 0.01 sign: POLAR_EXPRESS_8}"}},
        Case{{2, 1, 3}, {"optimizer={kind: NORMUON learning_rate: 0.01}"}},
        Case{{2, 1, 3}, {"optimizer={kind: DION2 learning_rate: 0.01}"}},
        Case{{1, 2, 2}, {"optimizer={kind: NORDION2 learning_rate: 0.01 dion2_denominator: 3}"}},
        Case{{2, 2, 1}, {"optimizer={kind: DION2 learning_rate: 0.01 dion2_selection: RANDOM}"}},
        Case{{2, 2, 3}, {"optimizer={kind: SPECGD learning_rate: 0.01}"}},
        Case{{2, 2, 3}, {"optimizer={kind: SPECGD learning_rate: 0.01 blocks: PER_HEAD}"}},
        Case{{1, 2, 2}, {"optimizer={kind: MUON learning_rate: 0.01 blocks: PER_HEAD}"}},
        Case{{2, 2, 3}, {"optimizer={kind: NORDION2 learning_rate: 0.01 blocks: PER_HEAD}"}},
        Case{{2, 1, 3}, {"optimizer.blocks=PER_HEAD", "profile.rank=3"}},
        Case{{2, 2, 1},
             {"optimizer.blocks=PER_HEAD", "profile.rank=3", "optimizer.exchange=AUTO",
              "optimizer.overlap=true", "optimizer.bucket_mib=0.01"}},
        Case{{3, 1, 2}, {"optimizer.kind=ACPSGD", "optimizer.blocks=PER_HEAD", "profile.rank=3"}},
        Case{{2, 2, 1},
             {"optimizer.kind=GALORE", "optimizer.galore_interval=4", "optimizer.blocks=PER_HEAD",
              "profile.rank=3"}},
        Case{{2, 2, 2}, {"optimizer={kind: SPECTRA learning_rate: 0.01 spectra_fraction: 0.1}"}},
        Case{{1, 3, 1}, {"optimizer={kind: MUON learning_rate: 0.01}"}},
        Case{{1, 2, 2}, {"optimizer={kind: MUON learning_rate: 0.01 overlap: true bucket_mib: 0.01}"}}));

// A plan says the mean; each step sends what its phase allows, or the budget that follows from it stops the
// run.
TEST(BytePlan, IsTheMeanOverAPeriod) {
  const ScratchDirectory scratch;
  RunConfig config = small_run(scratch.path(), {2, 1, 2});
  apply_override(config, "optimizer={kind: MUON learning_rate: 0.01}");
  config.clear_profile();
  const Index whole = byte_plan(config).update_bytes;
  apply_override(
      config,
      "optimizer={kind: MUONBP learning_rate: 0.01 muonbp_period: 2 muonbp_block_learning_rate: 0.01}");
  EXPECT_EQ(byte_plan(config).update_bytes, whole / 2);
  run_world(4, [&](Communicator& world) {
    Trainer<float> trainer(config, world, {});
    for (int step = 0; step < 3; ++step) {
      trainer.step();
      EXPECT_EQ(world.ledger().step_sum("within_replica", Purpose::kUpdate).payload_bytes,
                step % 2 == 0 ? whole : 0);
    }
  });
}

TEST(BytePlan, AmortisesWhatIsSentNowAndThen) {
  const ScratchDirectory scratch;
  RunConfig config = small_run(scratch.path(), {2, 1, 2});
  config.set_hash_interval_steps(10);
  config.mutable_diagnostics()->set_interval_steps(25);
  const BytePlan plan = byte_plan(config);
  EXPECT_EQ(plan.weight_hashes.bytes, 4 * 8);
  EXPECT_EQ(plan.weight_hashes.amortised(), 3.2);
  // Two means of every layer matrix.
  EXPECT_EQ(plan.diagnostics.bytes, 2 * 2 * (4 * 24 * 20 + 3 * 35 * 20) * 4);
  EXPECT_EQ(plan.diagnostics.amortised(), static_cast<double>(plan.diagnostics.bytes) / 25);
  config.mutable_diagnostics()->set_interval_steps(0);
  EXPECT_EQ(byte_plan(config).diagnostics.amortised(), 0);
}

}  // namespace
}  // namespace lowband
