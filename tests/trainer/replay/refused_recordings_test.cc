// What a replay refuses: each with file, tensor, found and expected, and with nothing written.

#include "collectives/local/local_world.h"
#include "tests/trainer/replay/recording.h"
#include "trainer/replay/recorded_parameters.h"
#include "trainer/replay/replay.h"

#include <functional>
#include <limits>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using namespace test;
using testing::HasSubstr;

class RefusedRecording : public testing::Test {
 protected:
  RefusedRecording() : folder_(write_recording(scratch_, "recording", 2, 0, 3)) {
    request_ = {.folder = folder_, .output = scratch_.path() / "out", .scalar_patterns = {"embed.*"}};
    set("optimizer.learning_rate=0.01");
    set("profile.rank=2");
  }
  void set(const std::string& setting) { apply_override(request_.config, setting); }
  void write(const std::string& name, const std::vector<StoredArray>& arrays) {
    scratch_.write("recording/" + name, safetensors_bytes(arrays));
  }
  /// The replay fails with a message that has all parts, and leaves nothing.
  void expect_refused(const std::vector<std::string>& parts, int processes = 2) {
    const std::string message = thrown_message<InvalidArgument>(
        [&] { run_world(processes, [&](Communicator& world) { replay(request_, world); }); });
    for (const std::string& part : parts) EXPECT_THAT(message, HasSubstr(part));
    EXPECT_THAT(message, HasSubstr("expected"));
    EXPECT_FALSE(std::filesystem::exists(request_.output));
  }

  ScratchDirectory scratch_;
  std::filesystem::path folder_;
  ReplayRequest request_;
};

constexpr const char* kBadStep = "step-000002.replica-1.safetensors";

TEST_F(RefusedRecording, WithoutAFaultItIsReplayed) {
  run_world(2, [&](Communicator& world) { replay(request_, world); });
  EXPECT_TRUE(std::filesystem::exists(request_.output / "replay.jsonl"));
}

TEST_F(RefusedRecording, GradientsWithAMissingTensor) {
  auto arrays = recorded_arrays(2, 1);
  arrays.erase(arrays.begin() + 3);
  write(kBadStep, arrays);
  expect_refused({kBadStep, "b.weight", "found no such tensor", "(6, 9)"});
}

TEST_F(RefusedRecording, GradientsWithATensorTooMany) {
  auto arrays = recorded_arrays(2, 1);
  arrays.push_back(stored_f32("z.weight", {1}, {0}));
  write(kBadStep, arrays);
  expect_refused({kBadStep, "z.weight", "(1)", "only the 7"});
}

TEST_F(RefusedRecording, GradientsOfAnotherShape) {
  auto arrays = recorded_arrays(2, 1);
  arrays[1].shape = {7, 13};
  write(kBadStep, arrays);
  expect_refused({kBadStep, "a.q_proj.weight", "shape", "(7, 13)", "(13, 7)"});
}

TEST_F(RefusedRecording, GradientsThatAreNotFinite) {
  auto arrays = recorded_arrays(2, 1);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  arrays[2] = stored_f32("a.norm.weight", {7}, {0, 0, 0, 0, nan, 0, 0});
  write(kBadStep, arrays);
  expect_refused({kBadStep, "a.norm.weight", "nan", "element 4", "finite"});
}

TEST_F(RefusedRecording, TruncatedGradients) {
  const std::string bytes = safetensors_bytes(recorded_arrays(2, 1));
  scratch_.write(cat("recording/", kBadStep), bytes.substr(0, bytes.size() - 4));
  expect_refused({kBadStep, "e.scale", "truncated"});
}

TEST_F(RefusedRecording, AMissingFileOfAReplica) {
  std::filesystem::remove(folder_ / kBadStep);
  expect_refused({"recording", "step 2", "found no", kBadStep});
}

TEST_F(RefusedRecording, AGapBetweenSteps) {
  for (int replica : {0, 1}) std::filesystem::remove(folder_ / step_file_name(1, replica));
  expect_refused({"recording", "step 2", "after step 0", "step-000001.replica-0.safetensors"});
}

TEST_F(RefusedRecording, MissingOrEmptyWeights) {
  write("weights.safetensors", {});
  expect_refused({"weights.safetensors", "found no tensor"});
  write("weights.safetensors", {stored_f32("x", {0, 3}, {})});
  request_.scalar_patterns.clear();
  expect_refused({"weights.safetensors", "x", "(0, 3)", "at least one element"});
  std::filesystem::remove(folder_ / "weights.safetensors");
  const auto run = [&] { run_world(2, [&](Communicator& world) { replay(request_, world); }); };
  EXPECT_THAT(thrown_message<InvalidArgument>(run), HasSubstr("weights.safetensors"));
  EXPECT_FALSE(std::filesystem::exists(request_.output));
}

TEST_F(RefusedRecording, AnOutputFolderWithSomethingInIt) {
  scratch_.write("taken/file", "x");
  request_.output = scratch_.path() / "taken";
  const auto run = [&] { run_world(2, [&](Communicator& world) { replay(request_, world); }); };
  EXPECT_THAT(thrown_message<InvalidArgument>(run), HasSubstr("--out: found"));
  EXPECT_EQ(read_text(scratch_.path() / "taken/file"), "x");
}

TEST_F(RefusedRecording, AnotherNumberOfProcesses) {
  expect_refused({"mesh", "replica 2", "3 processes"}, 3);
}

TEST_F(RefusedRecording, PatternsAndProfilesThatDoNotFit) {
  request_.scalar_patterns = {"embed.*", "*.norm.weight"};
  expect_refused({"--scalar-parameters", "*.norm.weight", "no tensor of two dimensions"});
  request_.scalar_patterns = {"embed.*"};
  set("profile.rank=7");
  expect_refused({"profile", "7", "b.weight"});
  *request_.config.mutable_profile() = parse_profile("structural");
  expect_refused({"profile", "width and head_dim"});
  set("model.width=8");
  expect_refused({"profile", "found 8 and 0", "width and head_dim"});
  set("model.head_dim=2");
  expect_refused({"profile", "b.weight", "q_proj"});
  request_.config.mutable_profile()->Clear();
  set("profile.rank=2");
  request_.scalar_patterns = {"*"};
  expect_refused({"weights.safetensors", "no layer matrix", "DION"});
  request_.config.mutable_optimizer()->clear_learning_rate();
  expect_refused({"optimizer.learning_rate", "nothing"});
}

std::vector<StoredArray> good_state() {
  std::vector<StoredArray> arrays;
  for (const RecordedTensor& tensor : recorded_tensors()) {
    const std::vector<double> ones(static_cast<std::size_t>(tensor.elements()), 1.0);
    if (tensor.shape.size() == 2 && tensor.name != "embed.weight") {
      const Index narrow = std::min(tensor.shape[0], tensor.shape[1]);
      arrays.push_back(stored_f32(tensor.name + ".M", tensor.shape, ones));
      arrays.push_back(
          stored_f32(tensor.name + ".Q", {narrow, 2}, recorded_numbers({"Q", {narrow, 2}}, 0, 0)));
    } else {
      arrays.push_back(stored_f32(tensor.name + ".m", tensor.shape, ones));
      arrays.push_back(stored_f32(tensor.name + ".v", tensor.shape, ones));
      arrays.push_back(stored_f32(tensor.name + ".t", {1}, {1}));
    }
  }
  return arrays;
}

TEST_F(RefusedRecording, AnInitialStateThatDoesNotFit) {
  request_.state = scratch_.path() / "state.safetensors";
  const auto run = [&] { run_world(2, [&](Communicator& world) { replay(request_, world); }); };
  EXPECT_THAT(thrown_message<InvalidArgument>(run), HasSubstr("state.replica-0.safetensors"));

  auto arrays = good_state();
  arrays.erase(arrays.begin());
  scratch_.write("state.safetensors", safetensors_bytes(arrays));
  expect_refused({"state.safetensors", "embed.weight.m", "found no such tensor"});
  arrays = good_state();
  set("profile.rank=3");
  scratch_.write("state.safetensors", safetensors_bytes(arrays));
  expect_refused({"state.safetensors", "a.q_proj.weight.Q", "(7, 2)", "(7, 3)"});
  set("profile.rank=2");
  arrays.push_back(stored_f32("b.weight.u", {6, 9}, std::vector<double>(54)));
  scratch_.write("state.safetensors", safetensors_bytes(arrays));
  expect_refused({"state.safetensors", "b.weight.u"});

  std::filesystem::remove(scratch_.path() / "state.safetensors");
  arrays = good_state();
  scratch_.write("state.replica-0.safetensors", safetensors_bytes(arrays));
  arrays[4].bytes[0] ^= 1;  // of a.q_proj.weight.Q
  ASSERT_EQ(arrays[4].name, "a.q_proj.weight.Q");
  scratch_.write("state.replica-1.safetensors", safetensors_bytes(arrays));
  expect_refused({"a.q_proj.weight.Q", "other numbers for replica 1 than for replica 0"});
}

TEST(RecordedParameters, FollowFromNamesAndShapes) {
  const ScratchDirectory scratch;
  const SafetensorsFile file(scratch.write("w.safetensors", safetensors_bytes(recorded_arrays(-1, 0))));
  const auto parameters = parameters_of_file(file, {"*embed*"});
  struct Row {
    const char* name;
    Role role;
    Index rows, cols;
  };
  const std::vector<Row> expected{{"embed.weight", Role::kEmbedding, 11, 6},
                                  {"a.q_proj.weight", Role::kQuery, 13, 7},
                                  {"a.norm.weight", Role::kNorm, 1, 7},
                                  {"b.weight", Role::kUp, 6, 9},
                                  {"c.weight", Role::kUp, 8, 8},
                                  {"d.kernel", Role::kEmbedding, 1, 12},
                                  {"e.scale", Role::kEmbedding, 1, 1}};
  ASSERT_EQ(parameters.size(), expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(parameters[i].info.name, expected[i].name);
    EXPECT_EQ(parameters[i].info.role, expected[i].role) << expected[i].name;
    EXPECT_EQ(parameters[i].info.rows, expected[i].rows) << expected[i].name;
    EXPECT_EQ(parameters[i].info.cols, expected[i].cols) << expected[i].name;
    EXPECT_EQ(parameters[i].shape, recorded_tensors()[i].shape) << expected[i].name;
  }
}

TEST(RecordedParameters, OfAModelMustBeAllOfThem) {
  const ScratchDirectory scratch;
  const ModelConfig model{.vocabulary = 3, .width = 2, .layers = 0, .heads = 1, .kv_heads = 1, .head_dim = 2};
  const auto embedding = stored_f32("model.embed_tokens.weight", {3, 2}, {1, 2, 3, 4, 5, 6});
  const auto gain = stored_f32("model.norm.weight", {2}, {1, 1});
  const auto open = [&](const std::vector<StoredArray>& arrays) {
    return SafetensorsFile(scratch.write("w.safetensors", safetensors_bytes(arrays)));
  };
  EXPECT_EQ(parameters_of_model(open({gain, embedding}), model).size(), 2u);
  EXPECT_THAT(thrown_message<InvalidArgument>([&] { parameters_of_model(open({gain}), model); }),
              HasSubstr("model.embed_tokens.weight: found no such tensor"));
  EXPECT_THAT(thrown_message<InvalidArgument>([&] {
                parameters_of_model(open({gain, embedding, stored_f32("lm_head.weight", {1}, {1})}), model);
              }),
              HasSubstr("found the tensor lm_head.weight"));
}

}  // namespace
}  // namespace lowband
