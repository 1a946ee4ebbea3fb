#pragma once

#include "runtime/buffer.h"
#include "sharding/parameter.h"
#include "sharding/process_mesh.h"

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace lowband {

/// What the trainer decides for one step.
struct StepInfo {
  Index step = 0;                   // 0-based
  double learning_rate = 0;         // of matrices, after the schedule
  double scalar_learning_rate = 0;  // of everything else, after the schedule
};

/// What one step did; equal on all processes except the times.
struct StepReport {
  double gradient_norm = 0;         // of the mean gradient, before clipping
  double clip_scale = 1;            // factor applied to all gradients, <= 1
  Index skipped_matrices = 0;       // left alone for a non-finite gradient
  Index skipped_other = 0;          // likewise, parameters that are not matrices
  Index dead_columns = 0;           // of all P, refilled for the next step
  Index householder_fallbacks = 0;  // orthonormalisations that needed it
  double seconds = 0;
};

/// Named pieces of state of this process, for checkpoints. Names are "<parameter>.<letter>" in the paper's
/// letters. Values are views: saving reads them, loading writes them in place; shapes and dtype must match
/// exactly.
template <class Real>
struct StateTensor {
  std::string name;
  MatrixView<Real> value;
};

/// Turns gradients into weight updates and does its own communication, since what is sent is the algorithm.
///
/// Collective: all processes of the mesh construct it with equal options and call `step` together. The list
/// of collectives follows from the parameter table alone, never from gradient values.
template <class Real>
class Optimizer {
 public:
  virtual ~Optimizer() = default;
  /// Consumes the gradients of `parameters` (mean over this process's own tokens) and updates the weights.
  virtual StepReport step(const StepInfo& info) = 0;
  /// All persistent state of this process, in a fixed order.
  virtual std::vector<StateTensor<Real>> state() = 0;
  /// Payload bytes that one step sends along the replica axis, summed over the processes of one replica.
  virtual Index planned_factor_bytes() const = 0;
  virtual Index planned_dense_bytes() const = 0;
};

}  // namespace lowband
