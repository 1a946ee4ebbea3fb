#pragma once

#include <string>

namespace lowband {

/// The NCCL of this binary (collectives/nccl/nccl_group.h).
struct NcclStatus {
  bool built_in = false;
  std::string version;  // of the library that was loaded, "2.28.9"; empty when not built in
  std::string reason;   // why it is not built in, one sentence; empty when it is
};
NcclStatus nccl_status();

}  // namespace lowband
