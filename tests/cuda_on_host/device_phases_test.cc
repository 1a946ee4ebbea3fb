// What a transformer on a device tells the timeline of its communicator.
#include "collectives/local/local_world.h"
#include "collectives/process_device.h"
#include "model/cuda/device_transformer.h"
#include "runtime/cuda/stream_device.h"
#include "runtime/timeline.h"

#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <string>

#include <gtest/gtest.h>

namespace lowband {
namespace {

struct Ranges {
  std::map<std::string, int> count;
  std::map<std::string, Index> bytes;  // of all of a name
};

Ranges ranges_of(const std::filesystem::path& path) {
  std::ifstream file(path);
  const std::regex event("\"name\":\"([^\"]*)\".*\"bytes\":([0-9]+)");
  Ranges ranges;
  std::smatch found;
  for (std::string line; std::getline(file, line);) {
    if (!std::regex_search(line, found, event)) continue;
    ++ranges.count[found[1]];
    ranges.bytes[found[1]] += std::stoll(found[2]);
  }
  return ranges;
}

TEST(DevicePhases, EveryPhaseHasARangeWithTheBytesThatItWrites) {
  constexpr ModelConfig kConfig{.vocabulary = 61,
                                .width = 40,
                                .layers = 3,
                                .heads = 4,
                                .kv_heads = 2,
                                .head_dim = 16,
                                .ffn_width = 51,
                                .sequence = 37};
  const std::filesystem::path path = std::filesystem::path(testing::TempDir()) / "device_phases.json";
  run_world(1, [&](Communicator& tensor) {
    const CudaStream stream;
    CudaBlas blas(stream);
    const std::unique_ptr<Device> device = device_on(blas);
    const DeviceScope scope(tensor, *device);
    DeviceTransformer<BFloat16> model(kConfig, tensor, 1, 1, KeptActivations::kAll);
    const std::vector<std::int32_t> tokens(static_cast<std::size_t>(kConfig.sequence), 7);
    const auto ranges_of_step = [&] {
      Timeline timeline(path.string(), 0);
      tensor.set_timeline(&timeline);
      model.forward_backward(tokens, tokens, 1, 1, {});
      tensor.set_timeline(nullptr);
      timeline.write();
      return ranges_of(path);
    };
    const Ranges first = ranges_of_step();
    for (const char* name :
         {"batch", "embedding", "head", "loss", "head gradient", "embedding gradient", "wait for the loss"})
      EXPECT_EQ(first.count.count(name) == 0 ? 0 : first.count.at(name), 1) << name;
    for (const char* name :
         {"attention", "feed-forward", "down", "attention gradient", "feed-forward gradient"})
      EXPECT_EQ(first.count.count(name) == 0 ? 0 : first.count.at(name), 3) << name;
    EXPECT_EQ(first.count.size(), 12U);

    const Index n = 37, w = 40, ids = 61, qkv = 128, q = 64, f = 51;
    EXPECT_EQ(first.bytes.at("attention"),
              3 * (n * (2 * w + 4) + 2 * n * qkv + 2 * n * q + 4 * 2 * 4 * n + 4 * n * w));
    EXPECT_EQ(first.bytes.at("feed-forward gradient"),
              3 * (2 * n * 3 * f + 4 * 3 * f * w + n * w * (4 + 4 + 2) + 4 * w));
    EXPECT_EQ(first.bytes.at("loss"), 8 * n + 2 * n * ids);

    const Ranges second = ranges_of_step();
    EXPECT_EQ(second.count.at("recorded step"), 1);
    const Ranges third = ranges_of_step();
    EXPECT_EQ(third.count.size(), 3U);  // batch, replayed step, wait for the loss
    Index phases = 0;
    for (const auto& [name, bytes] : first.bytes) {
      if (name != "batch" && name != "wait for the loss") phases += bytes;
    }
    for (const Ranges& ranges : {second, third}) EXPECT_EQ(ranges.bytes.at("replayed step"), phases);
  });
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace lowband
