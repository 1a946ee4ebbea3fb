#pragma once

#include "runtime/types.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

#include <cuda_runtime_api.h>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1)  // NOLINT(google-explicit-constructor)
      : uint3{x_, y_, z_} {}
};

// Of the fiber that runs. Worlds of a test are threads, and each launches for itself.
inline thread_local constinit uint3 threadIdx{}, blockIdx{}, blockDim{}, gridDim{};

namespace lowband::cuda_on_host {

/// In which order threads run where CUDA leaves it open: threads of a warp between two exchanges, warps
/// between two barriers (each as far as it gets, or by turns that are drawn), blocks. A kernel whose result
/// depends on it lacks a barrier.
enum class Order : std::uint8_t { kForward, kBackward, kShuffled };
void set_order(Order order);  // for launches of all threads from now on

/// Runs body() once for every thread of the grid, to the end.
///
/// Errors: InvalidConfiguration for a launch that a device of sm_90 refuses; LaunchFailure when threads of a
/// block wait at different barriers, or for a thread that has ended, or ask for a value of a lane that takes
/// no part. cudaGetErrorString then says where.
cudaError_t run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, void (*kernel)(),
                     const std::function<void()>& body);
/// How much dynamic shared memory a launch of `kernel` may ask for; 48 KiB without this.
cudaError_t allow_shared_bytes(void (*kernel)(), int bytes);
/// How often that was called, for all kernels.
Index shared_memory_requests();

inline constexpr std::size_t kExchangeBytes = 32;
inline constexpr std::size_t kMostSharedBytes = 227 * 1024;  // of a block on sm_90

// For the fiber that runs.
void wait_for_block(const std::source_location& site);
void wait_for_warp(unsigned mask, const std::source_location& site);
unsigned own_lane();
void* exchange_slot();
const void* exchanged(unsigned mask, unsigned lane, const std::source_location& site);
/// What any lane gave to the last exchange.
const void* given_by(unsigned lane);

// What cuda_pipeline.h declares, for the fiber that runs.
void copy_later(void* to, const void* from, std::size_t bytes, std::size_t zeros,
                const std::source_location& site);
void close_batch_of_copies();
void finish_copies(std::size_t all_but);

/// Ends the launch with `what`.
[[noreturn]] void fail(const char* what, const std::source_location& site);

/// Runs `work` now, or puts it into the graph that `stream` is recording.
cudaError_t enqueue(cudaStream_t stream, std::function<cudaError_t()> work);

bool in_device_memory(const void* memory, std::size_t bytes);

/// Remembers what cudaGetErrorString says about the calling thread's error; returns `code`.
cudaError_t set_error(cudaError_t code, std::string why);

/// While one lives, the host may touch device memory, as kernels and copies must.
class DeviceAccess {
 public:
  DeviceAccess();
  ~DeviceAccess();
  DeviceAccess(const DeviceAccess&) = delete;
  DeviceAccess& operator=(const DeviceAccess&) = delete;
};

/// Bytes of device memory that are allocated, by all threads.
Index allocated_bytes();

/// Of all bytes that were copied from device memory to host memory since they were forgotten; in any order of
/// copies, for processes that are threads.
std::uint64_t hash_of_results();
void forget_results();

}  // namespace lowband::cuda_on_host
