#pragma once

#include "optimizers/diagnosis.h"
#include "optimizers/optimizer.h"
#include "runtime/tensor.h"

#include <functional>
#include <span>
#include <vector>

namespace lowband {

/// Updates layer matrices, each as a whole although every process owns a block of it.
///
/// Collective, every function but `state` and `size`: all processes of the mesh, equal arguments apart from
/// memory.
template <class Real>
class MatrixOptimizer {
 public:
  /// One matrix in one step: the blocks that this process owns.
  struct Piece {
    MatrixView<const Real> gradient;  // contiguous
    MatrixView<Real> weight;
    /// Agreed by all processes: where it is set no state changes, zeros travel. Where the weight lies, or
    /// on the host for optimizers that decide there (decides_on_the_host).
    MatrixView<const std::uint8_t> skipped;
  };

  MatrixOptimizer() = default;
  MatrixOptimizer(const MatrixOptimizer&) = delete;
  MatrixOptimizer& operator=(const MatrixOptimizer&) = delete;
  virtual ~MatrixOptimizer() = default;

  /// What `update` did; equal on all processes.
  struct Outcome {
    Index dead_columns = 0;
    Index householder_fallbacks = 0;
  };
  /// To be asked once at any time later, by a caller that then waits for a device if need be. Throws: Error,
  /// on all processes, when a state is not finite although the gradients are; such a matrix is left alone.
  using LaterOutcome = std::function<Outcome()>;
  /// New states and weights. `scale` multiplies the gradients, where they are sums over the processes that
  /// share the data, and what was decompressed where matrices are exchanged by their factors.
  virtual LaterOutcome update(std::span<const Piece> pieces, const Scalar& scale, const StepInfo& info,
                              Diagnosis<Real>* diagnosis) = 0;

  virtual Index size() const = 0;
  /// LayerMatrix::state_name of the paper's letters, of matrix i.
  virtual std::vector<StateTensor<Real>> state(Index i) = 0;
};

}  // namespace lowband
