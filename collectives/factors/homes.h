#pragma once

#include "runtime/types.h"

#include <span>
#include <vector>

namespace lowband {

/// A left factor P (rows, factor_rank) as a whole, over all processes that hold rows of it.
struct LeftExtent {
  Index rows = 0;
  Index factor_rank = 0;
};

/// The home of each matrix: which of `homes` processes sums and orthonormalises its P.
///
/// Two loads of a home count, each as a fraction of its mean over homes: elements, sum of a r, and the cost
/// of orthonormalisation, sum of a r^2. The matrices are dealt largest first, each to the home whose larger
/// load stays smallest. A pure function of its arguments.
///
/// Reference: longest processing time first (Graham 1969), here for two loads.
std::vector<int> choose_homes(std::span<const LeftExtent> factors, int homes);

/// How many of `filler` elements each part gets so that the largest part becomes as small as it can, and the
/// parts that get any differ by at most one element.
std::vector<Index> fill_up(std::span<const Index> parts, Index filler);

}  // namespace lowband
