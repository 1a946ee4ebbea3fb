// Which files of a folder are a recording, by their names.

#include "trainer/replay/recorded_files.h"

#include "runtime/error.h"
#include "tests/trainer/scratch_directory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using testing::HasSubstr;

RecordedSteps found_in(const std::vector<std::string>& names, std::optional<int> replicas = {}) {
  const ScratchDirectory scratch;
  for (const std::string& name : names) scratch.write(name, "");
  return find_recorded_steps(scratch.path(), replicas);
}

std::string refusal(const std::vector<std::string>& names, std::optional<int> replicas = {}) {
  return thrown_message<InvalidArgument>([&] { found_in(names, replicas); });
}

TEST(RecordedFiles, FindsStepsAndReplicas) {
  const auto plain = found_in({"step-000007.safetensors", "step-000008.safetensors", "weights.safetensors"});
  EXPECT_EQ(plain.first, 7);
  EXPECT_EQ(plain.count, 2);
  EXPECT_EQ(plain.replicas, 1);
  EXPECT_EQ(plain.file(8, 0).filename(), "step-000008.safetensors");
  const auto numbered =
      found_in({"step-1234567.replica-0.safetensors", "step-1234567.replica-1.safetensors"});
  EXPECT_EQ(numbered.first, 1234567);
  EXPECT_EQ(numbered.count, 1);
  EXPECT_EQ(numbered.replicas, 2);
  EXPECT_EQ(numbered.file(1234567, 1).filename(), "step-1234567.replica-1.safetensors");
  const auto one = found_in({"step-000000.replica-0.safetensors"}, 1);
  EXPECT_EQ(one.replicas, 1);
  EXPECT_EQ(one.file(0, 0).filename(), "step-000000.replica-0.safetensors");
}

TEST(RecordedFiles, NamesStateFiles) {
  EXPECT_EQ(state_file_of("a/state.safetensors", 0, 1), "a/state.safetensors");
  EXPECT_EQ(state_file_of("a/state.safetensors", 2, 3), "a/state.replica-2.safetensors");
}

TEST(RecordedFiles, RefusesGapsAndStrayReplicas) {
  EXPECT_THAT(refusal({"weights.safetensors"}), HasSubstr("found no gradients"));
  EXPECT_THAT(refusal({"step-000001.safetensors", "step-000003.safetensors"}),
              HasSubstr("found step 3 after step 1, expected step-000002.safetensors"));
  EXPECT_THAT(refusal({"step-000000.replica-0.safetensors", "step-000000.replica-1.safetensors",
                       "step-000001.replica-0.safetensors"}),
              HasSubstr("step 1: found no step-000001.replica-1.safetensors, expected gradients of 2"));
  EXPECT_THAT(refusal({"step-000000.replica-1.safetensors"}),
              HasSubstr("found no step-000000.replica-0.safetensors"));
  EXPECT_THAT(refusal({"step-000000.replica-0.safetensors", "step-000000.replica-1.safetensors"}, 3),
              HasSubstr("found no step-000000.replica-2.safetensors, expected gradients of 3"));
  EXPECT_THAT(refusal({"step-000000.replica-0.safetensors", "step-000000.replica-1.safetensors"}, 1),
              HasSubstr("found step-000000.replica-1.safetensors, expected gradients of 1"));
  EXPECT_THAT(refusal({"step-000000.safetensors"}, 2),
              HasSubstr("found no step-000000.replica-0.safetensors, expected gradients of 2"));
  EXPECT_THAT(refusal({"step-000000.safetensors", "step-000000.replica-0.safetensors"}),
              HasSubstr("found step-000000.replica-0.safetensors, expected"));
}

TEST(RecordedFiles, RefusesNamesThatOnlyLookRight) {
  EXPECT_THAT(refusal({"step-7.safetensors"}), HasSubstr("expected step-000007.safetensors"));
  EXPECT_THAT(refusal({"step-0000007.safetensors"}), HasSubstr("expected step-000007.safetensors"));
  EXPECT_THAT(refusal({"step-000007.replica-01.safetensors"}),
              HasSubstr("expected step-000007.replica-1.safetensors"));
  for (const char* name : {"step_000000.safetensors", "step-000000.safetensor",
                           "step-000000.rank-0.safetensors", "step-00000x.safetensors"})
    EXPECT_THAT(refusal({name}), HasSubstr("expected step-000000.safetensors or"));
  EXPECT_THAT(thrown_message<IoError>([] { find_recorded_steps("/nowhere/at/all", {}); }),
              HasSubstr("/nowhere/at/all"));
}

}  // namespace
}  // namespace lowband
