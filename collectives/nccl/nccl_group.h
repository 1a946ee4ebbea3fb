#pragma once

#include "collectives/communicator.h"

#include <memory>

namespace lowband {

/// A group of the processes of `host_group` whose bytes NCCL moves from device to device.
///
/// A call whose spans all lie in the memory of a Device set with `set_device` is enqueued between what that
/// device does before and behind it, and returns. A thread of the group looks after it meanwhile: polls its
/// events, NCCL's asynchronous errors and the deadline, and aborts. Without a Device spans may lie in device
/// memory too: the caller has waited for what is in them, and the call waits for its transfer. So it does
/// with spans in host memory, which go through a buffer on the device.
///
/// Every call first meets on a group split from `host_group`, which carries no data but compares the calls,
/// knows who does not come, tells of aborts, and hands NCCL's ids around. So a mismatch, a silent process and
/// an abort are reported as on the host group's backend. Once all have come, a transfer needs no host;
/// whoever gives up aborts NCCL's communicator.
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
