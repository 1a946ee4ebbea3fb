#include "collectives/nccl/nccl_group.h"
#include "collectives/nccl/nccl_status.h"
#include "runtime/error.h"

namespace lowband {

NcclStatus nccl_status() {
  return {.built_in = false, .version = "", .reason = "lowband was built without NCCL (LOWBAND_NCCL)"};
}

std::unique_ptr<Communicator> make_nccl_group(Communicator& /*host_group*/, int /*device*/) {
  throw NcclError(nccl_status().reason);
}

}  // namespace lowband
