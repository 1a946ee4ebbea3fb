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

}  // namespace lowband
