// What the stand-in for NCCL refuses, as its documentation demands.
#include "runtime/cuda/buffer.h"
#include "tests/cuda_on_host/nccl_faults.h"

#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nccl.h>

namespace lowband {
namespace {

using testing::HasSubstr;

// Two communicators of one id, both used by one thread, and memory for each.
class NcclCalls : public testing::Test {
 protected:
  static constexpr Index kBytes = 64;

  void SetUp() override {
    ncclUniqueId id;
    ASSERT_EQ(ncclGetUniqueId(&id), ncclSuccess);
    for (int p = 0; p < 2; ++p) {
      ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
      config.blocking = 0;
      ASSERT_EQ(ncclCommInitRankConfig(&comm[p], 2, id, p, &config), ncclInProgress);
    }
    EXPECT_EQ(state(0), ncclInProgress);
    for (int p = 0; p < 2; ++p) ASSERT_EQ(settled(p), ncclSuccess);
  }
  void TearDown() override {
    for (ncclComm_t each : comm) ncclCommAbort(each);
    for (const CudaStream& each : stream) each.synchronize();
    EXPECT_EQ(cuda_on_host::living_nccl_communicators(), 0);
  }

  ncclResult_t state(int p) {
    ncclResult_t result = ncclSuccess;
    EXPECT_EQ(ncclCommGetAsyncError(comm[p], &result), ncclSuccess);
    return result;
  }
  ncclResult_t settled(int p) {
    for (int i = 0; i < 10; ++i) {
      if (const ncclResult_t result = state(p); result != ncclInProgress) return result;
    }
    return ncclInProgress;
  }
  std::string why(int p) { return ncclGetLastError(comm[p]); }
  void move() {
    for (int i = 0; i < 10; ++i) {
      for (const CudaStream& each : stream) static_cast<void>(each.finished());
    }
  }
  ncclResult_t send(int p, std::size_t bytes) {
    return ncclSend(memory[p].data(), bytes, ncclUint8, 1 - p, comm[p], stream[p].handle());
  }
  ncclResult_t receive(int p, std::size_t bytes) {
    return ncclRecv(memory[p].data(), bytes, ncclUint8, 1 - p, comm[p], stream[p].handle());
  }

  CudaStream stream[2];
  DeviceBuffer<std::byte> memory[2] = {{kBytes, stream[0]}, {kBytes, stream[1]}};
  ncclComm_t comm[2] = {};
};

TEST_F(NcclCalls, AMessageArrivesNotBeforeItIsAskedFor) {
  const std::vector<std::byte> data(kBytes, std::byte{7});
  memory[0].fill_from(data);
  EXPECT_EQ(send(0, kBytes), ncclInProgress);
  EXPECT_EQ(receive(1, kBytes), ncclInProgress);
  move();
  EXPECT_TRUE(stream[1].finished()) << "launched before the call was polled to its end";
  EXPECT_EQ(settled(0), ncclSuccess);
  EXPECT_EQ(settled(1), ncclSuccess);
  EXPECT_FALSE(stream[0].finished());
  EXPECT_FALSE(stream[1].finished());
  CudaEvent behind(stream[1]);
  behind.record(stream[1]);
  EXPECT_FALSE(behind.over());
  move();
  EXPECT_TRUE(behind.over());
  std::vector<std::byte> found(kBytes);
  memory[1].copy_to(found);
  EXPECT_EQ(found, data);
}

TEST_F(NcclCalls, AMessageOfAnotherSizeIsRefused) {
  send(0, kBytes);
  receive(1, kBytes - 1);
  settled(0), settled(1);
  move();
  for (int p = 0; p < 2; ++p) {
    EXPECT_EQ(state(p), ncclInvalidUsage);
    EXPECT_THAT(why(p), HasSubstr("process 0 sends 64 bytes to process 1, which receives 63"));
  }
}

TEST_F(NcclCalls, AMessageWithoutAReceiveGoesOnAndIsRefusedAtTheEnd) {
  send(0, kBytes);
  settled(0);
  move();
  EXPECT_FALSE(stream[0].finished());
  EXPECT_EQ(ncclCommFinalize(comm[1]), ncclInvalidUsage);
  EXPECT_THAT(why(1), HasSubstr("a message of process 0 that nobody receives"));
}

TEST_F(NcclCalls, CollectivesThatDifferAreRefused) {
  for (int p = 0; p < 2; ++p) {
    ncclAllReduce(memory[p].data(), memory[p].data(), p == 0 ? 4 : 5, ncclFloat32, ncclSum, comm[p],
                  stream[p].handle());
    settled(p);
  }
  move();
  EXPECT_EQ(state(0), ncclInvalidUsage);
  EXPECT_THAT(why(0), HasSubstr("with 4 and 5 elements"));
}

TEST_F(NcclCalls, MemoryOfTheHostIsRefused) {
  std::vector<std::byte> host(kBytes);
  EXPECT_EQ(ncclSend(host.data(), kBytes, ncclUint8, 1, comm[0], stream[0].handle()), ncclInvalidUsage);
  EXPECT_THAT(why(0), HasSubstr("do not lie in device memory"));
  EXPECT_EQ(receive(1, kBytes + 1), ncclInvalidUsage);
  EXPECT_THAT(why(1), HasSubstr("the 65 bytes to receive do not lie in device memory"));
}

TEST_F(NcclCalls, OverlapThatIsNotInPlaceIsRefused) {
  EXPECT_EQ(ncclAllGather(memory[0].data(), memory[0].data() + 4, 8, ncclUint8, comm[0], stream[0].handle()),
            ncclInvalidUsage);
  EXPECT_THAT(why(0), HasSubstr("overlap"));
}

TEST_F(NcclCalls, ACallBeforeTheLastOneEndedIsRefused) {
  EXPECT_EQ(send(0, 8), ncclInProgress);
  EXPECT_EQ(send(0, 8), ncclInvalidUsage);
  EXPECT_THAT(why(0), HasSubstr("before the last call was polled to its end"));
  EXPECT_EQ(ncclCommFinalize(comm[0]), ncclInvalidUsage);
}

TEST_F(NcclCalls, AnEndedCommunicatorIsRefused) {
  EXPECT_EQ(ncclCommDestroy(comm[0]), ncclInvalidUsage);  // it was not finalized
  EXPECT_EQ(ncclCommAbort(comm[0]), ncclSuccess);
  EXPECT_EQ(ncclCommAbort(comm[0]), ncclInvalidUsage);
  EXPECT_EQ(send(0, 8), ncclInvalidUsage);
  ncclResult_t result = ncclSuccess;
  EXPECT_EQ(ncclCommGetAsyncError(comm[0], &result), ncclInvalidUsage);
}

TEST_F(NcclCalls, AnAbortLetsTheStreamRunDryWithoutAResult) {
  receive(0, kBytes);
  settled(0);
  move();
  EXPECT_FALSE(stream[0].finished());
  EXPECT_EQ(ncclCommAbort(comm[0]), ncclSuccess);
  EXPECT_TRUE(stream[0].finished());
}

TEST_F(NcclCalls, GroupsAreBalanced) {
  EXPECT_EQ(ncclGroupEnd(), ncclInvalidUsage);
  // Each sends before it receives: only a group does not wait for itself.
  for (int p = 0; p < 2; ++p) {
    EXPECT_EQ(ncclGroupStart(), ncclSuccess);
    EXPECT_EQ(send(p, 8), ncclSuccess);
    EXPECT_EQ(ncclRecv(memory[p].data() + 8, 8, ncclUint8, 1 - p, comm[p], stream[p].handle()), ncclSuccess);
    EXPECT_EQ(ncclGroupEnd(), ncclInProgress);
    EXPECT_EQ(settled(p), ncclSuccess);
  }
  move();
  EXPECT_TRUE(stream[0].finished());
  EXPECT_TRUE(stream[1].finished());
}

}  // namespace
}  // namespace lowband
