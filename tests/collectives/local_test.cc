#include "collectives/local/local_world.h"
#include "runtime/cpu.h"
#include "tests/collectives/communicator_cases.h"

#include <string>
#include <tuple>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using std::chrono::milliseconds;
using testing::HasSubstr;
using testing::ThrowsMessage;

class LocalCommunicator : public testing::TestWithParam<std::tuple<CommunicatorCase, int>> {};

TEST_P(LocalCommunicator, Conforms) {
  const auto& [conformance, processes] = GetParam();
  run_world(processes, conformance.body);
}

INSTANTIATE_TEST_SUITE_P(
    All, LocalCommunicator,
    testing::Combine(testing::ValuesIn(communicator_cases().begin(), communicator_cases().end()),
                     testing::Values(1, 2, 3, 4, 5, 7)),
    [](const auto& test) { return cat(std::get<0>(test.param).name, "_on_", std::get<1>(test.param)); });

TEST(LocalWorld, EightEqualProcessesActAsOne) {
  for (const CommunicatorCase& conformance : communicator_cases()) {
    if (std::string(conformance.name) == "equal_processes_act_as_one") run_world(8, conformance.body);
  }
}

TEST(LocalWorld, RethrowsTheFirstFailureWithItsProcess) {
  const auto run = [] {
    run_world(4, [](Communicator& world) {
      if (world.process() == 2) throw IoError("corpus.bin: no such file");
      EXPECT_THAT([&] { world.barrier(); },
                  ThrowsMessage<PeerFailed>(HasSubstr("process 2 of 4 failed: corpus.bin")));
    });
  };
  EXPECT_THAT(run, ThrowsMessage<IoError>("[process 2 of 4] corpus.bin: no such file"));
}

TEST(LocalWorld, AFailureReachesEveryGroup) {
  const auto run = [] {
    run_world(4, [](Communicator& world) {
      const auto pair = world.split(world.process() / 2, 0, "pair");
      if (world.process() == 0) throw InvalidArgument("model.heads: found 6");
      pair->barrier();  // 2 and 3 come out of the first ones; 1 never does
      pair->barrier();
      for (;;) world.barrier();
    });
  };
  EXPECT_THAT(run, ThrowsMessage<InvalidArgument>("[process 0 of 4] model.heads: found 6"));
}

TEST(LocalWorld, NoticesAProcessThatHasReturned) {
  const auto run = [] {
    run_world(3, [](Communicator& world) {
      if (world.process() != 1) world.barrier();
    });
  };
  EXPECT_THAT(run, ThrowsMessage<PeerFailed>(HasSubstr("process 1 has left the group")));
}

TEST(LocalWorld, EndsAtTheTotalDeadline) {
  const LocalWorldOptions options{.deadline = milliseconds(60'000), .total_deadline = milliseconds(100)};
  const auto run = [&] {
    run_world(
        2,
        [](Communicator& world) {
          for (;;) world.barrier();
        },
        options);
  };
  EXPECT_THAT(run, ThrowsMessage<PeerFailed>(HasSubstr("the run did not end within 100 ms")));
}

TEST(LocalWorld, GivesEveryProcessOneComputeThread) {
  run_world(2, [](Communicator& world) {
    EXPECT_EQ(compute_threads(), 1);
    EXPECT_EQ(world.backend(), "local");
    EXPECT_EQ(world.axis(), "world");
  });
}

}  // namespace
}  // namespace lowband
