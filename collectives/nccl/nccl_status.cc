#include "collectives/nccl/nccl_status.h"

#include "runtime/error.h"

#include <nccl.h>

namespace lowband {

NcclStatus nccl_status() {
  int code = 0;
  if (const ncclResult_t result = ncclGetVersion(&code); result != ncclSuccess) {
    throw Error(cat("ncclGetVersion: ", ncclGetErrorString(result)));
  }
  // NCCL's own encoding since 2.9: major * 10000 + minor * 100 + patch.
  return {
      .built_in = true, .version = cat(code / 10000, ".", code / 100 % 100, ".", code % 100), .reason = ""};
}

}  // namespace lowband
