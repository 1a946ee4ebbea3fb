// What every communicator must do, over NCCL. `local`: one process of threads. Otherwise one process of a
// job, started N times by ucx_job.sh, all of them on device 0; without a device, exit code 77.
#include "collectives/local/local_world.h"
#include "collectives/nccl/nccl_group.h"
#include "collectives/rendezvous/tcp_rendezvous.h"
#include "collectives/ucx/ucx_world.h"
#include "runtime/cuda/buffer.h"
#include "runtime/device.h"
#include "tests/collectives/communicator_cases.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace lowband {
namespace {

Communicator* world = nullptr;  // over NCCL

class NcclGroup : public testing::TestWithParam<CommunicatorCase> {};

TEST_P(NcclGroup, Conforms) { GetParam().body(*world); }

INSTANTIATE_TEST_SUITE_P(All, NcclGroup,
                         testing::ValuesIn(communicator_cases().begin(), communicator_cases().end()),
                         [](const auto& test) { return test.param.name; });

template <class T>
std::span<T> span_of(DeviceBuffer<T>& buffer) {
  return {buffer.data(), static_cast<std::size_t>(buffer.size())};
}

// Spans on the device go in and out as they are; the bits are those of spans on the host.
TEST(NcclGroupOnDevice, MovesDeviceMemory) {
  const CudaStream stream;
  const Index n = 100'003;
  std::vector<float> host(static_cast<std::size_t>(n));
  for (Index e = 0; e < n; ++e)
    host[static_cast<std::size_t>(e)] = 1.0F / static_cast<float>(e + 1 + world->process());
  DeviceBuffer<float> device(n, stream);
  device.fill_from(host);
  stream.synchronize();
  for (const Determinism level : {Determinism::kExact, Determinism::kFast}) {
    const auto group = world->split(0, 0, "device");
    group->set_determinism(level);
    std::vector<float> expected = host, found = host;
    group->all_reduce<float>(expected, Reduction::kSum, {Purpose::kDense});
    group->all_reduce<float>(span_of(device), Reduction::kSum, {Purpose::kDense});
    device.copy_to(found);
    EXPECT_EQ(found, expected) << determinism_name(level);
    device.fill_from(host);
    stream.synchronize();

    std::vector<Index> counts(static_cast<std::size_t>(group->size()), 10);
    counts.back() = 17;
    const Index total = 10 * (group->size() - 1) + 17;
    const Index own = counts[static_cast<std::size_t>(group->process())];
    DeviceBuffer<float> part(own, stream), whole(total, stream);
    stream.synchronize();
    group->reduce_scatter<float>(span_of(device).first(static_cast<std::size_t>(total)), span_of(part),
                                 counts, Reduction::kSum, {Purpose::kDense});
    group->all_gather<float>(span_of(part), span_of(whole), counts, {Purpose::kDense});
    std::vector<float> gathered(static_cast<std::size_t>(total));
    whole.copy_to(gathered);
    if (level == Determinism::kExact) {
      EXPECT_EQ(gathered, std::vector<float>(expected.begin(), expected.begin() + total));
    }
  }
}

TEST(NcclGroupOnDevice, SaysWhatItIs) {
  EXPECT_EQ(world->backend(), "nccl");
  EXPECT_EQ(world->axis(), "world");
  EXPECT_EQ(world->determinism(), Determinism::kExact);
}

TEST(NcclGroupOnDevice, RefusesADeviceThatIsNotThere) {
  run_world(1, [](Communicator& host) {
    try {
      make_nccl_group(host, 1000);
      ADD_FAILURE() << "device 1000 was taken";
    } catch (const InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find("expected device 1000 for process 0 of 1"), std::string::npos)
          << error.what();
    }
  });
}

int run_on(Communicator& host) {
  const std::unique_ptr<Communicator> group = make_nccl_group(host, 0);
  world = group.get();
  testing::TestEventListeners& listeners = testing::UnitTest::GetInstance()->listeners();
  if (group->process() != 0) delete listeners.Release(listeners.default_result_printer());
  return RUN_ALL_TESTS();
}

// Processes that share a device have to look like hosts of their own, to NCCL up to 2.29: docs/backends.md.
void look_like_a_host_of_its_own(int process) {
  const std::string id = "lowband-test-" + std::to_string(process);
  setenv("NCCL_HOSTID", id.c_str(), 1);
  setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1", 1);  // from 2.30 on
  for (const auto& [name, value] : {std::pair{"NCCL_NET", "Socket"},
                                    {"NCCL_SOCKET_IFNAME", "lo"},
                                    {"NCCL_MAX_CTAS", "2"},
                                    {"NCCL_RAS_ENABLE", "0"},
                                    {"NCCL_NVLS_ENABLE", "0"},
                                    {"NCCL_MNNVL_ENABLE", "0"}})
    setenv(name, value, 0);
}

int run_all(int argc, char** argv) {
  const CudaStatus status = cuda_status();
  if (status.devices.empty()) {
    std::printf("skipped: no CUDA device: %s\n", status.reason.c_str());
    return 77;
  }
  if (argc > 1 && std::string(argv[1]) == "local") {
    int result = 1;
    run_world(1, [&](Communicator& host) { result = run_on(host); });
    return result;
  }
  const TcpMeeting meeting = tcp_meeting_from_environment();
  look_like_a_host_of_its_own(meeting.process);
  TcpRendezvous rendezvous(meeting);
  const UcxWorld ucx(rendezvous);
  const std::unique_ptr<Communicator> host = ucx.world();
  const int result = run_on(*host);
  if (result != 0) ucx.abort(result, "a case failed");  // a failed case may leave its peers waiting
  return result;
}

}  // namespace
}  // namespace lowband

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  return lowband::run_all(argc, argv);
}
