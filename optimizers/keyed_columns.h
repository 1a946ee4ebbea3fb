#pragma once

#include "runtime/random.h"

#include <vector>

namespace lowband {

/// Column j of a (rows, cols) matrix of standard normal numbers from `stream`, scaled to unit length. The
/// same on every process, which draws the whole column although it may need some of its rows only.
std::vector<double> keyed_unit_column(const RandomStream& stream, Index rows, Index cols, Index j);

}  // namespace lowband
