#pragma once

#include "runtime/cuda/blas.h"
#include "runtime/device.h"

#include <memory>

namespace lowband {

/// A Device whose queue of work is the stream of `blas`: what it does follows what is enqueued there by
/// others, and the other way round, without waiting. Ownership: borrows `blas`. Threads: those of the stream.
std::unique_ptr<Device> device_on(CudaBlas& blas);

/// What the device computes products with, on the stream that is its queue. Threads: that of the stream.
/// Throws: InvalidArgument for null, and for a Device that is not made here or by open_device.
CudaBlas& blas_of(Device* device);

}  // namespace lowband
