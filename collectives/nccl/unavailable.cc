#include "collectives/nccl/nccl_status.h"

namespace lowband {

NcclStatus nccl_status() {
  return {.built_in = false, .version = "", .reason = "lowband was built without NCCL (LOWBAND_NCCL)"};
}

}  // namespace lowband
