#include "trainer/message_fields.h"

#include "trainer/checkpoint.pb.h"
#include "trainer/config/run_config.pb.h"

#include <gmock/gmock.h>

namespace lowband {
namespace {

TEST(MessageFields, NamesEveryFieldByItsPath) {
  CheckpointManifest manifest;
  manifest.set_step(12);
  manifest.set_config_text("a\"b");
  manifest.mutable_mesh()->set_tensor(2);
  manifest.add_files()->set_bytes(7);
  (*manifest.mutable_scalars())["tokens"] = 1e6;
  (*manifest.mutable_scalars())["best"] = 0.1;
  const std::map<std::string, std::string> expected{
      {"c.format_version", "0"},      {"c.step", "12"},
      {"c.mesh.replica", "0"},        {"c.mesh.shard", "0"},
      {"c.mesh.tensor", "2"},         {"c.scalars[\"tokens\"]", "1000000"},
      {"c.scalars[\"best\"]", "0.1"}, {"c.files[0].name", "\"\""},
      {"c.files[0].bytes", "7"},      {"c.files[0].header_hash", "0"},
      {"c.config_text", "\"a\\\"b\""}};
  EXPECT_EQ(message_fields(manifest, "c"), expected);
}

TEST(MessageFields, MessagesThatAreNotSetAreLeftOut) {
  EXPECT_FALSE(message_fields(CheckpointManifest(), "").contains("mesh.replica"));
  EXPECT_TRUE(message_fields(CheckpointManifest(), "").contains("step"));
}

// A run that writes a default out continues a checkpoint of one that does not, and a default that changes
// with the program does not go unnoticed.
TEST(MessageFields, DefaultsAreValues) {
  RunConfig::Optimizer written;
  written.set_mu(0.95);
  written.set_kind(RunConfig::Optimizer::DION);
  EXPECT_EQ(message_fields(written, "o"), message_fields(RunConfig::Optimizer(), "o"));
  EXPECT_EQ(message_fields(RunConfig::Optimizer(), "o").at("o.weight_decay"), "0.01");
  EXPECT_FALSE(message_fields(RunConfig::Optimizer(), "o").contains("o.learning_rate"));
}

}  // namespace
}  // namespace lowband
