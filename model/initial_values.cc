#include "model/initial_values.h"

#include "model/row_blocks.h"
#include "runtime/random.h"

#include <algorithm>
#include <cmath>

namespace lowband {

template <class Real>
void draw_initial_values(const ParameterInfo& info, Index layers, std::uint64_t seed, int tensor_processes,
                         int tensor_process, MatrixView<Real> weight) {
  if (info.role == Role::kNorm) {
    std::fill_n(weight.data, weight.elements(), Real{1});
    return;
  }
  const bool into_residual = info.role == Role::kOutput || info.role == Role::kDown;
  const double deviation = into_residual ? 0.02 / std::sqrt(2.0 * static_cast<double>(layers)) : 0.02;
  const MatrixLayout layout(info.rows, info.cols, info.cut, tensor_processes, 1);
  const Index first_row = layout.tensor_rows(tensor_process).begin;
  const Index first_col = layout.tensor_cols(tensor_process).begin;
  const RandomStream stream(seed, info.name);
  for_row_blocks(weight.rows, [&](Index, Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      const Index row_start = (first_row + i) * info.cols + first_col;
      for (Index j = 0; j < weight.cols; ++j)
        weight(i, j) = static_cast<Real>(deviation * stream.normal(row_start + j));
    }
  });
}

template void draw_initial_values(const ParameterInfo&, Index, std::uint64_t, int, int, MatrixView<float>);
template void draw_initial_values(const ParameterInfo&, Index, std::uint64_t, int, int, MatrixView<double>);

}  // namespace lowband
