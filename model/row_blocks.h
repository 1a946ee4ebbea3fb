#pragma once

#include "model/layers.h"

#include <algorithm>

namespace lowband {

/// body(block, begin, end) for every block of kRowBlock rows, in parallel.
template <class Body>
void for_row_blocks(Index rows, Body body) {
  const Index blocks = row_blocks(rows);
#pragma omp parallel for schedule(static)
  for (Index block = 0; block < blocks; ++block)
    body(block, block * kRowBlock, std::min(rows, (block + 1) * kRowBlock));
}

}  // namespace lowband
