#include "runtime/cuda/stream.h"

#include "runtime/cuda/buffer.h"
#include "runtime/cuda/check.cuh"

#include <algorithm>
#include <cstdint>
#include <limits>

#include <cuda_runtime_api.h>

namespace lowband {
namespace {

cudaMemPool_t make_pool(int device) {
  cudaMemPoolProps properties{};
  properties.allocType = cudaMemAllocationTypePinned;  // the only kind: memory that stays where it is
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = device;
  cudaMemPool_t pool = nullptr;
  check_cuda(cudaMemPoolCreate(&pool, &properties), "cudaMemPoolCreate");
  // Freed memory stays in the pool when the stream is synchronised: the next step asks for it again.
  std::uint64_t kept_bytes = std::numeric_limits<std::uint64_t>::max();
  check_cuda(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept_bytes),
             "cudaMemPoolSetAttribute");
  return pool;
}

}  // namespace

CudaStream::CudaStream(int device, Priority priority) : device_(device) {
  make_current();
  int least = 0, greatest = 0;  // numerically, the greatest priority is the smallest number
  check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
  check_cuda(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking,
                                          priority == Priority::kHigh ? greatest : least),
             "cudaStreamCreateWithPriority");
  try {
    pool_ = make_pool(device);
  } catch (...) {
    cudaStreamDestroy(stream_);
    throw;
  }
}

CudaStream::~CudaStream() {
  // Both return at once; CUDA lets go when the work is over and the last buffer is freed.
  cudaStreamDestroy(stream_);
  cudaMemPoolDestroy(pool_);
}

void CudaStream::make_current() const { check_cuda(cudaSetDevice(device_), "cudaSetDevice"); }

Index CudaStream::free_bytes() const {
  make_current();
  std::size_t free = 0, total = 0;
  check_cuda(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  std::uint64_t reserved = 0, used = 0;
  check_cuda(cudaMemPoolGetAttribute(pool_, cudaMemPoolAttrReservedMemCurrent, &reserved),
             "cudaMemPoolGetAttribute");
  check_cuda(cudaMemPoolGetAttribute(pool_, cudaMemPoolAttrUsedMemCurrent, &used), "cudaMemPoolGetAttribute");
  return static_cast<Index>(free + reserved - used);
}

void CudaStream::wait_for(const CudaEvent& event) const {
  make_current();
  event.hold(stream_);
}

bool CudaStream::finished() const {
  const cudaError_t state = cudaStreamQuery(stream_);
  if (state == cudaErrorNotReady) {
    static_cast<void>(cudaGetLastError());
    return false;
  }
  check_cuda(state, "cudaStreamQuery");
  return true;
}

bool CudaStream::has_shared_memory(const void* kernel) const {
  return std::find(with_shared_memory_.begin(), with_shared_memory_.end(), kernel) !=
         with_shared_memory_.end();
}

void CudaStream::synchronize() const { check_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

CudaEvent::CudaEvent(const CudaStream& stream) {
  stream.make_current();
  check_cuda(cudaEventCreate(&event_), "cudaEventCreate");
}

CudaEvent::~CudaEvent() { cudaEventDestroy(event_); }

void CudaEvent::record(CUstream_st* stream) {
  check_cuda(cudaEventRecord(event_, stream), "cudaEventRecord");
}

void CudaEvent::hold(CUstream_st* stream) const {
  check_cuda(cudaStreamWaitEvent(stream, event_, 0), "cudaStreamWaitEvent");
}

bool CudaEvent::over() const {
  const cudaError_t state = cudaEventQuery(event_);
  if (state == cudaErrorNotReady) {
    static_cast<void>(cudaGetLastError());
    return false;
  }
  check_cuda(state, "cudaEventQuery");
  return true;
}

void CudaEvent::synchronize() const { check_cuda(cudaEventSynchronize(event_), "cudaEventSynchronize"); }

double CudaEvent::seconds_since(const CudaEvent& earlier) const {
  synchronize();
  float milliseconds = 0;
  check_cuda(cudaEventElapsedTime(&milliseconds, earlier.event_, event_), "cudaEventElapsedTime");
  return static_cast<double>(milliseconds) / 1000;
}

CudaGraph::CudaGraph(const CudaStream& stream, const std::function<void()>& body) {
  stream.make_current();
  check_cuda(cudaStreamBeginCapture(stream.handle(), cudaStreamCaptureModeThreadLocal),
             "cudaStreamBeginCapture");
  cudaGraph_t recorded = nullptr;
  try {
    body();
  } catch (...) {
    cudaStreamEndCapture(stream.handle(), &recorded);
    if (recorded != nullptr) cudaGraphDestroy(recorded);
    static_cast<void>(cudaGetLastError());
    throw;
  }
  check_cuda(cudaStreamEndCapture(stream.handle(), &recorded), "cudaStreamEndCapture");
  const cudaError_t made = cudaGraphInstantiate(&graph_, recorded, 0);
  cudaGraphDestroy(recorded);
  check_cuda(made, "cudaGraphInstantiate");
}

CudaGraph::~CudaGraph() { cudaGraphExecDestroy(graph_); }

void CudaGraph::launch(const CudaStream& stream) const {
  stream.make_current();
  check_cuda(cudaGraphLaunch(graph_, stream.handle()), "cudaGraphLaunch");
}

void* cuda_allocate(Index bytes, const CudaStream& stream) {
  stream.make_current();
  void* memory = nullptr;
  check_cuda(
      cudaMallocFromPoolAsync(&memory, static_cast<std::size_t>(bytes), stream.pool(), stream.handle()),
      cat("cudaMallocFromPoolAsync of ", bytes, " bytes on device ", stream.device()));
  return memory;
}

void cuda_free(void* bytes, const CudaStream& stream) noexcept { cudaFreeAsync(bytes, stream.handle()); }

void cuda_zero(void* bytes, Index count, const CudaStream& stream) {
  stream.make_current();
  check_cuda(cudaMemsetAsync(bytes, 0, static_cast<std::size_t>(count), stream.handle()), "cudaMemsetAsync");
}

void cuda_copy(void* to, const void* from, Index bytes, const CudaStream& stream) {
  stream.make_current();
  check_cuda(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyDefault, stream.handle()),
             cat("cudaMemcpyAsync of ", bytes, " bytes"));
}

void cuda_copy_rows(void* to, Index to_stride, const void* from, Index from_stride, Index width, Index rows,
                    const CudaStream& stream) {
  stream.make_current();
  check_cuda(cudaMemcpy2DAsync(to, static_cast<std::size_t>(to_stride), from,
                               static_cast<std::size_t>(from_stride), static_cast<std::size_t>(width),
                               static_cast<std::size_t>(rows), cudaMemcpyDefault, stream.handle()),
             cat("cudaMemcpy2DAsync of ", rows, " rows of ", width, " bytes"));
}

int cuda_device_of(const void* address) {
  cudaPointerAttributes attributes{};
  check_cuda(cudaPointerGetAttributes(&attributes, address), "cudaPointerGetAttributes");
  return attributes.type == cudaMemoryTypeDevice ? attributes.device : -1;
}

void* cuda_allocate_pinned(Index bytes) {
  void* memory = nullptr;
  check_cuda(cudaHostAlloc(&memory, static_cast<std::size_t>(bytes), cudaHostAllocPortable),
             cat("cudaHostAlloc of ", bytes, " bytes"));
  return memory;
}

void cuda_free_pinned(void* bytes) noexcept { cudaFreeHost(bytes); }

}  // namespace lowband
