// A run that goes on, from its checkpoint, on other meshes: the trajectory of one that stays where it is.

#include "collectives/agreement.h"
#include "collectives/local/local_world.h"
#include "tests/trainer/scratch_directory.h"
#include "tests/trainer/small_run.h"
#include "trainer/trainer.h"

#include <fstream>
#include <mutex>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr int kStepsEach = 5;

RunConfig run_on(const ScratchDirectory& scratch, const MeshShape& mesh,
                 const std::vector<std::string>& settings) {
  RunConfig config = small_run(scratch.path(), mesh);
  config.set_precision(RunConfig::F64);
  config.mutable_checkpoint()->set_resume("auto");
  for (const std::string& setting : settings) apply_override(config, setting);
  if (!has_factor_ranks(config)) config.clear_profile();
  return config;
}

/// Losses of the run's next steps, with a checkpoint after them.
void train_on(const RunConfig& config, std::vector<double>& losses, std::ostream* console = nullptr) {
  run_world(config.mesh().replica() * config.mesh().shard() * config.mesh().tensor(),
            [&](Communicator& world) {
              const bool first = world.process() == 0;
              Trainer<double> trainer(config, world, {nullptr, first ? console : nullptr});
              for (int step = 0; step < kStepsEach; ++step) {
                const double loss = trainer.step();
                if (first) losses.push_back(loss);
              }
              trainer.save_checkpoint();
            });
}

struct Case {
  const char* name;
  std::vector<MeshShape> meshes;
  std::vector<std::string> settings;
};
class Resharding : public testing::TestWithParam<Case> {};

// Equal numbers, added up in another order: as layouts differ from each other, see layout_invariance_test.
TEST_P(Resharding, ContinuesTheTrajectory) {
  const auto& [name, meshes, settings] = GetParam();
  const ScratchDirectory still, moving;
  std::vector<double> expected, found;
  for (std::size_t part = 0; part < meshes.size(); ++part) train_on(run_on(still, {}, settings), expected);
  for (const MeshShape& mesh : meshes) train_on(run_on(moving, mesh, settings), found);
  ASSERT_EQ(found.size(), meshes.size() * kStepsEach);
  EXPECT_LT(expected.back(), 0.97 * expected.front()) << "the run must learn, or it proves nothing";
  for (std::size_t i = 0; i < found.size(); ++i)
    EXPECT_NEAR(found[i], expected[i], 1e-10 * expected[i]) << "step " << i;
}

std::string kind(const char* name) { return cat("optimizer={kind: ", name, " learning_rate: 0.01}"); }
const std::string kMuonBp =
    "optimizer={kind: MUONBP learning_rate: 0.01 muonbp_period: 2 muonbp_block_learning_rate: 0.008}";
const std::vector<MeshShape> kMeshes{{2, 1, 2}, {2, 2, 1}, {1, 3, 1}, {3, 1, 1}, {1, 1, 1}};
const std::vector<MeshShape> kThree{{2, 1, 2}, {1, 3, 1}, {2, 2, 1}};
INSTANTIATE_TEST_SUITE_P(
    Runs, Resharding,
    testing::Values(
        Case{"Dion", kMeshes, {}}, Case{"DionAggregated", kMeshes, {"optimizer.residual=AGGREGATED"}},
        Case{"PowerSgd", kMeshes, {"optimizer.kind=POWERSGD"}},
        Case{"AcpSgd", kMeshes, {"optimizer.kind=ACPSGD"}},
        Case{"Galore", kThree, {"optimizer.kind=GALORE", "optimizer.galore_interval=7"}},
        Case{"MuonBp", {{1, 1, 1}, {3, 1, 1}, {2, 1, 1}}, {kMuonBp}}, Case{"AdamW", kMeshes, {kind("ADAMW")}},
        Case{"Muon", kThree, {kind("MUON")}},
        Case{"NorMuonPerHead", kThree, {kind("NORMUON"), "optimizer.blocks=PER_HEAD"}},
        Case{"Dion2", kThree, {kind("DION2")}},
        Case{"Spectra", kThree, {"optimizer={kind: SPECTRA learning_rate: 0.01 spectra_fraction: 0.15}"}}),
    [](const auto& run) { return std::string(run.param.name); });

TEST(ReshardingOf, ARunSaysWhereItComesFromAndTakesOtherMicroBatches) {
  const ScratchDirectory scratch;
  std::vector<double> losses;
  train_on(run_on(scratch, {2, 1, 1}, {"batch.sequences_per_micro_batch=6"}), losses);
  std::ostringstream console;
  train_on(run_on(scratch, {1, 3, 1}, {"batch.sequences_per_micro_batch=2"}), losses, &console);
  EXPECT_THAT(console.str(), AllOf(HasSubstr("continues after step 5"),
                                   HasSubstr("from a checkpoint of replica 2 x shard 1 x tensor 1")));
}

/// What every process says when it refuses, and that it does.
std::string refusal(const RunConfig& config) {
  std::string message;
  std::mutex mutex;
  run_world(config.mesh().replica() * config.mesh().shard() * config.mesh().tensor(),
            [&](Communicator& world) {
              try {
                const Trainer<double> trainer(config, world, {});
                ADD_FAILURE() << "process " << world.process() << " goes on";
              } catch (const AgreedFailure& failure) {
                const std::lock_guard lock(mutex);
                message = failure.what();
              }
            });
  return message;
}

TEST(ReshardingOf, ADamagedFileIsRefusedByAllProcesses) {
  const ScratchDirectory scratch;
  std::vector<double> losses;
  train_on(run_on(scratch, {2, 1, 1}, {}), losses);
  const auto file = scratch.path() / "runs/run/checkpoints/step-000005/process-0001.bin";
  {
    // Behind the weights, which are half of it, momenta: of replica 1, but needed for the mean.
    std::fstream bytes(file, std::ios::in | std::ios::out | std::ios::binary);
    bytes.seekp(static_cast<std::streamoff>(std::filesystem::file_size(file) / 2));
    bytes << std::string(1000, 'x');
  }
  EXPECT_THAT(refusal(run_on(scratch, {3, 1, 1}, {})),
              AllOf(HasSubstr("process-0001.bin"), HasSubstr("damaged")));
}

TEST(ReshardingOf, BlocksThatTheMeshCutsStayOnIt) {
  const ScratchDirectory scratch;
  const std::vector<std::string> settings{kMuonBp};
  std::vector<double> losses;
  train_on(run_on(scratch, {1, 2, 1}, settings), losses);
  EXPECT_THAT(
      refusal(run_on(scratch, {1, 1, 2}, settings)),
      HasSubstr("checkpoint mesh: found replica 1 x shard 2 x tensor 1, expected replica 1 x shard 1 x "
                "tensor 2"));
}

TEST(ReshardingOf, AnotherProfileIsRefusedOnAnyMesh) {
  const ScratchDirectory scratch;
  std::vector<double> losses;
  train_on(run_on(scratch, {2, 1, 1}, {}), losses);
  EXPECT_THAT(refusal(run_on(scratch, {3, 1, 1}, {"profile.rank=4"})),
              HasSubstr("checkpoint profile.rank: found 5, expected 4"));
}

}  // namespace
}  // namespace lowband
