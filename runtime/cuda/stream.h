#pragma once

#include "runtime/types.h"

#include <functional>
#include <vector>

// What cudaStream_t, cudaEvent_t and cudaMemPool_t point to: CUDA's headers stay out of ours.
struct CUstream_st;
struct CUevent_st;
struct CUmemPoolHandle_st;
struct CUgraphExec_st;

namespace lowband {

class CudaEvent;

/// A queue of work on one device, and a pool of device memory for buffers of that queue.
///
/// What is enqueued runs in order. Functions that take a stream enqueue and return, unless they say that they
/// wait. Threads: one at a time.
/// Throws: CudaError naming the call, its code and its text; also when CUDA is not built in or there is no
/// such device.
class CudaStream {
 public:
  enum class Priority : std::uint8_t { kNormal, kHigh };

  explicit CudaStream(int device = 0, Priority priority = Priority::kNormal);
  ~CudaStream();
  CudaStream(const CudaStream&) = delete;
  CudaStream& operator=(const CudaStream&) = delete;

  int device() const { return device_; }
  CUstream_st* handle() const { return stream_; }
  CUmemPoolHandle_st* pool() const { return pool_; }
  /// Bytes that buffers of this stream can still take: what the device has free, and the pool keeps.
  Index free_bytes() const;

  /// Makes `device()` the calling thread's device, as CUDA's own calls expect.
  void make_current() const;
  /// Later work starts when `event` is over. Does not wait.
  void wait_for(const CudaEvent& event) const;
  /// Whether everything enqueued so far is over; throws what went wrong in it.
  bool finished() const;
  /// Waits until `finished()`.
  void synchronize() const;

  /// Whether the device was asked to give `kernel` its shared memory, for launches on this stream; and to
  /// note that it was.
  bool has_shared_memory(const void* kernel) const;
  void note_shared_memory(const void* kernel) const { with_shared_memory_.push_back(kernel); }

 private:
  int device_;
  CUstream_st* stream_ = nullptr;
  CUmemPoolHandle_st* pool_ = nullptr;
  mutable std::vector<const void*> with_shared_memory_;  // kernels
};

/// A moment in the work of a stream. Never recorded, it counts as over.
class CudaEvent {
 public:
  explicit CudaEvent(const CudaStream& stream);  // of the same device
  ~CudaEvent();
  CudaEvent(const CudaEvent&) = delete;
  CudaEvent& operator=(const CudaEvent&) = delete;

  CUevent_st* handle() const { return event_; }
  /// After all work enqueued on `stream` so far.
  void record(const CudaStream& stream) { record(stream.handle()); }
  void record(CUstream_st* stream);
  /// Later work of `stream` starts when this event is over. Does not wait.
  void hold(CUstream_st* stream) const;
  bool over() const;
  /// Waits.
  void synchronize() const;
  /// Between two recorded moments, on the device's clock (about half a microsecond fine). Waits for this one.
  double seconds_since(const CudaEvent& earlier) const;

 private:
  CUevent_st* event_ = nullptr;
};

/// Work of a stream, recorded once to be enqueued many times by one call each.
class CudaGraph {
 public:
  /// Records what `body` enqueues on `stream`; nothing runs. It may neither allocate nor wait, and all memory
  /// that it names has to stay where it is.
  CudaGraph(const CudaStream& stream, const std::function<void()>& body);
  ~CudaGraph();
  CudaGraph(const CudaGraph&) = delete;
  CudaGraph& operator=(const CudaGraph&) = delete;

  /// Enqueues the work once more.
  void launch(const CudaStream& stream) const;

 private:
  CUgraphExec_st* graph_ = nullptr;
};

}  // namespace lowband
