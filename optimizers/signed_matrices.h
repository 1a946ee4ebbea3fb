#pragma once

#include "optimizers/cut_matrix.h"
#include "optimizers/options.h"

#include <vector>

namespace lowband {

/// A matrix that is signed by itself, and where it is taken from.
struct SignedMatrix {
  CutMatrix cut;
  std::vector<Range> rows, cols;  // of the parameter, in increasing order
};

/// What is signed of one layer matrix by a kind that takes signs: the matrix itself; its blocks, those of the
/// parameter or the heads that OptimizerOptions::blocks asks for; or as many slices as Dion2 selects, of
/// which the pieces and places are found in each step. Throws: InvalidArgument naming the parameter, when its
/// blocks are none, or heads do not divide it.
std::vector<SignedMatrix> signed_matrices(const ParameterInfo& info, const MeshShape& mesh,
                                          const OptimizerOptions& options);

}  // namespace lowband
