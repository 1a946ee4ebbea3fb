#include "optimizers/signed_matrices.h"

#include "optimizers/dion2.h"

namespace lowband {

std::vector<SignedMatrix> signed_matrices(const ParameterInfo& info, const MeshShape& mesh,
                                          const OptimizerOptions& options) {
  if (!selects_slices(options.kind)) return {{cut_matrix(info, mesh), {{0, info.rows}}, {{0, info.cols}}}};
  ParameterInfo selected = info;
  Index& slices = slices_are_rows(info, options) ? selected.rows : selected.cols;
  slices = selected_slices(slices, options);
  return {{cut_matrix(selected, mesh), {}, {}}};
}

}  // namespace lowband
