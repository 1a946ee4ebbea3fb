#include "c_world.h"

#include <barrier>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

namespace lowband::testing {
namespace {

/// An all-gather between threads, as the callback of the C interface.
struct ThreadGather {
  explicit ThreadGather(int processes) : size(processes), together(processes) {}
  int size;
  std::barrier<> together;
  std::vector<char> all;
};

struct Place {
  ThreadGather* gather;
  int process;
};

int all_gather(void* context, const void* own, void* all, int64_t bytes) {
  const Place& place = *static_cast<Place*>(context);
  ThreadGather& gather = *place.gather;
  const auto count = static_cast<std::size_t>(bytes);
  gather.together.arrive_and_wait();
  if (place.process == 0) gather.all.resize(count * static_cast<std::size_t>(gather.size));
  gather.together.arrive_and_wait();
  std::memcpy(gather.all.data() + count * static_cast<std::size_t>(place.process), own, count);
  gather.together.arrive_and_wait();
  std::memcpy(all, gather.all.data(), gather.all.size());
  return 0;
}

}  // namespace

void expect_ok(lowband_status status) {
  if (status != LOWBAND_OK) throw std::runtime_error(lowband_last_error());
}

COptimizer::COptimizer(lowband_world* world, const std::vector<lowband_parameter>& parameters,
                       const lowband_options& options) {
  expect_ok(lowband_optimizer_create(world, parameters.data(), static_cast<std::int64_t>(parameters.size()),
                                     &options, &handle));
}

std::int64_t payload(const lowband_optimizer* optimizer, lowband_purpose purpose) {
  lowband_bytes bytes;
  lowband_bytes_defaults(&bytes);
  expect_ok(lowband_step_bytes(optimizer, "replica", purpose, &bytes));
  return bytes.payload_bytes;
}

void run_c_world(int processes, const std::function<void(lowband_world*)>& body) {
  ThreadGather gather(processes);
  std::vector<std::exception_ptr> failures(static_cast<std::size_t>(processes));
  std::vector<std::thread> threads;
  for (int process = 0; process < processes; ++process) {
    threads.emplace_back([&, process] {
      Place place{&gather, process};
      lowband_world* world = nullptr;
      try {
        expect_ok(lowband_set_compute_threads(1));
        expect_ok(lowband_world_from_all_gather(process, processes, all_gather, &place, &world));
        body(world);
      } catch (const std::exception& error) {
        failures[static_cast<std::size_t>(process)] = std::current_exception();
        if (world != nullptr) lowband_world_abort(world, error.what());
      }
      lowband_world_free(world);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& failure : failures) {
    if (failure) std::rethrow_exception(failure);
  }
}

}  // namespace lowband::testing
