#include "launcher/bench/options.h"

#include "tests/trainer/scratch_directory.h"

#include <gmock/gmock.h>

namespace lowband {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

CommBenchOptions options_of(std::vector<std::string> words, int processes = 3) {
  return comm_bench_options(Arguments(std::move(words)), processes);
}

TEST(ParseSizes, MultipliesUpToTheEnd) {
  EXPECT_THAT(parse_sizes("8:64"), ElementsAre(8, 16, 32, 64));
  EXPECT_THAT(parse_sizes("4:1K:4"), ElementsAre(4, 16, 64, 256, 1024));
  EXPECT_THAT(parse_sizes("1M:3M"), ElementsAre(1 << 20, 1 << 21));
  EXPECT_THAT(parse_sizes("1G:1G"), ElementsAre(Index{1} << 30));
}

TEST(CommBenchOptions, ProfilesAndRanksOfTheConfigurationsModel) {
  const CommBenchOptions options = options_of({"--preset", "rank166m", "--profile", "uniform:620,inverted",
                                               "--ranks=4,64", "--wire", "bf16", "--picture", "a/b.svg",
                                               "--json=out.json", "--set", "collective_deadline_seconds=7"});
  ASSERT_EQ(options.profiles.size(), 4u);
  EXPECT_EQ(options.profiles[0].name, "uniform:620");
  EXPECT_EQ(factor_elements(options.profiles[0]), 18 * 9'047'040);
  EXPECT_EQ(options.profiles[3].name, "uniform:64");
  EXPECT_THAT(options.wires, ElementsAre(BenchWire::kBF16));
  EXPECT_EQ(options.picture, "a/b");
  EXPECT_EQ(options.json_file, "out.json");
  EXPECT_FALSE(options.json_to_output);
  EXPECT_EQ(options.deadline, std::chrono::seconds(7));
  EXPECT_EQ(options_of({"--preset", "rank166m"}).profiles.front().name, "uniform:620");
  EXPECT_TRUE(options_of({"--sizes", "8:64", "--json"}).json_to_output);
}

TEST(CommBenchOptions, NamesWhatIsWrong) {
  const auto refused = [](std::vector<std::string> words) {
    if (words.empty() || words[0] != "alone") words.insert(words.begin(), {"--preset", "smoke"});
    if (words[0] == "alone") words.erase(words.begin());
    return thrown_message<InvalidArgument>([&] { options_of(words); });
  };
  EXPECT_THAT(refused({"alone"}),
              HasSubstr("found no model, expected a configuration file or --preset NAME"));
  EXPECT_THAT(refused({"--wire", "f16"}), HasSubstr("--wire: found f16, expected f32, bf16"));
  EXPECT_THAT(refused({"--wire", "f32,f32"}), HasSubstr("--wire: found f32,f32"));
  EXPECT_THAT(refused({"--wire", ""}), HasSubstr("--wire: found nothing"));
  EXPECT_THAT(refused({"--ranks", "4,x"}), HasSubstr("--ranks: found x, expected a number from 1"));
  EXPECT_THAT(refused({"--ranks", "0"}), HasSubstr("--ranks: found 0"));
  EXPECT_THAT(refused({"--ranks", "65"}), HasSubstr("65"));
  EXPECT_THAT(refused({"--profile", "wide"}), HasSubstr("profile: found wide, expected uniform:RANK"));
  EXPECT_THAT(refused({"--iterations", "0"}), HasSubstr("--iterations: found 0, expected a number from 1"));
  EXPECT_THAT(refused({"--warmup", "-1"}), HasSubstr("--warmup: found -1"));
  EXPECT_THAT(refused({"--min-time", "soon"}), HasSubstr("--min-time: found soon"));
  EXPECT_THAT(refused({"--check", "1.5"}), HasSubstr("--check: found 1.5"));
  EXPECT_THAT(refused({"--base-iterations", "many"}), HasSubstr("--base-iterations: found many"));
  EXPECT_THAT(refused({"--sizes", "8"}), HasSubstr("--sizes: found 8, expected BEGIN:END"));
  EXPECT_THAT(refused({"--sizes", "64:8"}), HasSubstr("--sizes: found 64:8, expected an end"));
  EXPECT_THAT(refused({"--sizes", "6:8"}), HasSubstr("--sizes: found 6, expected a multiple of 4"));
  EXPECT_THAT(refused({"--sizes", "8:64:1"}), HasSubstr("--sizes: found 1, expected a number from 2"));
  EXPECT_THAT(refused({"--sizes", "8:64T"}), HasSubstr("--sizes: found 64T"));
  EXPECT_THAT(refused({"--set", "mesh.tensor=2"}), HasSubstr("mesh: found shard 1 x tensor 2"));
  EXPECT_THAT(refused({"--set", "mesh.replica=2"}),
              HasSubstr("mesh.replica: found 2, expected the 3 processes"));
  EXPECT_THAT(refused({"--set", "precision=F64"}), HasSubstr("precision: found F64, expected F32"));
  EXPECT_THAT(refused({"--colour", "blue"}), HasSubstr("--colour"));
}

}  // namespace
}  // namespace lowband
