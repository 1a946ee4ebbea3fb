// Started by mpirun: every process runs the same cases in the same order, and reports its own failures.
#include "collectives/mpi/mpi_world.h"
#include "tests/collectives/communicator_cases.h"

#include <cstdio>
#include <exception>
#include <memory>

#include <gtest/gtest.h>

namespace lowband {
namespace {

Communicator* world = nullptr;

class MpiCommunicator : public testing::TestWithParam<CommunicatorCase> {};

TEST_P(MpiCommunicator, Conforms) { GetParam().body(*world); }

INSTANTIATE_TEST_SUITE_P(All, MpiCommunicator,
                         testing::ValuesIn(communicator_cases().begin(), communicator_cases().end()),
                         [](const auto& test) { return test.param.name; });

TEST(MpiWorld, IsWhatMpirunStarted) {
  EXPECT_TRUE(launched_by_mpi());
  EXPECT_TRUE(mpi_available());
  EXPECT_FALSE(mpi_version().empty());
  EXPECT_EQ(world->backend(), "mpi");
}

// One line for each failure, with the process it happened on.
class ProcessReporter : public testing::EmptyTestEventListener {
  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (!result.failed()) return;
    std::printf("[process %d of %d] %s:%d: %s\n", world->process(), world->size(), result.file_name(),
                result.line_number(), result.message());
  }
};

}  // namespace
}  // namespace lowband

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const lowband::MpiWorld mpi;
  const std::unique_ptr<lowband::Communicator> communicator = mpi.world();
  lowband::world = communicator.get();
  testing::TestEventListeners& listeners = testing::UnitTest::GetInstance()->listeners();
  if (communicator->process() != 0) delete listeners.Release(listeners.default_result_printer());
  listeners.Append(new lowband::ProcessReporter);
  // A failed case may leave its peers waiting for this process: end the whole job.
  const int result = RUN_ALL_TESTS();
  if (result != 0) mpi.abort(result);
  return 0;
}
