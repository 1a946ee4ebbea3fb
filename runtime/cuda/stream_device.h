#pragma once

#include "runtime/cuda/blas.h"
#include "runtime/device.h"

#include <memory>

namespace lowband {

/// A Device whose queue of work is the stream of `blas`: what it does follows what is enqueued there by
/// others, and the other way round, without waiting. Ownership: borrows `blas`. Threads: those of the stream.
std::unique_ptr<Device> device_on(CudaBlas& blas);

}  // namespace lowband
