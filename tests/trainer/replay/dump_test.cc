// A training run writes a recording; its replay gives the weights and the state of the run, bit by bit.

#include "collectives/agreement.h"
#include "collectives/local/local_world.h"
#include "tests/trainer/replay/recording.h"
#include "tests/trainer/small_run.h"
#include "trainer/replay/replay.h"
#include "trainer/trainer.h"

#include <mutex>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using namespace test;
using testing::HasSubstr;
namespace fs = std::filesystem;

constexpr Index kSteps = 6;

/// Takes `steps` steps and returns the losses.
std::vector<double> train_steps(const RunConfig& config, Index steps) {
  std::vector<double> losses;
  std::mutex mutex;
  run_world(mesh_shape(config).processes(), [&](Communicator& world) {
    const bool double_precision = config.precision() == RunConfig::F64;
    std::vector<double> own;
    const auto take = [&](auto& trainer) {
      for (Index i = 0; i < steps; ++i) own.push_back(trainer.step());
    };
    if (double_precision) {
      Trainer<double> trainer(config, world, {});
      take(trainer);
    } else {
      Trainer<float> trainer(config, world, {});
      take(trainer);
    }
    const std::lock_guard lock(mutex);
    losses = own;
  });
  return losses;
}

RunConfig dumping(const ScratchDirectory& scratch, const MeshShape& mesh,
                  const std::vector<std::string>& settings, const std::string& name, Index first,
                  Index steps) {
  RunConfig config = small_run(scratch.path(), mesh);
  config.set_name(name);
  for (const std::string& setting : settings) apply_override(config, setting);
  if (!has_factor_ranks(config)) config.clear_profile();
  config.mutable_dump()->set_folder((scratch.path() / name).string());
  config.mutable_dump()->set_first_step(first);
  config.mutable_dump()->set_steps(steps);
  return config;
}

void replay_on_threads(const ReplayRequest& request) {
  run_world(mesh_shape(plan_replay(request).config).processes(),
            [&](Communicator& world) { replay(request, world); });
}

void expect_same_file(const fs::path& found, const fs::path& expected) {
  const std::string bytes = read_text(found);
  EXPECT_FALSE(bytes.empty()) << found;
  EXPECT_TRUE(bytes == read_text(expected)) << found;
}

struct Case {
  const char* name;
  MeshShape mesh;
  Index first;
  std::vector<std::string> settings;
};

class Dump : public testing::TestWithParam<Case> {};

// The run's weights and state after the recorded steps are what a second recording begins with.
TEST_P(Dump, IsReplayedBitByBit) {
  const auto& [name, mesh, first, settings] = GetParam();
  const ScratchDirectory scratch;
  const auto losses =
      train_steps(dumping(scratch, mesh, settings, "recorded", first, kSteps), first + kSteps + 1);
  const auto later =
      train_steps(dumping(scratch, mesh, settings, "later", first + kSteps, 1), first + kSteps + 1);
  EXPECT_EQ(losses, later);  // recording changes nothing

  ReplayRequest request{.folder = scratch.path() / "recorded", .output = scratch.path() / "out"};
  request.config = load_run_config((request.folder / "run.txtpb").string());
  request.has_model = true;
  if (first > 0) request.state = request.folder / "state.safetensors";
  replay_on_threads(request);
  expect_same_file(scratch.path() / "out/weights.safetensors", scratch.path() / "later/weights.safetensors");
  for (int replica = 0; replica < mesh.replica; ++replica) {
    const fs::path state = state_file_of("state.safetensors", replica, mesh.replica);
    expect_same_file(scratch.path() / "out" / state, scratch.path() / "later" / state);
  }
  EXPECT_NE(read_text(scratch.path() / "out/weights.safetensors"),
            read_text(scratch.path() / "recorded/weights.safetensors"));
}

INSTANTIATE_TEST_SUITE_P(
    Runs, Dump,
    testing::Values(
        Case{"alone", {1, 1, 1}, 0, {}}, Case{"replicas", {3, 1, 1}, 0, {}},
        Case{"from_a_later_step", {2, 1, 1}, 4, {}}, Case{"tensor", {2, 1, 3}, 2, {}},
        Case{"shard", {2, 2, 1}, 0, {}}, Case{"all_axes", {2, 2, 2}, 3, {}},
        Case{"overlap", {2, 1, 1}, 1, {"optimizer.overlap=true", "optimizer.bucket_mib=0.01"}},
        Case{"micro_batches", {2, 1, 1}, 0, {"batch.sequences_per_micro_batch=2"}},
        Case{"aggregated_bf16", {2, 1, 1}, 2, {"optimizer.residual=AGGREGATED", "optimizer.wire=BF16"}},
        Case{"power_sgd",
             {2, 1, 1},
             2,
             {"optimizer.kind=POWERSGD", "optimizer.exchange=AUTO", "profile.rank=12"}},
        Case{"muonbp",
             {2, 2, 1},
             2,
             {"optimizer={kind: MUONBP learning_rate: 0.01 muonbp_period: 3 muonbp_block_learning_rate: "
              "0.008}"}},
        Case{"nordion2", {2, 1, 3}, 3, {"optimizer={kind: NORDION2 learning_rate: 0.01}"}},
        Case{"dion2_draws",
             {1, 2, 1},
             2,
             {"optimizer={kind: DION2 learning_rate: 0.01 dion2_selection: RANDOM}"}},
        Case{"specgd_by_heads",
             {2, 1, 1},
             1,
             {"optimizer={kind: SPECGD learning_rate: 0.01 blocks: PER_HEAD}"}},
        Case{"dion_by_heads", {2, 2, 2}, 2, {"optimizer.blocks=PER_HEAD", "profile.rank=3"}},
        Case{"acp_sgd_from_an_odd_step", {2, 2, 1}, 3, {"optimizer.kind=ACPSGD"}},
        Case{"galore_from_a_later_step",
             {2, 1, 3},
             3,
             {"optimizer.kind=GALORE", "optimizer.galore_interval=4"}},
        Case{
            "spectra", {1, 2, 2}, 2, {"optimizer={kind: SPECTRA learning_rate: 0.01 spectra_fraction: 0.2}"}},
        Case{"float64", {2, 1, 1}, 1, {"precision=F64"}}),
    [](const auto& test) { return std::string(test.param.name); });

// Without a configuration: the same numbers where the same options are given.
TEST(DumpWithoutConfiguration, IsReplayedByNamesAndShapes) {
  const ScratchDirectory scratch;
  const std::vector<std::string> constant{"schedule.kind=CONSTANT_LINEAR", "schedule.warmup_steps=0",
                                          "schedule.decay_steps=0"};
  train_steps(dumping(scratch, {2, 1, 1}, constant, "recorded", 0, kSteps), kSteps);
  train_steps(dumping(scratch, {2, 1, 1}, constant, "later", kSteps, 1), kSteps + 1);
  ReplayRequest request{.folder = scratch.path() / "recorded", .output = scratch.path() / "out"};
  for (const char* setting :
       {"optimizer.learning_rate=0.01", "optimizer.scalar_learning_rate=0.005", "profile.rank=5"})
    apply_override(request.config, setting);
  request.scalar_patterns = {"model.embed_tokens.*"};
  replay_on_threads(request);
  expect_same_file(scratch.path() / "out/weights.safetensors", scratch.path() / "later/weights.safetensors");
}

// The gradients in the files are the mean over the tokens of a replica: shards are averaged.
TEST(DumpOfShards, HoldsTheMeanGradientOfEachReplica) {
  const ScratchDirectory scratch;
  const std::vector<std::string> precise{"precision=F64"};
  train_steps(dumping(scratch, {1, 1, 1}, precise, "one", 0, 1), 1);
  train_steps(dumping(scratch, {2, 1, 1}, precise, "replicas", 0, 1), 1);
  train_steps(dumping(scratch, {1, 3, 2}, precise, "shards", 0, 1), 1);
  const auto one = read_all(scratch.path() / "one/step-000000.safetensors");
  const auto shards = read_all(scratch.path() / "shards/step-000000.safetensors");
  const auto first = read_all(scratch.path() / "replicas/step-000000.replica-0.safetensors");
  const auto second = read_all(scratch.path() / "replicas/step-000000.replica-1.safetensors");
  ASSERT_EQ(one.size(), 1u + 2 * 9 + 1);
  for (const auto& [name, values] : one) {
    for (std::size_t k = 0; k < values.size(); ++k) {
      ASSERT_NEAR(shards.at(name)[k], values[k], 1e-12) << name;
      ASSERT_NEAR(0.5 * (first.at(name)[k] + second.at(name)[k]), values[k], 1e-12) << name;
    }
  }
}

TEST(DumpFolder, IsRefusedWhereRecordingsWouldMix) {
  const ScratchDirectory scratch;
  RunConfig config = dumping(scratch, {1, 1, 1}, {"schedule.steps=6"}, "recorded", 2, 3);
  const auto run = [&] {
    run_world(1, [&](Communicator& world) { Trainer<float>(config, world, {}).run(); });
  };
  scratch.write("recorded/something", "here");
  EXPECT_THAT(thrown_message<InvalidArgument>(run), HasSubstr("dump.folder: found files"));
  EXPECT_FALSE(fs::exists(scratch.path() / "runs"));
  fs::remove_all(scratch.path() / "recorded");

  // A run that was stopped in the middle goes on with its recording, with the same bytes.
  run();
  const std::string last = read_text(scratch.path() / "recorded/step-000004.safetensors");
  fs::remove_all(scratch.path() / "runs");
  fs::rename(scratch.path() / "recorded", scratch.path() / "earlier");
  config.mutable_checkpoint()->set_interval_steps(3);
  config.mutable_checkpoint()->set_keep(10);
  run();
  fs::remove_all(scratch.path() / "runs/run/checkpoints/step-000006");
  fs::remove_all(scratch.path() / "runs/recorded/checkpoints/step-000006");
  fs::remove(scratch.path() / "recorded/step-000004.safetensors");
  config.mutable_checkpoint()->set_resume("auto");
  run();
  EXPECT_TRUE(read_text(scratch.path() / "recorded/step-000004.safetensors") == last);

  // Without what came before there is nothing to go on with.
  fs::remove_all(scratch.path() / "runs/recorded/checkpoints/step-000006");
  fs::remove_all(scratch.path() / "recorded");
  EXPECT_THAT(thrown_message<InvalidArgument>(run), HasSubstr("dump.first_step: found 2"));
}

}  // namespace
}  // namespace lowband
