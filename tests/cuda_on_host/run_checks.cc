// Device checks on the host: each once for every order of threads, and to the same bits.
#include "tests/cuda_on_host/block.h"
#include "tests/runtime/cuda/device_checks.h"

#include <cstdio>
#include <exception>
#include <utility>

#include <signal.h>
#include <unistd.h>

namespace lowband::test {
namespace {

using cuda_on_host::Order;
constexpr std::pair<Order, const char*> kOrders[] = {
    {Order::kForward, "forward"}, {Order::kBackward, "backward"}, {Order::kShuffled, "shuffled"}};

void say_where(int /*signal*/) {
  char text[256];
  const int length = std::snprintf(
      text, sizeof text,
      "memory that is not there or not the host's; the last thread of a kernel to run was (%u, %u, %u) of "
      "block (%u, %u, %u)\n",
      threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z);
  static_cast<void>(!write(STDERR_FILENO, text, static_cast<std::size_t>(length)));
  signal(SIGSEGV, SIG_DFL);
}

}  // namespace

const Index kManyElements = 300'007;  // more than 256 blocks of threads: they go round

int run_device_checks(std::span<const DeviceCheck> checks) {
  std::printf("on the host, not on a GPU\n");
  signal(SIGSEGV, say_where);
  int failures = 0;
  for (const DeviceCheck& check : checks) {
    std::uint64_t hash = 0;
    const char* order_name = "";
    try {
      for (const auto& [order, name] : kOrders) {
        order_name = name;
        cuda_on_host::set_order(order);
        cuda_on_host::forget_results();
        const CudaStream stream;
        check.body(stream);
        const std::uint64_t found = cuda_on_host::hash_of_results();
        expect(order == Order::kForward || found == hash, "other bits than with threads forward");
        hash = found;
      }
      std::printf("passed  %s\n", check.name);
    } catch (const std::exception& failure) {
      ++failures;
      std::printf("FAILED  %s, threads %s: %s\n", check.name, order_name, failure.what());
    }
    std::fflush(stdout);
  }
  std::printf("%d of %zu checks failed\n", failures, checks.size());
  return failures == 0 ? 0 : 1;
}

}  // namespace lowband::test
