// Whole runs on a device, against those on the host.
#include "trainer/trainer.h"

#include "collectives/agreement.h"
#include "collectives/local/local_world.h"
#include "tests/trainer/scratch_directory.h"
#include "tests/trainer/small_run.h"
#include "trainer/data/safetensors.h"
#include "trainer/host_copies.h"
#include "trainer/replay/replay.h"

#include <atomic>
#include <cmath>
#include <filesystem>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using testing::HasSubstr;
namespace fs = std::filesystem;
using Settings = std::vector<const char*>;

RunConfig run_with(const fs::path& folder, const MeshShape& mesh, const Settings& settings) {
  RunConfig config = small_run(folder, mesh);
  for (const char* setting : {"model.heads=2", "model.head_dim=16", "model.layers=1", "schedule.steps=4",
                              "schedule.warmup_steps=1", "validation={interval_steps: 2 sequences: 3}",
                              "batch={sequences_per_step: 4 sequences_per_micro_batch: 1}"})
    apply_override(config, setting);
  for (const char* setting : settings) apply_override(config, setting);
  if (!has_factor_ranks(config)) config.clear_profile();
  return config;
}

/// Weights by process and name.
using Weights = std::map<std::string, std::vector<float>>;
Weights run_to_end(const RunConfig& config, const std::atomic<bool>* stop = nullptr,
                   std::ostream* console = nullptr) {
  Weights weights;
  std::mutex mutex;
  run_world(config.mesh().replica() * config.mesh().shard() * config.mesh().tensor(),
            [&](Communicator& world) {
              {
                Trainer<float> trainer(config, world, {stop, world.process() == 0 ? console : nullptr});
                EXPECT_EQ(trainer.run().interrupted, stop != nullptr);
                const std::lock_guard lock(mutex);
                HostCopies<float> copies;
                for (const Parameter<float>& p : copies.weights_of(trainer.parameters())) {
                  const auto all = p.weight.flat();
                  weights[cat(world.process(), " ", p.info.name)].assign(all.begin(), all.end());
                }
              }
              EXPECT_EQ(world.device(), nullptr) << "a device that is gone";
            });
  return weights;
}

struct Records {
  std::vector<double> losses, validations;
  std::vector<Index> factor_bytes, dense_bytes;
  RunStart start;
};
Records records_in(const fs::path& folder) {
  Records records;
  for (const RunLine& line : read_run_lines(folder / "runs/run")) {
    if (line.has_start()) records.start = line.start();
    if (line.has_validation()) records.validations.push_back(line.validation().loss());
    if (!line.has_step()) continue;
    records.losses.push_back(line.step().loss());
    records.factor_bytes.push_back(line.step().counted_factor_bytes());
    records.dense_bytes.push_back(line.step().counted_dense_bytes());
  }
  return records;
}

void expect_near(const std::vector<double>& found, const std::vector<double>& expected, double tolerance) {
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i)
    EXPECT_NEAR(found[i] / expected[i], 1, tolerance) << "number " << i;
}

struct DeviceRun {
  const char* name;
  MeshShape mesh;
  Settings settings;
};
class RunOnDevice : public testing::TestWithParam<DeviceRun> {};

// Four steps of 0.01 at most; rounding of float sums, amplified by an orthonormalisation, changes a hundredth
// of a step. Hashes are compared after every step: replicas have the same bits.
TEST_P(RunOnDevice, FollowsTheHost) {
  const ScratchDirectory host, device;
  run_to_end(run_with(host.path(), GetParam().mesh, GetParam().settings));
  RunConfig config = run_with(device.path(), GetParam().mesh, GetParam().settings);
  config.set_device(RunConfig::CUDA);
  run_to_end(config);
  const Records expected = records_in(host.path()), found = records_in(device.path());
  ASSERT_EQ(found.losses.size(), 4U);
  expect_near(found.losses, expected.losses, 1e-4);
  expect_near(found.validations, expected.validations, 1e-4);
  EXPECT_EQ(found.factor_bytes, expected.factor_bytes);
  EXPECT_EQ(found.dense_bytes, expected.dense_bytes);
  EXPECT_THAT(found.start.device(), HasSubstr("cuda:0"));
  EXPECT_EQ(expected.start.device(), "");
  EXPECT_EQ(found.start.products_dtype(), "f32");
}

INSTANTIATE_TEST_SUITE_P(
    Runs, RunOnDevice,
    testing::Values(DeviceRun{"dion_alone", {1, 1, 1}, {}}, DeviceRun{"dion_replicas", {2, 1, 1}, {}},
                    DeviceRun{"dion_mixed", {2, 1, 2}, {"optimizer.clip_norm=0.1"}},
                    DeviceRun{"diagnosed", {2, 1, 1}, {"diagnostics.interval_steps=2"}},
                    DeviceRun{"adamw_shards", {1, 2, 1}, {"optimizer={kind: ADAMW learning_rate: 0.01}"}},
                    DeviceRun{"muon_mixed", {1, 2, 2}, {"optimizer={kind: MUON learning_rate: 0.01}"}}),
    [](const auto& run) { return std::string(run.param.name); });

TEST(RunOnDevice, ContinuesWithTheBitsOfAWholeRun) {
  const ScratchDirectory whole, parts;
  const Settings on_device{"device=CUDA", "precision=BF16"};
  const Weights expected = run_to_end(run_with(whole.path(), {2, 1, 1}, on_device));
  RunConfig config = run_with(parts.path(), {2, 1, 1}, on_device);
  config.mutable_checkpoint()->set_resume("auto");
  std::atomic<bool> stop = true;  // after the first step
  run_to_end(config, &stop);
  run_to_end(config, &stop);
  EXPECT_TRUE(run_to_end(config) == expected);
  EXPECT_EQ(records_in(parts.path()).losses, records_in(whole.path()).losses);
}

// A checkpoint says nothing of the device.
TEST(RunOnDevice, ContinuesWhatTheHostBeganAndTheOtherWayRound) {
  const ScratchDirectory whole, parts;
  run_to_end(run_with(whole.path(), {2, 1, 1}, {}));
  RunConfig config = run_with(parts.path(), {2, 1, 1}, {"checkpoint.resume=auto"});
  std::atomic<bool> stop = true;
  run_to_end(config, &stop);
  config.set_device(RunConfig::CUDA);
  run_to_end(config, &stop);
  config.set_device(RunConfig::CPU);
  run_to_end(config);
  expect_near(records_in(parts.path()).losses, records_in(whole.path()).losses, 1e-4);
}

// bf16 in products and activations: a loss some 2^-9 away.
TEST(RunOnDevice, TrainsInHalfPrecisionAndComputesActivationsAgain) {
  const ScratchDirectory host, kept, recomputed;
  run_to_end(run_with(host.path(), {1, 1, 1}, {"model.layers=2"}));
  std::ostringstream console, recomputed_console;
  const Weights expected =
      run_to_end(run_with(kept.path(), {1, 1, 1}, {"model.layers=2", "device=CUDA", "precision=BF16"}),
                 nullptr, &console);
  EXPECT_THAT(console.str(), HasSubstr("device of process 0: cuda:0"));
  EXPECT_THAT(console.str(), HasSubstr("products in bf16"));
  EXPECT_EQ(records_in(kept.path()).start.products_dtype(), "bf16");
  expect_near(records_in(kept.path()).losses, records_in(host.path()).losses, 5e-3);
  const Weights found =
      run_to_end(run_with(recomputed.path(), {1, 1, 1},
                          {"model.layers=2", "device=CUDA", "precision=BF16", "recompute_activations=true"}),
                 nullptr, &recomputed_console);
  EXPECT_TRUE(found == expected);
  const auto activations = [](const std::string& text) {
    const auto begin = text.find("activations ");
    return text.substr(begin, text.find(", optimizer") - begin);
  };
  EXPECT_NE(activations(console.str()), activations(recomputed_console.str()));
}

/// Every safetensors file of one folder against that of the same name in another; how many there are.
int expect_near_files(const fs::path& found_in, const fs::path& expected_in, double tolerance) {
  int files = 0;
  for (const auto& entry : fs::directory_iterator(expected_in)) {
    if (entry.path().extension() != ".safetensors") continue;
    ++files;
    const SafetensorsFile expected(entry.path()), found(found_in / entry.path().filename());
    EXPECT_EQ(found.tensors().size(), expected.tensors().size()) << entry.path();
    for (const StoredTensor& tensor : expected.tensors()) {
      std::vector<double> a(static_cast<std::size_t>(tensor.elements())), b(a.size());
      expected.read<double>(tensor, 0, a);
      found.read<double>(found.expect(tensor.name, tensor.shape), 0, b);
      double off = 0, all = 0;
      for (std::size_t i = 0; i < a.size(); ++i) {
        off += (a[i] - b[i]) * (a[i] - b[i]);
        all += a[i] * a[i];
      }
      EXPECT_LE(std::sqrt(off), tolerance * std::sqrt(all)) << entry.path() << " " << tensor.name;
    }
  }
  return files;
}

// Weights and states before step 1, gradients of steps 1 and 2; and what a replay makes of them.
TEST(RunOnDevice, DumpsAndReplaysAsTheHost) {
  const ScratchDirectory host, device;
  const auto dump_in = [](const ScratchDirectory& scratch) { return scratch.path() / "dump"; };
  for (const ScratchDirectory* scratch : {&host, &device}) {
    RunConfig config = run_with(scratch->path(), {1, 2, 1}, {"dump={first_step: 1 steps: 2}"});
    config.mutable_dump()->set_folder(dump_in(*scratch).string());
    if (scratch == &device) config.set_device(RunConfig::CUDA);
    run_to_end(config);
  }
  EXPECT_EQ(expect_near_files(dump_in(device), dump_in(host), 1e-3), 4);  // weights, state, two steps

  for (const ScratchDirectory* scratch : {&host, &device}) {
    ReplayRequest request{.folder = dump_in(host),
                          .output = scratch->path() / "replayed",
                          .state = dump_in(host) / "state.safetensors",
                          .has_model = true,
                          .config = run_with(scratch->path(), {1, 2, 1}, {})};
    if (scratch == &device) request.config.set_device(RunConfig::CUDA);
    run_world(2, [&](Communicator& world) {
      replay(request, world);
      EXPECT_EQ(world.device(), nullptr);
    });
  }
  EXPECT_EQ(expect_near_files(device.path() / "replayed", host.path() / "replayed", 1e-4), 2);
}

TEST(RunOnDevice, RefusesWhatADeviceDoesNotDo) {
  const ScratchDirectory scratch;
  const auto refused = [&](const Settings& settings) {
    RunConfig config = run_with(scratch.path(), {2, 1, 1}, settings);
    config.set_device(RunConfig::CUDA);
    std::string message;
    std::mutex mutex;
    run_world(2, [&](Communicator& world) {
      try {
        Trainer<float>(config, world, {});
      } catch (const std::exception& failure) {
        EXPECT_EQ(world.device(), nullptr);
        const std::lock_guard lock(mutex);
        message = failure.what();
      }
    });
    EXPECT_FALSE(fs::exists(scratch.path() / "runs"));
    return message;
  };
  EXPECT_THAT(refused({"model.vocabulary=4000000", "model.width=20000"}), HasSubstr("the model takes "));
  EXPECT_THAT(refused({"optimizer.overlap=true"}),
              HasSubstr("optimizer.overlap: found true, expected false with device CUDA"));
}

}  // namespace
}  // namespace lowband
