// One process of a job over UCX: all run the same cases in the same order, and report their own failures.
// Started by mpirun, or N times by ucx_job_test with RANK and its companions in the environment.
#include "collectives/local/local_world.h"
#include "collectives/mpi/mpi_world.h"
#include "collectives/rendezvous/communicator_rendezvous.h"
#include "collectives/rendezvous/tcp_rendezvous.h"
#include "collectives/ucx/ucx_world.h"
#include "runtime/random.h"
#include "tests/collectives/communicator_cases.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <thread>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using std::chrono::milliseconds;

Communicator* world = nullptr;  // over UCX
Communicator* mpi = nullptr;    // the same processes, when mpirun started them

class UcxCommunicator : public testing::TestWithParam<CommunicatorCase> {};

TEST_P(UcxCommunicator, Conforms) { GetParam().body(*world); }

INSTANTIATE_TEST_SUITE_P(All, UcxCommunicator,
                         testing::ValuesIn(communicator_cases().begin(), communicator_cases().end()),
                         [](const auto& test) { return test.param.name; });

TEST(UcxWorld, SaysWhatItIs) {
  EXPECT_TRUE(ucx_available());
  EXPECT_THAT(ucx_version(), testing::StartsWith("UCX 1."));
  EXPECT_EQ(world->backend(), "ucx");
  EXPECT_EQ(world->axis(), "world");
}

// FNV-1a over everything that a group's operations return for noise whose sums round differently in every
// order.
std::uint64_t hash_of_results(Communicator& group) {
  std::uint64_t hash = 0xcbf29ce484222325;
  const auto add = [&](const std::vector<float>& data) {
    for (const float x : data) hash = (hash ^ std::bit_cast<std::uint32_t>(x)) * 0x100000001b3;
  };
  const auto n = static_cast<std::size_t>(group.size());
  // Below and above the size up to which two processes swap, and above every eager message.
  for (const std::size_t elements : {std::size_t{7}, std::size_t{1000}, std::size_t{300'001}}) {
    const RandomStream random(23, "bits", group.process());
    std::vector<float> data(elements);
    for (std::size_t e = 0; e < elements; ++e) {
      const auto i = static_cast<Index>(e);
      data[e] = static_cast<float>(random.normal(i) * std::exp2(i % 24 - 12));
    }
    std::vector<Index> counts(n, static_cast<Index>(elements / n));
    counts[0] += static_cast<Index>(elements % n);
    std::vector<float> part(static_cast<std::size_t>(counts[static_cast<std::size_t>(group.process())]));
    group.reduce_scatter<float>(data, part, counts, Reduction::kSum, {Purpose::kDense});
    std::vector<float> gathered(elements);
    group.all_gather<float>(part, gathered, counts, {Purpose::kDense});
    add(gathered);
    group.all_reduce<float>(data, Reduction::kSum, {Purpose::kDense});
    add(data);
    group.broadcast<float>(part = std::vector<float>(data.begin(), data.begin() + 5), 0, {Purpose::kDense});
    add(part);
  }
  return hash;
}

TEST(UcxWorld, GivesTheBitsOfLocalAndMpi) {
  const std::uint64_t hash = hash_of_results(*world);
  std::uint64_t local_hash = 0;
  run_world(world->size(), [&](Communicator& group) {
    const std::uint64_t own = hash_of_results(group);
    if (group.process() == 0) local_hash = own;
  });
  EXPECT_EQ(hash, local_hash);
  if (mpi != nullptr) {
    EXPECT_EQ(hash_of_results(*mpi), local_hash);
  }
  world->barrier();
}

// Two threads, each with a group of its own, at the same time: one may wait while the other works.
TEST(UcxWorld, GroupsMayBeUsedByTwoThreadsAtOnce) {
  const auto first = world->split(0, 0, "first");
  const auto second = world->split(0, 0, "second");
  constexpr int kRounds = 200;
  std::vector<Index> wrong(2, 0);
  const auto sum = [&](Communicator& group, Index factor, Index& failures) {
    const Index n = group.size();
    for (Index round = 0; round < kRounds; ++round) {
      const Index elements = round % 10 == 9 ? 50'000 : 100;
      std::vector<Index> data(static_cast<std::size_t>(elements));
      for (Index e = 0; e < elements; ++e) {
        data[static_cast<std::size_t>(e)] = factor * (e + round) * (group.process() + 1);
      }
      group.all_reduce<Index>(data, Reduction::kSum, {Purpose::kDense});
      for (Index e = 0; e < elements; ++e) {
        failures += data[static_cast<std::size_t>(e)] != factor * (e + round) * n * (n + 1) / 2;
      }
    }
  };
  {
    const std::jthread other([&] { sum(*second, 1000, wrong[1]); });
    sum(*first, 1, wrong[0]);
  }
  EXPECT_EQ(wrong, (std::vector<Index>{0, 0}));
  world->barrier();
}

// A receive that nobody answered is let go of: what its sender sends later goes nowhere, least of all into
// the next group.
TEST(UcxWorld, NothingOfABrokenGroupReachesAnother) {
  if (world->size() == 1) return;
  const auto broken = world->split(0, 0, "broken");
  broken->set_deadline(milliseconds(200));
  std::vector<float> data(1000, 1.0F);  // short enough to leave without an answer
  if (world->process() != 0) {
    EXPECT_THROW(broken->all_reduce<float>(data, Reduction::kSum, {Purpose::kDense}), PeerFailed);
  }
  world->barrier();
  if (world->process() == 0) {
    const auto late = [&] {
      broken->all_reduce<float>(data, Reduction::kSum,
                                {Purpose::kDense});  // all it needs may be there already
      broken->barrier();
    };
    EXPECT_THROW(late(), PeerFailed);
  }
  const auto next = world->split(0, 0, "next");
  std::vector<float> sums(100'000, 2.0F);
  next->all_reduce<float>(sums, Reduction::kSum, {Purpose::kDense});
  EXPECT_THAT(sums, testing::Each(2.0F * static_cast<float>(world->size())));
}

TEST(UcxWorld, ProgressesWhileNobodyWaits) {
  if (world->size() == 1) return;
  // Process 0 sends far more than UCX buffers to each other one, all of which compute meanwhile.
  for (int round = 0; round < 3; ++round) {
    std::vector<std::uint8_t> data(4'000'000, static_cast<std::uint8_t>(world->process() == 0 ? 7 : 0));
    if (world->process() != 0) std::this_thread::sleep_for(milliseconds(30));
    world->broadcast<std::uint8_t>(data, 0, {Purpose::kDense});
    EXPECT_EQ(std::ranges::count(data, 7), std::ssize(data));
  }
}

// One line for each failure, with the process it happened on.
class ProcessReporter : public testing::EmptyTestEventListener {
  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (!result.failed()) return;
    std::printf("[process %d of %d] %s:%d: %s\n", world->process(), world->size(), result.file_name(),
                result.line_number(), result.message());
  }
};

int run_all(Rendezvous& rendezvous, const std::function<void(int)>& end_job) {
  const UcxWorld ucx(rendezvous);
  const std::unique_ptr<Communicator> communicator = ucx.world();
  world = communicator.get();
  testing::TestEventListeners& listeners = testing::UnitTest::GetInstance()->listeners();
  if (communicator->process() != 0) delete listeners.Release(listeners.default_result_printer());
  listeners.Append(new ProcessReporter);
  const int result = RUN_ALL_TESTS();
  // A failed case may leave its peers waiting for this process: end the whole job.
  if (result != 0) {
    end_job(result);
    ucx.abort(result, "a case failed");
  }
  return result;
}

int run_all() {
  if (!launched_by_mpi()) {
    TcpRendezvous rendezvous(tcp_meeting_from_environment());
    return run_all(rendezvous, [](int) {});
  }
  const MpiWorld started_by_mpi;
  const std::unique_ptr<Communicator> communicator = started_by_mpi.world();
  mpi = communicator.get();
  CommunicatorRendezvous rendezvous(*communicator);
  return run_all(rendezvous, [&](int result) { started_by_mpi.abort(result); });
}

}  // namespace
}  // namespace lowband

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  return lowband::run_all();
}
