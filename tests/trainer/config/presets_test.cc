#include "trainer/config/presets.h"

#include "tests/trainer/config/valid_run.h"

#include <fstream>
#include <sstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

TEST(Presets, AreValidRuns) {
  EXPECT_THAT(preset_names(), testing::ElementsAre("quickstart", "rank166m", "smoke"));
  for (const std::string_view name : preset_names()) {
    const RunConfig config = parse_run_config(preset_text(name), name);
    EXPECT_NO_THROW(validate(config, mesh_shape(config).processes())) << name;
    EXPECT_EQ(config.name(), name);
  }
}

TEST(Presets, QuickStartRunsOnFourProcessesAndCanBeMatched) {
  RunConfig config = parse_run_config(preset_text("quickstart"), "quickstart");
  EXPECT_EQ(mesh_shape(config).replica, 2);
  EXPECT_EQ(mesh_shape(config).tensor, 2);
  *config.mutable_profile() = parse_profile(cat("structural@uniform:", config.profile().rank()));
  EXPECT_NO_THROW(validate(config, 4));
}

TEST(Presets, ExampleOfTheDocumentationIsAValidRun) {
  std::ifstream file(LOWBAND_SOURCE_DIR "/docs/config.md");
  std::ostringstream page;
  page << file.rdbuf();
  const std::string text = page.str(), fence = "```textproto\n";
  const std::size_t begin = text.find(fence) + fence.size();
  const RunConfig config =
      parse_run_config(text.substr(begin, text.find("```", begin) - begin), "docs/config.md");
  EXPECT_NO_THROW(validate(config, 4));
  EXPECT_EQ(micro_batches_per_step(config), 2);
}

TEST(Presets, UnknownNameListsTheKnownOnes) {
  EXPECT_EQ(error_of([] { preset_text("rank166"); }),
            "preset: found rank166, expected one of quickstart, rank166m, smoke");
}

}  // namespace
}  // namespace lowband
