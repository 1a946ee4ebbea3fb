#pragma once

#include "optimizers/optimizer.h"
#include "runtime/copy.h"
#include "sharding/parameter.h"

#include <span>
#include <utility>
#include <vector>

namespace lowband {

/// Contiguous matrices for files, which the host reads and writes: themselves, or copies of those that lie on
/// a device. Views of it live as long as it does.
template <class Real>
class HostCopies {
 public:
  MatrixView<Real> of(MatrixView<Real> matrix) {
    if (matrix.device == nullptr) return matrix;
    Copy& made = copies_.emplace_back(matrix, Buffer<Real>(matrix.elements()));
    const MatrixView<Real> view = made.second.matrix(0, matrix.rows, matrix.cols);
    copy<Real>(matrix, view);
    return view;
  }
  std::vector<Parameter<Real>> weights_of(std::span<const Parameter<Real>> parameters) {
    std::vector<Parameter<Real>> on_host(parameters.begin(), parameters.end());
    for (Parameter<Real>& parameter : on_host) parameter.weight = of(parameter.weight);
    return on_host;
  }
  std::vector<StateTensor<Real>> of(std::vector<StateTensor<Real>> state) {
    for (StateTensor<Real>& tensor : state) tensor.value = of(tensor.value);
    return state;
  }

  /// What was changed in the copies, to where they were made of.
  void put_back() {
    for (Copy& made : copies_)
      copy<Real>(made.second.matrix(0, made.first.rows, made.first.cols), made.first);
  }

 private:
  using Copy = std::pair<MatrixView<Real>, Buffer<Real>>;  // of the first
  std::vector<Copy> copies_;
};

}  // namespace lowband
