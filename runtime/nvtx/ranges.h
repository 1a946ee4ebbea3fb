#pragma once

#include <string>

namespace lowband {

/// Opens and closes an NVTX range of this thread; does nothing where NVTX is not built in.
void nvtx_push(const std::string& name);
void nvtx_pop();
bool nvtx_built_in();

}  // namespace lowband
