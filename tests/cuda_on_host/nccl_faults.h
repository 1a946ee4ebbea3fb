#pragma once

#include <cstdint>

namespace lowband::cuda_on_host {

/// What goes wrong in the calling thread's calls of NCCL from now on.
enum class NcclFault : std::uint8_t {
  kNone,
  kNeverJoins,   // a new communicator is not seen by its peers
  kNeverStarts,  // transfers wait on their stream for ever
  kRemoteError,  // transfers wait, and the communicator reports ncclRemoteError
};
void set_nccl_fault(NcclFault fault);

/// Communicators that were neither destroyed nor aborted, of all threads.
int living_nccl_communicators();
/// How they ended, and what was asked of them, since the program began.
struct NcclCounts {
  long destroyed;
  long aborted;
  long in_progress;  // calls that answered ncclInProgress
  long unfinished;   // looks at a transfer that was not over
};
NcclCounts nccl_counts();

}  // namespace lowband::cuda_on_host
