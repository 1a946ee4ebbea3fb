// Collectives of a backend that knows host memory alone, on spans in device memory: the bits and the bytes of
// the same calls on host memory.
#include "collectives/local/local_world.h"
#include "runtime/buffer.h"
#include "runtime/copy.h"
#include "runtime/random.h"

#include <functional>
#include <numeric>
#include <vector>

#include <gtest/gtest.h>

namespace lowband {
namespace {

constexpr Index kCounts[] = {3, 0, 70};
constexpr int kProcesses = 3;

template <class T>
Buffer<T> numbers(Index elements, int process) {
  Buffer<T> values(elements);
  const RandomStream stream(1, "device spans", process);
  for (Index i = 0; i < elements; ++i) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      values[i] = to_bfloat16(static_cast<float>(stream.normal(i)));
    } else {
      values[i] = static_cast<T>(stream.normal(i));
    }
  }
  return values;
}

template <class T>
Buffer<T> moved(const Buffer<T>& from, Device* device) {
  Buffer<T> to(from.size(), device);
  copy<T>(from.line(), to.line());
  return to;
}

struct Result {
  std::vector<double> numbers;
  Index payload = 0;
};

// Every operation once, in the memory of `device` or, with null, of the host.
Result run_all(Communicator& world, Device* device) {
  const Index total = std::reduce(std::begin(kCounts), std::end(kCounts));
  const auto own = static_cast<std::size_t>(world.process());
  const std::vector<Index> counts(kCounts, kCounts + world.size());
  const Index whole = std::reduce(counts.begin(), counts.end());
  Result result;
  const auto payload = [&] {
    return world.ledger().total_sum(world.axis(), Purpose::kControl).payload_bytes;
  };
  const Index before = payload();
  const auto keep = [&]<class T>(const Buffer<T>& buffer) {
    const Buffer<T> host = moved(buffer, nullptr);
    for (const T x : host.span()) {
      if constexpr (std::is_same_v<T, BFloat16>) {
        result.numbers.push_back(static_cast<double>(to_float(x)));
      } else {
        result.numbers.push_back(static_cast<double>(x));
      }
    }
  };
  const auto all_operations = [&]<class T>(T) {
    Buffer<T> data = moved(numbers<T>(total, world.process()), device);
    world.all_reduce(data.span(), Reduction::kSum, {Purpose::kControl});
    keep(data);
    const Buffer<T> send = moved(numbers<T>(whole, world.process() + 10), device);
    Buffer<SumOf<T>> part(counts[own], device);
    world.reduce_scatter<T>(send.span(), part.span(), counts, Reduction::kSum, {Purpose::kControl});
    keep(part);
    Buffer<T> gathered(whole, device);
    world.all_gather<T>(send.span(0, counts[own]), gathered.span(), counts, {Purpose::kControl});
    keep(gathered);
    const std::vector<Index> pairs(static_cast<std::size_t>(world.size() * world.size()), 1);
    Buffer<T> received(world.size(), device);
    world.all_to_all<T>(send.span(0, world.size()), received.span(), pairs, {Purpose::kControl});
    keep(received);
    world.broadcast(gathered.span(), world.size() - 1, {Purpose::kControl});
    keep(gathered);
  };
  all_operations(float{});
  all_operations(double{});
  all_operations(BFloat16{});
  const auto pair = world.split(0, 0, "again");  // which inherits the device
  Buffer<float> data = moved(numbers<float>(5, world.process()), device);
  pair->all_reduce(data.span(), Reduction::kMax, {Purpose::kControl});
  keep(data);
  result.payload = payload() - before;
  return result;
}

TEST(DeviceSpans, GiveTheBitsAndTheBytesOfHostMemory) {
  for (const int processes : {1, kProcesses}) {
    run_world(processes, [](Communicator& world) {
      const Result host = run_all(world, nullptr);
      const std::unique_ptr<Device> device = open_device();
      world.set_device(device.get());
      const Result there = run_all(world, device.get());
      EXPECT_EQ(there.numbers, host.numbers);
      EXPECT_EQ(there.payload, host.payload);
      EXPECT_EQ(run_all(world, nullptr).numbers, host.numbers) << "host spans beside device ones";
      world.set_device(nullptr);
    });
  }
}

}  // namespace
}  // namespace lowband
