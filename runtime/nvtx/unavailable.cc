#include "runtime/nvtx/ranges.h"

namespace lowband {

void nvtx_push(const std::string&) {}
void nvtx_pop() {}
bool nvtx_built_in() { return false; }

}  // namespace lowband
