#pragma once

#include <chrono>

namespace lowband::cuda_on_host {

/// Of this thread: products by another algorithm of cuBLASLt than `algorithm` (0, 1 or 2) take longer.
void slow_down_algorithms_but(int algorithm, std::chrono::microseconds delay_of_others);
/// Of the last product of this thread.
int algorithm_of_last_product();

}  // namespace lowband::cuda_on_host
