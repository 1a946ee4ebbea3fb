// A whole run: what is counted, how it is interrupted and continued, and what it refuses.

#include "collectives/agreement.h"
#include "collectives/local/local_world.h"
#include "tests/trainer/scratch_directory.h"
#include "tests/trainer/small_run.h"
#include "trainer/byte_plan.h"
#include "trainer/trainer.h"

#include <cmath>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using testing::HasSubstr;
namespace fs = std::filesystem;

constexpr MeshShape kMesh{2, 1, 2};

/// Runs `config` as threads and returns the weights of every process, by process and name.
using Weights = std::map<std::string, std::vector<float>>;
Weights run_to_end(const RunConfig& config, const std::atomic<bool>* stop = nullptr) {
  Weights weights;
  std::mutex mutex;
  run_world(config.mesh().replica() * config.mesh().shard() * config.mesh().tensor(),
            [&](Communicator& world) {
              Trainer<float> trainer(config, world, {stop, nullptr});
              const RunOutcome outcome = trainer.run();
              EXPECT_EQ(outcome.interrupted, stop != nullptr);
              const std::lock_guard lock(mutex);
              for (const auto& parameter : trainer.parameters()) {
                const auto flat = parameter.weight.flat();
                weights[cat(world.process(), " ", parameter.info.name)].assign(flat.begin(), flat.end());
              }
            });
  return weights;
}

bool same_bits(const Weights& a, const Weights& b) {
  return a.size() == b.size() && std::all_of(a.begin(), a.end(), [&](const auto& entry) {
           const auto other = b.find(entry.first);
           return other != b.end() && other->second.size() == entry.second.size() &&
                  std::memcmp(other->second.data(), entry.second.data(), 4 * entry.second.size()) == 0;
         });
}

TEST(Training, FactorBytesCountedEqualBytesPlannedEveryStep) {
  const ScratchDirectory scratch;
  const RunConfig config = small_run(scratch.path(), kMesh);
  run_to_end(config);
  const auto lines = read_run_lines(scratch.path() / "runs/run");
  // B(r) by hand: rank 5; q, k, v, o are 24 x 20 or 20 x 24, gate, up, down 35 x 20; 2 layers; 4 bytes.
  const Index planned = 2 * 5 * (4 * (24 + 20) + 3 * (35 + 20)) * 4;
  int steps = 0;
  for (const RunLine& line : lines) {
    if (!line.has_step()) continue;
    ++steps;
    EXPECT_EQ(line.step().counted_factor_bytes(), planned);
    Index dense = 0, control = 0;
    for (const TransferSum& sum : line.step().transfers()) {
      if (sum.axis() == "replica" && sum.purpose() == "dense") dense += sum.payload_bytes();
      if (sum.purpose() == "control") control += sum.payload_bytes();
    }
    // Process 0 holds half of the vocabulary's rows, and all of the five norm gains.
    EXPECT_EQ(dense, (64 * 20 + 5 * 20) * 4);
    EXPECT_EQ(line.step().counted_dense_bytes(), (128 * 20 + 2 * 5 * 20) * 4);
    EXPECT_GT(control, 0);
  }
  EXPECT_EQ(steps, 20);
  const RunSummary summary = read_run_summary(scratch.path() / "runs/run");
  EXPECT_EQ(summary.planned_factor_bytes(), planned);
  EXPECT_EQ(summary.counted_factor_bytes(), planned);
  EXPECT_EQ(summary.counted_dense_bytes(), (128 * 20 + 2 * 5 * 20) * 4);
  EXPECT_GT(summary.optimizer_seconds_per_step(), 0);
  EXPECT_GT(summary.seconds_per_step(), summary.optimizer_seconds_per_step());
  // Four processes compare a hash of 8 bytes after every step.
  EXPECT_EQ(summary.periodic_bytes(), 20 * 4 * 8);
  EXPECT_EQ(summary.periodic_bytes_per_step(), 4 * 8);
  EXPECT_EQ(summary.dense_gradient_bytes(), 2 * (4 * 24 * 20 + 3 * 35 * 20) * 4);
  EXPECT_LT(summary.final_validation_loss(), 4.0);
}

// Rank 12 is above the break-even rank of the attention matrices alone.
TEST(Training, BytesOfAMixedExchangeAreCountedAsPlanned) {
  const ScratchDirectory scratch;
  RunConfig config = small_run(scratch.path(), kMesh);
  for (const char* setting : {"optimizer.kind=POWERSGD", "optimizer.exchange=AUTO", "profile.rank=12"})
    apply_override(config, setting);
  run_to_end(config);
  for (const RunLine& line : read_run_lines(scratch.path() / "runs/run")) {
    if (!line.has_step()) continue;
    EXPECT_EQ(line.step().counted_factor_bytes(), 2 * 12 * 3 * (35 + 20) * 4);
    EXPECT_EQ(line.step().counted_dense_bytes(), (2 * 4 * 24 * 20 + 128 * 20 + 2 * 5 * 20) * 4);
  }
}

TEST(Training, SummaryHasWhatEachProcessSent) {
  const ScratchDirectory scratch;
  run_to_end(small_run(scratch.path(), kMesh));
  const RunSummary summary = read_run_summary(scratch.path() / "runs/run");
  ASSERT_EQ(summary.traffic_size(), kMesh.processes());
  Index most = 0;
  for (const ProcessTraffic& process : summary.traffic()) most = std::max(most, process.state_bytes());
  EXPECT_EQ(summary.state_bytes(), most);
  EXPECT_EQ(planned_state_bytes(small_run(scratch.path(), kMesh)), most);
  EXPECT_GT(summary.peak_memory_bytes(), most);
  EXPECT_GT(most, 0);
  double first_modelled = 0, modelled = 0;
  Index first_transport = 0, transport = 0;
  for (const TransferSum& sum : summary.transfers()) {
    first_modelled += sum.modelled_wire_bytes();
    first_transport += sum.transport_bytes();
  }
  for (const ProcessTraffic& process : summary.traffic()) {
    modelled += process.modelled_wire_bytes();
    transport += process.transport_bytes();
  }
  EXPECT_DOUBLE_EQ(summary.traffic(0).modelled_wire_bytes(), first_modelled);
  EXPECT_EQ(summary.traffic(0).transport_bytes(), first_transport);
  // Groups of all sizes send what their model says, though not each process the same.
  EXPECT_DOUBLE_EQ(modelled, static_cast<double>(transport));
}

class TrainingWith : public testing::TestWithParam<std::vector<const char*>> {
 public:
  /// The small run with the settings of the case.
  static RunConfig run_in(const ScratchDirectory& scratch, const MeshShape& mesh = kMesh) {
    RunConfig config = small_run(scratch.path(), mesh);
    for (const char* setting : GetParam()) apply_override(config, setting);
    if (!has_factor_ranks(config)) config.clear_profile();
    return config;
  }
};

std::string case_name(const testing::TestParamInfo<std::vector<const char*>>& parameter) {
  std::string name = "As";
  for (const char* setting : parameter.param) name += cat("_", setting);
  std::replace_if(
      name.begin(), name.end(), [](unsigned char c) { return std::isalnum(c) == 0 && c != '_'; }, '_');
  return name;
}

using Continued = TrainingWith;
TEST_P(Continued, RunIsBitIdentical) {
  const ScratchDirectory whole, halves;
  const Weights expected = run_to_end(run_in(whole));
  RunConfig config = run_in(halves);
  std::atomic<bool> stop = true;  // ends after the first step
  config.mutable_checkpoint()->set_resume("auto");
  run_to_end(config, &stop);
  EXPECT_FALSE(fs::exists(halves.path() / "runs/run/summary.json"));
  run_to_end(config, &stop);  // and after the second
  EXPECT_TRUE(same_bits(run_to_end(config), expected));

  // The record reads as if nothing had happened: every step once, in order, with the same losses.
  std::vector<double> losses, expected_losses;
  for (const auto& line : read_run_lines(halves.path() / "runs/run")) {
    if (line.has_step()) losses.push_back(line.step().loss());
  }
  for (const auto& line : read_run_lines(whole.path() / "runs/run")) {
    if (line.has_step()) expected_losses.push_back(line.step().loss());
  }
  EXPECT_EQ(losses, expected_losses);

  // And so do the totals of what was exchanged.
  const auto payload = [](const fs::path& run, const char* axis, const char* purpose) {
    const RunSummary summary = read_run_summary(run);
    for (const TransferSum& sum : summary.transfers())
      if (sum.axis() == axis && sum.purpose() == purpose) return Index{sum.payload_bytes()};
    return Index{0};
  };
  for (const auto& [axis, purpose] : {std::pair("replica", "factor"), std::pair("replica", "dense"),
                                      std::pair("tensor", "activation"), std::pair("world", "periodic")}) {
    const Index found = payload(halves.path() / "runs/run", axis, purpose);
    EXPECT_GT(found, 0) << axis << " " << purpose;
    EXPECT_EQ(found, payload(whole.path() / "runs/run", axis, purpose)) << axis << " " << purpose;
  }
}

INSTANTIATE_TEST_SUITE_P(Optimizers, Continued,
                         testing::Values(std::vector<const char*>{}, std::vector{"optimizer.kind=POWERSGD"},
                                         std::vector{"optimizer.kind=POWERSGD", "optimizer.overlap=true",
                                                     "optimizer.bucket_mib=0.01"},
                                         std::vector{"optimizer.kind=POWERSGD", "optimizer.exchange=AUTO",
                                                     "profile.rank=12"},
                                         std::vector{"optimizer.kind=ACPSGD", "optimizer.overlap=true",
                                                     "optimizer.bucket_mib=0.01"},
                                         std::vector{"optimizer.kind=GALORE", "optimizer.galore_interval=4"}),
                         case_name);

using Overlapped = TrainingWith;
// Several buckets of a gradient of 50 KB on each of the two tensor processes, announced by the last of three
// micro-batches; clipping is at work, so that the norm must be the same bits too.
TEST_P(Overlapped, RunIsBitIdentical) {
  const ScratchDirectory plain, overlapped;
  RunConfig config = run_in(plain);
  for (const char* setting : {"batch.sequences_per_micro_batch=2", "optimizer.clip_norm=0.1"})
    apply_override(config, setting);
  const Weights expected = run_to_end(config);
  config.set_output_dir((overlapped.path() / "runs").string());
  for (const char* setting : {"optimizer.overlap=true", "optimizer.bucket_mib=0.01"})
    apply_override(config, setting);
  EXPECT_TRUE(same_bits(run_to_end(config), expected));

  bool clipped = false;
  for (const RunLine& line : read_run_lines(overlapped.path() / "runs/run"))
    clipped = clipped || (line.has_step() && line.step().clip_scale() < 1);
  EXPECT_TRUE(clipped);
  const RunSummary summary = read_run_summary(overlapped.path() / "runs/run");
  EXPECT_GT(summary.exchange_seconds(), 0);
  EXPECT_LE(summary.exposed_seconds(), summary.exchange_seconds());
}
INSTANTIATE_TEST_SUITE_P(
    Optimizers, Overlapped,
    testing::Values(std::vector<const char*>{}, std::vector{"optimizer.kind=POWERSGD"},
                    std::vector{"optimizer.kind=POWERSGD", "optimizer.exchange=AUTO", "profile.rank=12"},
                    std::vector{"optimizer.kind=ACPSGD"},
                    std::vector{"optimizer.kind=GALORE", "optimizer.galore_interval=4"},
                    std::vector{"optimizer={kind: SPECTRA learning_rate: 0.01 spectra_fraction: 0.1}"},
                    std::vector{"optimizer={kind: ADAMW learning_rate: 0.01}"},
                    std::vector{"optimizer={kind: MUON learning_rate: 0.01}"},
                    std::vector{"optimizer={kind: MUONBP learning_rate: 0.01 muonbp_period: 2 "
                                "muonbp_block_learning_rate: 0.02}"},
                    std::vector{"optimizer={kind: NORDION2 learning_rate: 0.01}"}),
    case_name);

using Diagnosed = TrainingWith;
// Twenty steps, measured every six: after 6, 12 and 18.
TEST_P(Diagnosed, RunIsBitIdenticalAndSaysHowEveryMatrixDid) {
  const ScratchDirectory plain, diagnosed;
  const Weights expected = run_to_end(run_in(plain));
  RunConfig config = run_in(diagnosed);
  apply_override(config, "diagnostics.interval_steps=6");
  EXPECT_TRUE(same_bits(run_to_end(config), expected));

  const Index measured_bytes = 2 * 2 * (4 * 24 * 20 + 3 * 35 * 20) * 4;  // two means of every layer matrix
  std::vector<Index> steps;
  for (const RunLine& line : read_run_lines(diagnosed.path() / "runs/run")) {
    if (line.has_step()) {
      EXPECT_EQ(line.step().counted_periodic_bytes(), line.step().step() % 6 == 0 ? measured_bytes : 0);
    }
    if (!line.has_diagnostics()) continue;
    steps.push_back(line.diagnostics().step());
    ASSERT_EQ(line.diagnostics().matrices_size(), 14);
    EXPECT_EQ(line.diagnostics().matrices(0).name(), "model.layers.0.self_attn.q_proj.weight");
    EXPECT_EQ(line.diagnostics().matrices(13).name(), "model.layers.1.mlp.down_proj.weight");
    for (const auto& matrix : line.diagnostics().matrices()) {
      EXPECT_EQ(matrix.factor_rank(), 5);
      EXPECT_GT(matrix.captured_energy(), 0);
      EXPECT_LE(matrix.captured_energy(), 1 + 1e-5);
      EXPECT_GT(matrix.drift(), 0) << "replicas have other data";
      EXPECT_LT(matrix.mass_leak(), 1e-5) << "what was not sent is kept";
    }
  }
  EXPECT_THAT(steps, testing::ElementsAre(6, 12, 18));
}
INSTANTIATE_TEST_SUITE_P(Optimizers, Diagnosed,
                         testing::Values(std::vector<const char*>{}, std::vector{"optimizer.kind=POWERSGD"},
                                         std::vector{"optimizer.kind=POWERSGD", "optimizer.overlap=true",
                                                     "optimizer.bucket_mib=0.01"},
                                         std::vector{"optimizer.residual=AGGREGATED"}),
                         case_name);

// Threads as processes have nothing faster than exact sums, and say so.
TEST(Training, RecordsTheDeterminismThatIsGiven) {
  const ScratchDirectory scratch;
  RunConfig config = small_run(scratch.path(), kMesh);
  config.set_determinism(RunConfig::FAST);
  run_world(kMesh.processes(), [&](Communicator& world) { Trainer<float>(config, world, {}); });
  EXPECT_EQ(read_run_lines(scratch.path() / "runs/run").at(0).start().determinism(), "exact");
}

using Rounded = TrainingWith;
// Hashes are compared after every step: rounding on the wire leaves replicas identical.
TEST_P(Rounded, RunTrainsWithHalfTheFactorBytes) {
  const ScratchDirectory scratch;
  RunConfig config = run_in(scratch, {3, 1, 1});
  apply_override(config, "optimizer.wire=BF16");
  run_to_end(config);
  const RunSummary summary = read_run_summary(scratch.path() / "runs/run");
  EXPECT_EQ(summary.wire_dtype(), "bf16");
  EXPECT_EQ(summary.counted_factor_bytes(), 2 * 5 * (4 * (24 + 20) + 3 * (35 + 20)) * 2);
  const auto lines = read_run_lines(scratch.path() / "runs/run");
  EXPECT_LT(summary.final_loss(), 0.85 * lines.at(1).step().loss());
}
INSTANTIATE_TEST_SUITE_P(Optimizers, Rounded,
                         testing::Values(std::vector<const char*>{}, std::vector{"optimizer.kind=POWERSGD"},
                                         std::vector{"optimizer.residual=AGGREGATED"}),
                         case_name);

TEST(Training, StopsOnAllProcessesWhenTheLossStaysNotFinite) {
  const ScratchDirectory scratch;
  RunConfig config = small_run(scratch.path(), kMesh);
  config.mutable_optimizer()->set_learning_rate(1e10);
  config.mutable_optimizer()->set_scalar_learning_rate(1e10);
  config.mutable_schedule()->set_warmup_steps(0);
  std::atomic<int> stopped = 0;
  run_world(kMesh.processes(), [&](Communicator& world) {
    try {
      Trainer<float>(config, world, {}).run();
    } catch (const AgreedFailure& failure) {
      ++stopped;
      EXPECT_THAT(failure.what(), HasSubstr("found no finite loss for 5 steps"));
    }
  });
  EXPECT_EQ(stopped, kMesh.processes());
}

TEST(Training, StopsWhenOneBitOfOneReplicaDiffers) {
  const ScratchDirectory scratch;
  const RunConfig config = small_run(scratch.path(), kMesh);  // compares hashes after every step
  std::atomic<int> stopped = 0;
  run_world(kMesh.processes(), [&](Communicator& world) {
    Trainer<float> trainer(config, world, {});
    trainer.step();
    if (world.process() == 3) {
      // The last bit of one norm gain: far too little for the loss to show.
      float& element = trainer.parameters().back().weight.flat().back();
      element = std::nextafter(element, 2.0F);
    }
    try {
      trainer.run();
    } catch (const Error& error) {
      EXPECT_THAT(error.what(), testing::AllOf(HasSubstr("replicas differ"), HasSubstr("on process 3"),
                                               HasSubstr("as on process 1")));
      ++stopped;
    }
  });
  EXPECT_EQ(stopped, kMesh.processes());
}

TEST(Training, CompleteRunIsNotTouched) {
  const ScratchDirectory scratch;
  RunConfig config = small_run(scratch.path(), {});
  config.mutable_checkpoint()->set_resume("auto");
  run_to_end(config);
  const auto record = scratch.path() / "runs/run/run.jsonl";
  const auto before = fs::last_write_time(record);
  const auto bytes = fs::file_size(record);
  run_world(1, [&](Communicator& world) {
    const RunOutcome again = Trainer<float>(config, world, {}).run();
    EXPECT_EQ(again.summary.steps(), 20);
    EXPECT_GT(again.summary.final_validation_loss(), 0);
  });
  EXPECT_EQ(fs::last_write_time(record), before);
  EXPECT_EQ(fs::file_size(record), bytes);
}

// As after a death between the last checkpoint and the summary.
TEST(Training, CompleteRunWithoutItsSummaryGetsItAgain) {
  const ScratchDirectory scratch;
  RunConfig config = small_run(scratch.path(), {});
  config.mutable_checkpoint()->set_resume("auto");
  run_to_end(config);
  const RunSummary first = read_run_summary(scratch.path() / "runs/run");
  fs::remove(scratch.path() / "runs/run/summary.json");
  run_to_end(config);
  const RunSummary again = read_run_summary(scratch.path() / "runs/run");
  EXPECT_EQ(again.final_loss(), first.final_loss());
  EXPECT_EQ(again.final_validation_loss(), first.final_validation_loss());
  EXPECT_EQ(again.counted_factor_bytes(), first.counted_factor_bytes());
  EXPECT_EQ(again.ratio_to_dense(), first.ratio_to_dense());
}

TEST(Training, DataPathMayHoldTheCharactersOfPatterns) {
  const ScratchDirectory scratch;
  RunConfig config = small_run(scratch.path(), {});
  fs::rename(scratch.path() / "train.bin", scratch.path() / "train[1].bin");
  config.mutable_data()->set_train(0, (scratch.path() / "train[1].bin").string());
  EXPECT_NO_THROW(run_world(1, [&](Communicator& world) { Trainer<float>(config, world, {}); }));
}

// Checkpoints of two runs in one folder: the older run's later steps would outlive the new run's.
TEST(Training, RunBeginsAnewInAFolderWithoutCheckpointsOnly) {
  const ScratchDirectory scratch;
  RunConfig config = small_run(scratch.path(), {});
  run_to_end(config);
  const auto record = scratch.path() / "runs/run/run.jsonl";
  const auto bytes = fs::file_size(record);
  const auto refusal_of = [](const RunConfig& refused) {
    std::string message;
    run_world(1, [&](Communicator& world) {
      try {
        Trainer<float>(refused, world, {}).run();
      } catch (const InvalidArgument& error) {
        message = error.what();
      }
    });
    return message;
  };
  EXPECT_THAT(refusal_of(config), testing::AllOf(HasSubstr("checkpoint.resume: found none"),
                                                 HasSubstr("step-000020"), HasSubstr("expected auto")));
  config.mutable_schedule()->set_steps(19);
  config.mutable_checkpoint()->set_resume("auto");
  EXPECT_THAT(refusal_of(config), testing::StartsWith("schedule.steps: found 19, expected at least 20"));
  EXPECT_EQ(fs::file_size(record), bytes);
}

TEST(Training, TimelineHasEveryPhase) {
  const ScratchDirectory scratch;
  RunConfig config = small_run(scratch.path(), kMesh);
  config.set_trace(true);
  run_to_end(config);
  for (int process = 0; process < 4; ++process) {
    std::ifstream file(scratch.path() / cat("runs/run/timeline-", process, ".json"));
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    for (const char* phase :
         {"step 19", "forward_backward", "optimizer", "all_reduce", "validation", "checkpoint"}) {
      EXPECT_THAT(text, HasSubstr(phase)) << process;
    }
  }
}

/// Expects that the run is refused on all processes with a message that has all the parts, and writes
/// nothing.
void expect_refused(const RunConfig& config, const std::vector<std::string>& parts) {
  int refused = 0;
  const int processes = 4;
  std::mutex mutex;
  run_world(processes, [&](Communicator& world) {
    try {
      Trainer<float>(config, world, {}).run();
    } catch (const InvalidArgument& error) {
      const std::lock_guard lock(mutex);
      ++refused;
      for (const std::string& part : parts) EXPECT_THAT(error.what(), HasSubstr(part));
    }
  });
  EXPECT_EQ(refused, processes);
  EXPECT_FALSE(fs::exists(config.output_dir() + "/" + config.name()));
}

TEST(Training, RefusesWhatDoesNotFitBeforeWritingAnything) {
  const ScratchDirectory scratch;
  const RunConfig good = small_run(scratch.path(), kMesh);

  RunConfig config = good;
  config.mutable_mesh()->set_replica(3);
  expect_refused(config, {"mesh", "3", "4"});

  config = good;
  config.mutable_data()->set_train(0, (scratch.path() / "absent*.bin").string());
  expect_refused(config, {"data.train", "absent*.bin", "expected"});

  config = good;
  fs::copy_file(scratch.path() / "train.bin", scratch.path() / "truncated.bin");
  fs::resize_file(scratch.path() / "truncated.bin", 10000);
  config.mutable_data()->set_train(0, (scratch.path() / "truncated.bin").string());
  expect_refused(config, {"truncated.bin", "found", "expected"});

  config = good;
  config.mutable_model()->set_vocabulary(70);  // the letters go up to 'A' + 31 = 96
  expect_refused(config, {"train.bin", "found", "expected"});

  config = good;
  config.mutable_validation()->set_sequences(100000);
  expect_refused(config, {"validation.sequences", "100000", "expected at most"});

  config = good;
  config.mutable_profile()->set_rank(21);
  expect_refused(config, {"rank", "21", "20"});

  config = good;
  config.mutable_checkpoint()->set_resume((scratch.path() / "nothing-here").string());
  expect_refused(config, {"nothing-here"});

  config = good;
  std::ofstream(scratch.path() / "a_file") << "not a folder";
  config.set_output_dir((scratch.path() / "a_file").string());
  expect_refused(config, {"a_file"});
}

TEST(Training, RefusesTheCheckpointOfAnotherModelAndLeavesItAlone) {
  const ScratchDirectory scratch;
  RunConfig config = small_run(scratch.path(), kMesh);
  run_to_end(config);
  config.mutable_checkpoint()->set_resume((scratch.path() / "runs/run/checkpoints/step-000020").string());
  config.set_name("other");
  config.mutable_model()->set_ffn_width(36);
  expect_refused(config, {"model.ffn_width", "35", "36"});
}

}  // namespace
}  // namespace lowband
