#pragma once

#include "collectives/call.h"
#include "runtime/cuda/stream.h"
#include "runtime/types.h"

#include <cstddef>

namespace lowband {

/// The parts of one result as a process of `processes` holds them in device memory: its own, and in `others`
/// one behind the other those of the processes 1, 2, ... places back around the ring.
struct DeviceParts {
  const std::byte* own;
  const std::byte* others;
  int process;
  int processes;
};

/// `reduce_tree` of collectives/tree_reduction.h on a device: the same tree, the same bits, but for the
/// payload of a NaN. `out` may be `parts.own` when `out_dtype` is `dtype`. Stream: enqueued.
void device_reduce_tree(const DeviceParts& parts, std::byte* out, Index elements, DType dtype,
                        DType out_dtype, Reduction reduction, const CudaStream& stream);

}  // namespace lowband
