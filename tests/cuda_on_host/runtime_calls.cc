// The calls of cuda_runtime_api.h.
#include "runtime/device.h"
#include "runtime/error.h"
#include "tests/cuda_on_host/block.h"
#include "tests/cuda_on_host/waits.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>
#include <sys/mman.h>

struct CUgraph_st {
  std::vector<std::function<cudaError_t()>> work;
};
struct CUgraphExec_st : CUgraph_st {};

namespace lowband {
namespace {

// What a stream has still to do, in order; empty but behind a transfer that goes on. It moves when somebody
// asks.
struct Queue {
  std::recursive_mutex mutex;
  std::deque<std::function<bool()>> work;  // each says whether it is over
  bool moving = false;
  cudaError_t error = cudaSuccess;  // the first of what ran late

  /// Whether everything is over.
  bool move() {
    // Not waited for: two streams may wait for each other's events, and whoever holds it moves it.
    const std::unique_lock lock(mutex, std::try_to_lock);
    if (!lock || moving) return false;
    moving = true;
    while (!work.empty() && work.front()()) work.pop_front();
    moving = false;
    return work.empty();
  }
  void drain() {
    const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (!move()) {
      if (std::chrono::steady_clock::now() > give_up) {
        std::fputs("cuda_on_host: a wait for a stream whose transfer never ends\n", stderr);
        std::abort();
      }
      std::this_thread::yield();
    }
  }
};

struct Moment {
  std::chrono::steady_clock::time_point time;
  std::weak_ptr<Queue> queue;
  std::atomic<bool> over = true;

  bool look() {
    if (!over) {
      if (const std::shared_ptr<Queue> own = queue.lock()) own->move();
    }
    return over;
  }
  void pass() {
    time = std::chrono::steady_clock::now();
    over = true;
  }
};

}  // namespace
}  // namespace lowband

struct CUstream_st {
  CUgraph_st* recording = nullptr;
  std::shared_ptr<lowband::Queue> queue = std::make_shared<lowband::Queue>();
};
struct CUmemPoolHandle_st {};
struct CUevent_st {
  std::shared_ptr<lowband::Moment> moment = std::make_shared<lowband::Moment>();
  cudaStream_t recorded_in = nullptr;
  // As on a device, what was recorded just now is over when somebody has waited, or asks once more.
  bool just_recorded = false;
  long waits_before = 0;
};

namespace lowband {
namespace {

constexpr std::size_t kPage = 4096;
// As far as a buffer's end may lie before the page that cannot be touched; what vector loads need.
constexpr std::size_t kAlignment = 16;
constexpr int kUntouched = 0xff;  // a NaN in every type
// Larger buffers stay open to the host: closing their pages for every call takes longer than the tests.
constexpr std::size_t kMostClosedBytes = std::size_t{1} << 20;

// Null is the default stream, in which only events are.
CUstream_st default_stream;
cudaStream_t or_default(cudaStream_t stream) { return stream == nullptr ? &default_stream : stream; }

std::atomic<long> waits = 0;
// Asked once.
bool is_under_way(CUevent_st& event) {
  return std::exchange(event.just_recorded, false) && event.waits_before == waits;
}
std::mutex pinned_mutex;
std::map<const unsigned char*, std::size_t> pinned;  // bytes by address
bool is_pinned(const void* memory) {
  const std::lock_guard lock(pinned_mutex);
  const auto* const address = static_cast<const unsigned char*>(memory);
  const auto after = pinned.upper_bound(address);
  return after != pinned.begin() && address < std::prev(after)->first + std::prev(after)->second;
}
thread_local bool logs_order = false;
thread_local std::vector<cuda_on_host::StreamOrder> order_log;

thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string last_reason;

std::size_t rounded_up(std::size_t x, std::size_t unit) { return (x + unit - 1) / unit * unit; }

// Every buffer ends where its pages end, up to the alignment; the page behind them stays closed. While no
// call needs them, so do its own.
class DeviceMemory {
 public:
  void* allocate(std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    const std::size_t open = rounded_up(std::max<std::size_t>(bytes, 1), kPage);
    void* const pages =
        mmap(nullptr, open + kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) return nullptr;
    auto* const begin = static_cast<unsigned char*>(pages);
    mprotect(begin, open, PROT_READ | PROT_WRITE);
    std::memset(begin, kUntouched, open);
    unsigned char* const memory = begin + open - rounded_up(bytes, kAlignment);
    const Buffer buffer{begin, open, memory, bytes};
    if (users_ == 0 && open <= kMostClosedBytes) mprotect(begin, open, PROT_NONE);
    buffers_.emplace(memory, buffer);
    allocated_bytes_ += static_cast<Index>(bytes);
    return memory;
  }
  /// What was asked for and is not freed yet.
  Index allocated_bytes() {
    const std::lock_guard lock(mutex_);
    return allocated_bytes_;
  }

  /// Says and ends the program when something was written beside the buffer.
  bool free(void* memory) {
    const std::lock_guard lock(mutex_);
    const auto found = buffers_.find(static_cast<unsigned char*>(memory));
    if (found == buffers_.end()) return false;
    const Buffer& buffer = found->second;
    mprotect(buffer.pages, buffer.open, PROT_READ | PROT_WRITE);
    const auto untouched = [](unsigned char byte) { return byte == kUntouched; };
    if (!std::all_of(buffer.pages, buffer.memory, untouched) ||
        !std::all_of(buffer.memory + buffer.bytes, buffer.pages + buffer.open, untouched)) {
      std::fprintf(stderr, "cuda_on_host: something was written beside a buffer of %zu bytes\n",
                   buffer.bytes);
      std::abort();
    }
    munmap(buffer.pages, buffer.open + kPage);
    allocated_bytes_ -= static_cast<Index>(buffer.bytes);
    buffers_.erase(found);
    return true;
  }

  enum class Place { kHost, kDevice, kBeside };
  /// Where [memory, memory + bytes) is.
  Place place_of(const void* memory, std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    const auto* const begin = static_cast<const unsigned char*>(memory);
    auto after = buffers_.upper_bound(const_cast<unsigned char*>(begin));
    if (after == buffers_.begin()) return Place::kHost;
    const Buffer& buffer = std::prev(after)->second;
    if (begin >= buffer.pages + buffer.open) return Place::kHost;
    return begin + bytes <= buffer.memory + buffer.bytes ? Place::kDevice : Place::kBeside;
  }

  void open() {
    const std::lock_guard lock(mutex_);
    if (users_++ == 0) protect(PROT_READ | PROT_WRITE);
  }
  void close() {
    const std::lock_guard lock(mutex_);
    if (--users_ == 0) protect(PROT_NONE);
  }

 private:
  struct Buffer {
    unsigned char* pages;
    std::size_t open;  // bytes of pages that are open in use
    unsigned char* memory;
    std::size_t bytes;
  };
  void protect(int access) {
    for (const auto& [memory, buffer] : buffers_) {
      if (buffer.open <= kMostClosedBytes) mprotect(buffer.pages, buffer.open, access);
    }
  }

  std::mutex mutex_;
  std::map<unsigned char*, Buffer> buffers_;
  Index allocated_bytes_ = 0;
  int users_ = 0;
};

DeviceMemory& device_memory() {
  static DeviceMemory memory;
  return memory;
}

std::mutex hash_mutex;
std::uint64_t hash = 0;

void add_to_hash(const void* bytes, std::size_t count) {
  const auto* const begin = static_cast<const unsigned char*>(bytes);
  std::uint64_t own = count;
  for (std::size_t i = 0; i < count; i += sizeof(std::uint64_t)) {
    std::uint64_t word = 0;
    std::memcpy(&word, begin + i, std::min(sizeof word, count - i));
    own = (own ^ word) * 0x9e3779b97f4a7c15;
    own ^= own >> 32;
  }
  const std::lock_guard lock(hash_mutex);
  hash += own;
}

}  // namespace

namespace cuda_on_host {

cudaError_t set_error(cudaError_t code, std::string why) {
  last_error = code;
  last_reason = std::move(why);
  return code;
}

cudaError_t enqueue(cudaStream_t stream, std::function<cudaError_t()> work) {
  if (stream->recording != nullptr) {
    stream->recording->work.push_back(std::move(work));
    return cudaSuccess;
  }
  const std::shared_ptr<Queue> queue = stream->queue;
  const std::lock_guard lock(queue->mutex);
  if (queue->work.empty()) return work();
  queue->work.push_back([own = queue.get(), work = std::move(work)] {
    const cudaError_t code = work();
    if (own->error == cudaSuccess) own->error = code;
    return true;
  });
  return cudaSuccess;
}

void enqueue_until(cudaStream_t stream, std::function<bool()> over) {
  const std::lock_guard lock(stream->queue->mutex);
  stream->queue->work.push_back(std::move(over));
}

bool in_device_memory(const void* memory, std::size_t bytes) {
  return device_memory().place_of(memory, bytes) == DeviceMemory::Place::kDevice;
}

DeviceAccess::DeviceAccess() { device_memory().open(); }
DeviceAccess::~DeviceAccess() { device_memory().close(); }

Index allocated_bytes() { return device_memory().allocated_bytes(); }

std::uint64_t hash_of_results() {
  const std::lock_guard lock(hash_mutex);
  return hash;
}
void forget_results() {
  const std::lock_guard lock(hash_mutex);
  hash = 0;
}

long host_waits() { return waits; }

std::vector<StreamOrder> log_stream_order(bool on) {
  logs_order = on;
  return std::exchange(order_log, {});
}

}  // namespace cuda_on_host

CudaStatus cuda_status() {
  CudaStatus status;
  status.built_in = true;
  status.toolkit_version = "on the host";
  status.devices.push_back({"this processor, not a GPU", "9.0", 0});
  return status;
}

}  // namespace lowband

using lowband::device_memory;
using lowband::cuda_on_host::DeviceAccess;
using lowband::cuda_on_host::enqueue;
using lowband::cuda_on_host::set_error;

cudaError_t cudaGetLastError() { return std::exchange(lowband::last_error, cudaSuccess); }

const char* cudaGetErrorName(cudaError_t code) {
  switch (code) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorNotReady:
      return "cudaErrorNotReady";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
  }
  return "unknown";
}
const char* cudaGetErrorString(cudaError_t /*code*/) { return lowband::last_reason.c_str(); }

cudaError_t cudaSetDevice(int device) {
  if (device == 0) return cudaSuccess;
  return set_error(cudaErrorInvalidDevice,
                   lowband::cat("found device ", device, ", there is device 0 alone"));
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr /*the only one*/, int /*device*/) {
  *value = static_cast<int>(lowband::cuda_on_host::kMostSharedBytes);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned /*flags*/, int /*priority*/) {
  *stream = new CUstream_st;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  stream->queue->drain();
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned /*flags*/) {
  if (lowband::logs_order) lowband::order_log.push_back({event->recorded_in, stream});
  stream = lowband::or_default(stream);
  if (!event->moment->over)
    lowband::cuda_on_host::enqueue_until(stream, [moment = event->moment] { return moment->look(); });
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return stream->queue->move() ? stream->queue->error : cudaErrorNotReady;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  ++lowband::waits;
  if (stream->recording != nullptr)
    return set_error(cudaErrorStreamCaptureUnsupported, "a wait for a stream that records");
  stream->queue->drain();
  return stream->queue->error;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->recorded_in = stream;
  stream = lowband::or_default(stream);
  event->just_recorded = true;
  event->waits_before = lowband::waits;
  event->moment = std::make_shared<lowband::Moment>();
  event->moment->queue = stream->queue;
  event->moment->over = false;
  return enqueue(stream, [moment = event->moment] {
    moment->pass();
    return cudaSuccess;
  });
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  const bool under_way = lowband::is_under_way(*event);
  return event->moment->look() && !under_way ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (lowband::is_under_way(*event)) ++lowband::waits;
  while (!event->moment->look()) std::this_thread::yield();
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  *milliseconds = std::chrono::duration<float, std::milli>(end->moment->time - begin->moment->time).count();
  return cudaSuccess;
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps* /*properties*/) {
  *pool = new CUmemPoolHandle_st;
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t /*pool*/, cudaMemPoolAttr /*attribute*/, void* /*value*/) {
  return cudaSuccess;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t /*pool*/, cudaMemPoolAttr /*attribute*/, void* value) {
  const std::uint64_t bytes = static_cast<std::uint64_t>(device_memory().allocated_bytes());
  std::memcpy(value, &bytes, sizeof bytes);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  *total = std::size_t{4} << 30;
  *free = *total - static_cast<std::size_t>(device_memory().allocated_bytes());
  return cudaSuccess;
}
cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool) {
  delete pool;
  return cudaSuccess;
}
cudaError_t cudaMallocFromPoolAsync(void** memory, std::size_t bytes, cudaMemPool_t /*pool*/,
                                    cudaStream_t stream) {
  if (stream->recording != nullptr)
    return set_error(cudaErrorStreamCaptureUnsupported, "an allocation by a stream that records");
  *memory = device_memory().allocate(bytes);
  return *memory != nullptr ? cudaSuccess : set_error(cudaErrorMemoryAllocation, "no memory");
}
cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream) {
  const auto work = [=] {
    return device_memory().free(memory) ? cudaSuccess
                                        : set_error(cudaErrorInvalidValue, "not a device buffer");
  };
  return stream->recording != nullptr ? work() : enqueue(stream, work);
}

cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream) {
  using Place = lowband::DeviceMemory::Place;
  if (device_memory().place_of(memory, bytes) != Place::kDevice)
    return set_error(cudaErrorInvalidValue, "beyond a device buffer");
  return enqueue(stream, [=] {
    const DeviceAccess access;
    std::memset(memory, value, bytes);
    return cudaSuccess;
  });
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind /*from addresses*/,
                            cudaStream_t stream) {
  using Place = lowband::DeviceMemory::Place;
  const Place target = device_memory().place_of(to, bytes), source = device_memory().place_of(from, bytes);
  if (target == Place::kBeside || source == Place::kBeside)
    return set_error(cudaErrorInvalidValue, "beyond a device buffer");
  if (source == Place::kDevice && target == Place::kHost && !lowband::is_pinned(to)) {
    ++lowband::waits;
    if (stream->recording == nullptr) stream->queue->drain();
  }
  // Behind a transfer, what is not pinned is read now.
  std::shared_ptr<std::vector<unsigned char>> kept;
  if (source == Place::kHost && stream->recording == nullptr && !lowband::is_pinned(from) &&
      !stream->queue->move()) {
    const auto* const begin = static_cast<const unsigned char*>(from);
    kept = std::make_shared<std::vector<unsigned char>>(begin, begin + bytes);
  }
  return enqueue(stream, [=] {
    const DeviceAccess access;
    if (bytes > 0) std::memcpy(to, kept != nullptr ? kept->data() : from, bytes);
    if (source == Place::kDevice && target == Place::kHost) lowband::add_to_hash(to, bytes);
    return cudaSuccess;
  });
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* memory) {
  const bool device = device_memory().place_of(memory, 0) == lowband::DeviceMemory::Place::kDevice;
  attributes->type = device ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  attributes->device = device ? 0 : -2;  // as CUDA leaves it for memory that it does not know
  return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
                              std::size_t width, std::size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream) {
  if (width > to_pitch || width > from_pitch) return set_error(cudaErrorInvalidValue, "rows overlap");
  for (std::size_t row = 0; row < height; ++row) {
    const cudaError_t code =
        cudaMemcpyAsync(static_cast<unsigned char*>(to) + row * to_pitch,
                        static_cast<const unsigned char*>(from) + row * from_pitch, width, kind, stream);
    if (code != cudaSuccess) return code;
  }
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned /*flags*/) {
  *memory = std::malloc(bytes);
  if (*memory == nullptr) return set_error(cudaErrorMemoryAllocation, "no memory");
  const std::lock_guard lock(lowband::pinned_mutex);
  lowband::pinned[static_cast<const unsigned char*>(*memory)] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) {
  const std::lock_guard lock(lowband::pinned_mutex);
  lowband::pinned.erase(static_cast<const unsigned char*>(memory));
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode /*mode*/) {
  stream->recording = new CUgraph_st;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = std::exchange(stream->recording, nullptr);
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long /*flags*/) {
  *executable = new CUgraphExec_st{*graph};
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  for (const auto& work : executable->work) {
    const cudaError_t code = enqueue(stream, work);
    if (code != cudaSuccess) return code;
  }
  return cudaSuccess;
}
