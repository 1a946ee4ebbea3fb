#include "runtime/cuda/buffer.h"
#include "runtime/cuda/stream.h"
#include "runtime/device.h"
#include "runtime/error.h"

namespace lowband {
namespace {

constexpr const char* kReason =
    "built without CUDA (needs nvcc, the CUDA runtime and cuBLAS at configure time)";

// Everything on a device needs a stream, and there is none.
[[noreturn]] void unavailable() { throw CudaError(kReason); }

}  // namespace

CudaStatus cuda_status() {
  CudaStatus status;
  status.reason = kReason;
  return status;
}

std::unique_ptr<Device> open_device(int /*index*/) { unavailable(); }

CudaStream::CudaStream(int device, Priority /*priority*/) : device_(device) { unavailable(); }
CudaStream::~CudaStream() {}
void CudaStream::make_current() const { unavailable(); }
void CudaStream::wait_for(const CudaEvent& /*event*/) const { unavailable(); }
bool CudaStream::finished() const { unavailable(); }
void CudaStream::synchronize() const { unavailable(); }

CudaEvent::CudaEvent(const CudaStream& /*stream*/) { unavailable(); }
CudaEvent::~CudaEvent() {}
void CudaEvent::record(CUstream_st* /*stream*/) { unavailable(); }
void CudaEvent::hold(CUstream_st* /*stream*/) const { unavailable(); }
bool CudaEvent::over() const { unavailable(); }
void CudaEvent::synchronize() const { unavailable(); }
double CudaEvent::seconds_since(const CudaEvent& /*earlier*/) const { unavailable(); }

CudaGraph::CudaGraph(const CudaStream& /*stream*/, const std::function<void()>& /*body*/) { unavailable(); }
CudaGraph::~CudaGraph() {}
void CudaGraph::launch(const CudaStream& /*stream*/) const { unavailable(); }

void* cuda_allocate(Index /*bytes*/, const CudaStream& /*stream*/) { unavailable(); }
void cuda_free(void* /*bytes*/, const CudaStream& /*stream*/) noexcept {}
void cuda_zero(void* /*bytes*/, Index /*count*/, const CudaStream& /*stream*/) { unavailable(); }
void cuda_copy(void* /*to*/, const void* /*from*/, Index /*bytes*/, const CudaStream& /*stream*/) {
  unavailable();
}
void cuda_copy_rows(void* /*to*/, Index /*to_stride*/, const void* /*from*/, Index /*from_stride*/,
                    Index /*width*/, Index /*rows*/, const CudaStream& /*stream*/) {
  unavailable();
}
int cuda_device_of(const void* /*address*/) { unavailable(); }
void* cuda_allocate_pinned(Index /*bytes*/) { unavailable(); }
void cuda_free_pinned(void* /*bytes*/) noexcept {}

}  // namespace lowband
