#pragma once

#include "collectives/communicator.h"

#include <memory>

namespace lowband {

/// A group of the processes of `host_group` whose bytes NCCL moves from device to device.
///
/// Spans handed to it may lie in device memory, where what they hold is complete when the call returns;
/// before it, a Device set with `set_device` has ended its work, what other streams do the caller must have
/// waited for. Spans in host memory go through a buffer on the device.
///
/// Every call first meets on a group split from `host_group`, which carries no data but compares the calls,
/// knows who does not come, tells of aborts, and hands NCCL's ids around. So a mismatch, a silent process and
/// an abort are reported as on the host group's backend. Once all have come, a wait polls the stream, NCCL's
/// asynchronous errors and the deadline; whoever gives up aborts NCCL's communicator.
///
/// Determinism: exact, by sending raw parts to their owners, who add them as the documented tree; `kFast`
/// leaves sums to NCCL, but for maxima (NCCL's lose a NaN) and for bf16 (NCCL's rings round at every hop).
/// Bytes: of the algorithm used; in NCCL's own all-reduce those of a ring, split evenly.
///
/// Its ledger is its own. Ownership: `host_group` may end before it, the job's transport may not.
/// Collective: all processes of `host_group`; `device` is this process's. NCCL wants a device for every
/// process; on one for several, docs/backends.md.
/// Throws: InvalidArgument when there is no such device, naming why; NcclError, also when NCCL is not built
/// in.
std::unique_ptr<Communicator> make_nccl_group(Communicator& host_group, int device);

}  // namespace lowband
