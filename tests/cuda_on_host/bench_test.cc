// `lowband bench comm` of what lies on devices.
#include "collectives/local/local_world.h"
#include "launcher/bench/bench_table.h"
#include "launcher/bench/comm_bench.h"

#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using testing::HasSubstr;

BenchReport report_of(int processes, const std::vector<std::string>& more) {
  std::vector<std::string> words{"--preset", "smoke", "--ranks",      "5", "--sizes",           "64:4K:64",
                                 "--warmup", "0",     "--iterations", "1", "--base-iterations", "1"};
  words.insert(words.end(), more.begin(), more.end());
  BenchReport report;
  run_world(processes, [&](Communicator& world) {
    const CommBenchOptions options = comm_bench_options(Arguments(words), world.size());
    BenchSink sink;
    sink.begun = [&](const BenchReport&) { EXPECT_EQ(world.device() != nullptr, options.on_device); };
    const BenchReport own = run_comm_bench(world, options, sink);
    EXPECT_EQ(world.device(), nullptr);
    if (world.process() == 0) report = own;
  });
  return report;
}

TEST(BenchOnDevice, SendsTheBytesOfTheHostAndFindsNothingWrong) {
  const BenchReport host = report_of(2, {}), device = report_of(2, {"--device", "cuda", "--with-products"});
  EXPECT_EQ(device.wrong(), 0);
  EXPECT_THAT(bench_header(device), HasSubstr("# device of process 0: cuda:0"));
  EXPECT_THAT(bench_header(host), testing::Not(HasSubstr("# device")));
  ASSERT_EQ(device.lines_size(), host.lines_size());
  for (int i = 0; i < host.lines_size(); ++i) {
    EXPECT_TRUE(device.lines(i).has_wrong());
    EXPECT_EQ(device.lines(i).transport_bytes(), host.lines(i).transport_bytes());
    EXPECT_LT(device.lines(i).relative_error(), 2 * host.lines(i).relative_error());
  }
  ASSERT_EQ(device.sizes_size(), host.sizes_size());
  for (int i = 0; i < host.sizes_size(); ++i)
    EXPECT_EQ(device.sizes(i).transport_bytes(), host.sizes(i).transport_bytes());
}

TEST(BenchOnDevice, TakesTheDeviceOfTheConfigurationAndRefusesOthers) {
  EXPECT_TRUE(
      comm_bench_options(Arguments(std::vector<std::string>{"--preset", "smoke", "--set", "device=CUDA"}), 1)
          .on_device);
  EXPECT_THAT(
      [] {
        comm_bench_options(Arguments(std::vector<std::string>{"--device", "tpu"}), 1);
      },
      testing::ThrowsMessage<InvalidArgument>(HasSubstr("--device: found tpu, expected cpu or cuda")));
}

}  // namespace
}  // namespace lowband
