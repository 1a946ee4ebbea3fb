// Replays of recordings written byte by byte: against the algorithms in plain double loops, and on other
// meshes.

#include "trainer/replay/replay.h"

#include "collectives/local/local_world.h"
#include "tests/trainer/replay/plain_algorithms.h"
#include "tests/trainer/replay/recording.h"

#include <algorithm>
#include <mutex>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using namespace test;

constexpr Index kFirst = 3, kSteps = 6;
constexpr double kRate = 0.03, kScalarRate = 0.01, kDecay = 0.1;
constexpr Index kRank = 3;

ReplayRequest request_of(const ScratchDirectory& scratch, const std::filesystem::path& folder,
                         const std::string& output, const std::vector<std::string>& settings) {
  ReplayRequest request{.folder = folder, .output = scratch.path() / output, .scalar_patterns = {"embed.*"}};
  for (const char* setting : {"optimizer.learning_rate=0.03", "optimizer.scalar_learning_rate=0.01",
                              "optimizer.weight_decay=0.1", "optimizer.clip_norm=0"})
    apply_override(request.config, setting);
  for (const std::string& setting : settings) apply_override(request.config, setting);
  return request;
}

ReplaySummary replay_on_threads(const ReplayRequest& request) {
  ReplaySummary summary;
  std::mutex mutex;
  run_world(mesh_shape(plan_replay(request).config).processes(), [&](Communicator& world) {
    const ReplaySummary own = replay(request, world);
    const std::lock_guard lock(mutex);
    if (world.process() == 0) summary = own;
  });
  return summary;
}

bool is_matrix(const RecordedTensor& tensor) {
  return tensor.shape.size() == 2 && tensor.name != "embed.weight";
}

Plain plain(const RecordedTensor& tensor, const std::vector<double>& values) {
  const bool rectangle = tensor.shape.size() == 2;
  Plain whole(rectangle ? tensor.shape[0] : 1, rectangle ? tensor.shape[1] : tensor.elements());
  whole.x = values;
  return whole;
}

/// Every state of the initial state file, as the reference and the file have it.
double state_number(const std::string& name, int replica, Index element) {
  const double number = recorded_number(name, 1000, replica, element);
  return name.ends_with(".v") ? number * number : number;
}

StoredArray state_array(const std::string& name, std::vector<Index> shape, int replica) {
  RecordedTensor tensor{name, std::move(shape)};
  std::vector<double> numbers;
  for (Index k = 0; k < tensor.elements(); ++k) numbers.push_back(state_number(name, replica, k));
  if (name.ends_with(".t")) numbers = {4};
  return stored_f64(name, tensor.shape, numbers);
}

/// The state of all parameters before the first step; M and e of each replica its own.
void write_state(const ScratchDirectory& scratch, bool power_sgd, int replicas) {
  for (int replica = 0; replica < replicas; ++replica) {
    std::vector<StoredArray> arrays;
    for (const RecordedTensor& tensor : recorded_tensors()) {
      const std::string& name = tensor.name;
      if (!is_matrix(tensor)) {
        arrays.push_back(state_array(name + ".m", tensor.shape, 0));
        arrays.push_back(state_array(name + ".v", tensor.shape, 0));
        arrays.push_back(state_array(name + ".t", {1}, 0));
        continue;
      }
      arrays.push_back(state_array(name + (power_sgd ? ".e" : ".M"), tensor.shape, replica));
      arrays.push_back(state_array(name + ".Q", {std::min(tensor.shape[0], tensor.shape[1]), kRank}, 0));
      if (power_sgd) arrays.push_back(state_array(name + ".u", tensor.shape, 0));
    }
    scratch.write(state_file_of("state.safetensors", replica, replicas), safetensors_bytes(arrays));
  }
}

Plain filled(const std::string& name, Index rows, Index cols, int replica) {
  Plain whole(rows, cols);
  for (Index k = 0; k < rows * cols; ++k)
    whole.x[static_cast<std::size_t>(k)] = state_number(name, replica, k);
  return whole;
}

/// What the weights of one tensor must be after all steps, with the diagnostics of a matrix.
struct Expected {
  Plain weights;
  double captured = 0;
  double drift = 0;
  std::vector<Plain> residual;
};

Expected expected_after(const RecordedTensor& tensor, bool power_sgd, int replicas) {
  const Plain initial = plain(tensor, recorded_numbers(tensor, -1, 0));
  const Index rows = initial.rows, cols = initial.cols;
  const auto gradients = [&](Index step) {
    std::vector<Plain> all;
    for (int i = 0; i < replicas; ++i) all.push_back(plain(tensor, recorded_numbers(tensor, step, i)));
    return all;
  };
  if (!is_matrix(tensor)) {
    PlainAdamW adamw;
    adamw.weight_decay = tensor.shape.size() == 1 ? 0 : kDecay;
    adamw.W = initial;
    adamw.m = filled(tensor.name + ".m", rows, cols, 0);
    adamw.v = filled(tensor.name + ".v", rows, cols, 0);
    adamw.t = 4;
    for (Index step = kFirst; step < kFirst + kSteps; ++step) adamw.step(gradients(step), kScalarRate);
    return {adamw.W, 0, 0, {}};
  }
  PlainMatrix matrix;
  matrix.power_sgd = power_sgd;
  matrix.weight_decay = kDecay;
  matrix.W = initial;
  matrix.Q = filled(tensor.name + ".Q", std::min(rows, cols), kRank, 0);
  matrix.u = filled(tensor.name + ".u", rows, cols, 0);
  for (int i = 0; i < replicas; ++i)
    matrix.S.push_back(filled(tensor.name + (power_sgd ? ".e" : ".M"), rows, cols, i));
  for (Index step = kFirst; step < kFirst + kSteps; ++step) matrix.step(gradients(step), kRate);
  return {matrix.W, matrix.captured, matrix.drift, matrix.S};
}

double largest_difference(const std::vector<double>& found, const Plain& expected) {
  EXPECT_EQ(found.size(), expected.x.size());
  double largest = 0;
  for (std::size_t k = 0; k < expected.x.size(); ++k)
    largest = std::max(largest, std::abs(found[k] - expected.x[k]));
  return largest;
}

struct Case {
  const char* kind;
  int replicas;
  const char* precision;
  double tolerance;  // of numbers of about 1: some hundred roundings of eps
};

Index element_bytes(const std::string& precision) { return precision == "F64" ? 8 : 4; }

class ReplayedReference : public testing::TestWithParam<Case> {};

TEST_P(ReplayedReference, GivesTheSameWeightsStateAndDiagnostics) {
  const auto& [kind, replicas, precision, tolerance] = GetParam();
  const bool power_sgd = std::string(kind) == "POWERSGD";
  const ScratchDirectory scratch;
  const auto folder = write_recording(scratch, "recording", replicas, kFirst, kSteps);
  write_state(scratch, power_sgd, replicas);
  auto request = request_of(scratch, folder, "out",
                            {cat("optimizer.kind=", kind), cat("precision=", precision), "profile.rank=3"});
  request.state = scratch.path() / "state.safetensors";
  const ReplaySummary summary = replay_on_threads(request);

  const auto weights = read_all(scratch.path() / "out/weights.safetensors");
  ASSERT_EQ(weights.size(), recorded_tensors().size());
  int next = 0;
  for (const RecordedTensor& tensor : recorded_tensors()) {
    SCOPED_TRACE(tensor.name);
    const Expected expected = expected_after(tensor, power_sgd, replicas);
    EXPECT_LT(largest_difference(weights.at(tensor.name), expected.weights), tolerance);
    if (!is_matrix(tensor)) continue;
    for (int replica = 0; replica < replicas; ++replica) {
      const auto state = read_all(state_file_of(scratch.path() / "out/state.safetensors", replica, replicas));
      EXPECT_LT(largest_difference(state.at(tensor.name + (power_sgd ? ".e" : ".M")),
                                   expected.residual[static_cast<std::size_t>(replica)]),
                10 * tolerance);
    }
    ASSERT_LT(next, summary.matrices_size());
    const auto& found = summary.matrices(next++);
    EXPECT_EQ(found.name(), tensor.name);
    EXPECT_NEAR(found.last_captured_energy(), expected.captured, 10 * tolerance);
    EXPECT_NEAR(found.last_drift(), expected.drift, 10 * tolerance);
    EXPECT_EQ(found.planned_bytes(), kRank * (tensor.shape[0] + tensor.shape[1]) * element_bytes(precision));
  }
  // r (m + n) of three matrices, and everything that is not a matrix.
  const Index element = element_bytes(precision);
  EXPECT_EQ(summary.planned_factor_bytes(), kRank * (20 + 15 + 16) * element);
  EXPECT_EQ(summary.planned_dense_bytes(), (66 + 7 + 12 + 1) * element);
  EXPECT_EQ(summary.counted_factor_bytes(), kSteps * summary.planned_factor_bytes());
  EXPECT_EQ(summary.counted_dense_bytes(), kSteps * summary.planned_dense_bytes());
  EXPECT_EQ(summary.counted_periodic_bytes(), kSteps * 2 * (91 + 54 + 64) * element);
  EXPECT_EQ(summary.dense_gradient_bytes(), (91 + 54 + 64) * element);
}

INSTANTIATE_TEST_SUITE_P(OptimizersAndReplicas, ReplayedReference,
                         testing::Values(Case{"DION", 1, "F64", 1e-12}, Case{"DION", 2, "F64", 1e-12},
                                         Case{"DION", 3, "F64", 1e-12}, Case{"DION", 2, "F32", 2e-5},
                                         Case{"POWERSGD", 1, "F64", 1e-12}, Case{"POWERSGD", 2, "F64", 1e-12},
                                         Case{"POWERSGD", 3, "F64", 1e-12},
                                         Case{"POWERSGD", 2, "F32", 2e-5}));

// The elementwise optimizers take every tensor; one step by hand.
TEST(Replay, AppliesElementwiseOptimizersToEverything) {
  const ScratchDirectory scratch;
  const auto folder = write_recording(scratch, "recording", 2, 0, 1);
  auto request = request_of(scratch, folder, "out", {"optimizer.kind=SGD", "precision=F64"});
  const ReplaySummary summary = replay_on_threads(request);
  EXPECT_EQ(summary.matrices_size(), 0);
  EXPECT_EQ(summary.planned_factor_bytes(), 0);
  const auto weights = read_all(scratch.path() / "out/weights.safetensors");
  for (const RecordedTensor& tensor : recorded_tensors()) {
    const auto w = recorded_numbers(tensor, -1, 0), g0 = recorded_numbers(tensor, 0, 0),
               g1 = recorded_numbers(tensor, 0, 1);
    const double eta = is_matrix(tensor) ? kRate : kScalarRate, decay = tensor.shape.size() == 1 ? 0 : kDecay;
    for (std::size_t k = 0; k < w.size(); ++k)
      EXPECT_NEAR(weights.at(tensor.name)[k], (1 - eta * decay) * w[k] - eta * 0.5 * (g0[k] + g1[k]), 1e-15)
          << tensor.name;
  }
}

TEST(Replay, FollowsTheScheduleByTheNumbersOfTheFiles) {
  const ScratchDirectory scratch;
  const auto folder = write_recording(scratch, "recording", 1, 2, 1);
  auto request = request_of(scratch, folder, "out",
                            {"optimizer.kind=SGD", "precision=F64", "schedule.steps=100",
                             "schedule.warmup_steps=10", "optimizer.weight_decay=0"});
  replay_on_threads(request);
  const RecordedTensor gain = recorded_tensors()[2];
  const double w = recorded_numbers(gain, -1, 0)[0], g = recorded_numbers(gain, 2, 0)[0];
  EXPECT_NEAR(read_all(scratch.path() / "out/weights.safetensors").at(gain.name)[0],
              w - 0.3 * kScalarRate * g, 1e-15);
}

std::string everything_written(const std::filesystem::path& output, int replicas) {
  std::string bytes = read_text(output / "weights.safetensors");
  for (int replica = 0; replica < replicas; ++replica)
    bytes += read_text(state_file_of(output / "state.safetensors", replica, replicas));
  return bytes;
}

// Two halves with the state in between are the whole, whatever the replicas keep of their own.
TEST(Replay, ContinuesFromTheStateThatItWrote) {
  const ScratchDirectory scratch;
  const std::vector<std::string> settings{"optimizer.kind=DION", "profile.rank=2", "optimizer.clip_norm=1"};
  const auto whole = write_recording(scratch, "whole", 2, 0, 6);
  replay_on_threads(request_of(scratch, whole, "out", settings));
  const auto first = write_recording(scratch, "first", 2, 0, 3);
  replay_on_threads(request_of(scratch, first, "half", settings));
  const auto second = write_recording(scratch, "second", 2, 3, 3);
  std::filesystem::copy_file(scratch.path() / "half/weights.safetensors", second / "weights.safetensors",
                             std::filesystem::copy_options::overwrite_existing);
  auto request = request_of(scratch, second, "rest", settings);
  request.state = scratch.path() / "half/state.safetensors";
  replay_on_threads(request);
  EXPECT_TRUE(everything_written(scratch.path() / "out", 2) ==
              everything_written(scratch.path() / "rest", 2));
}

TEST(Replay, GivesTheSameOnEveryMesh) {
  const ScratchDirectory scratch;
  const auto folder = write_recording(scratch, "recording", 2, 0, 5);
  for (const char* kind : {"DION", "POWERSGD", "LION", "SPECTRA", "ACPSGD", "GALORE"}) {
    std::vector<std::string> settings{cat("optimizer.kind=", kind), "precision=F64"};
    if (std::string(kind) != "LION" && std::string(kind) != "SPECTRA")
      settings.emplace_back("profile.rank=3");
    replay_on_threads(request_of(scratch, folder, cat(kind, "-1"), settings));
    const auto expected = read_all(scratch.path() / cat(kind, "-1") / "weights.safetensors");
    const auto expected_state = read_all(scratch.path() / cat(kind, "-1") / "state.replica-1.safetensors");
    for (const MeshShape& mesh :
         {MeshShape{2, 2, 1}, MeshShape{2, 3, 1}, MeshShape{2, 1, 2}, MeshShape{2, 2, 2}}) {
      const std::string output = cat(kind, "-", mesh.shard, "-", mesh.tensor);
      SCOPED_TRACE(output);
      auto own = settings;
      own.push_back(cat("mesh.shard=", mesh.shard));
      own.push_back(cat("mesh.tensor=", mesh.tensor));
      replay_on_threads(request_of(scratch, folder, output, own));
      for (const auto& [name, values] : read_all(scratch.path() / output / "weights.safetensors")) {
        for (std::size_t k = 0; k < values.size(); ++k)
          ASSERT_NEAR(values[k], expected.at(name)[k], 1e-12) << name;
      }
      const auto state = read_all(scratch.path() / output / "state.replica-1.safetensors");
      ASSERT_EQ(state.size(), expected_state.size());
      for (const auto& [name, values] : state) {
        ASSERT_EQ(values.size(), expected_state.at(name).size()) << name;
        for (std::size_t k = 0; k < values.size(); ++k)
          ASSERT_NEAR(values[k], expected_state.at(name)[k], 1e-11) << name;
      }
    }
  }
}

}  // namespace
}  // namespace lowband
