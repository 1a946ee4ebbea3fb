#include "optimizers/keyed_columns.h"

#include <cmath>

namespace lowband {

std::vector<double> keyed_unit_column(const RandomStream& stream, Index rows, Index cols, Index j) {
  std::vector<double> column(static_cast<std::size_t>(rows));
  double squares = 0;
  for (Index row = 0; row < rows; ++row) {
    double& x = column[static_cast<std::size_t>(row)];
    x = stream.normal(row * cols + j);
    squares += x * x;
  }
  const double norm = std::sqrt(squares);
  for (double& x : column) x /= norm;
  return column;
}

template <class Real>
void redraw_columns(MatrixView<const Real> redrawn, const RandomStream& stream, Index rows, Index first,
                    MatrixView<Real> x) {
  if (Device* const device = computing_device<Real>("redraw_columns", redrawn, x)) {
    if constexpr (kOnDevices<Real>) return device->redraw_columns(redrawn.data, stream, rows, first, x);
  }
  for (Index j = 0; j < x.cols; ++j) {
    if (redrawn(0, j) != Real{0})
      copy_column(keyed_unit_column(stream, rows, x.cols, j), first, x.block(0, x.rows, j, 1));
  }
}

template void redraw_columns<float>(MatrixView<const float>, const RandomStream&, Index, Index,
                                    MatrixView<float>);
template void redraw_columns<double>(MatrixView<const double>, const RandomStream&, Index, Index,
                                     MatrixView<double>);

}  // namespace lowband
