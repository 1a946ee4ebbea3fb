#pragma once

#include "optimizers/planned_traffic.h"
#include "runtime/buffer.h"
#include "sharding/parameter.h"
#include "sharding/process_mesh.h"

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lowband {

/// What the trainer decides for one step.
struct StepInfo {
  Index step = 0;                   // 0-based
  double learning_rate = 0;         // of matrices, after the schedule
  double scalar_learning_rate = 0;  // of everything else, after the schedule
  bool diagnose = false;            // fill StepReport::diagnostics; equal on all processes
};

/// How well one matrix's low-rank exchange did in one step; B_i is what replica i had to send, E_i what it
/// kept, bars are means over the D replicas, norms are Frobenius norms over the whole matrix, formed in
/// double.
struct MatrixDiagnostics {
  std::string name;
  Index factor_rank = 0;
  double drift = 0;            // sqrt(mean_i |E_i - Ebar|^2) / |Bbar|: how far replicas have moved apart
  double mass_leak = 0;        // |Ebar + sent - Bbar| / |Bbar|: what was neither sent nor kept
  double captured_energy = 0;  // |R|^2 / |Bbar|^2, R the exchanged right factor
  Index dead_columns = 0;      // of P
};

/// What one step did; equal on all processes except the times.
struct StepReport {
  double gradient_norm =
      0;  // of the mean gradient, before clipping (PowerSGD and ACP-SGD: of what they decompressed)
  double clip_scale = 1;            // factor applied to all gradients, <= 1
  Index skipped_matrices = 0;       // left alone for a non-finite gradient
  Index skipped_other = 0;          // likewise, parameters that are not matrices
  Index dead_columns = 0;           // of all P, refilled for the next step
  Index householder_fallbacks = 0;  // orthonormalisations that needed it
  double seconds = 0;
  double communication_seconds = 0;            // in collectives of the optimizer, on whichever thread
  double exposed_seconds = 0;                  // the part of it during which the caller of `step` waited
  std::vector<MatrixDiagnostics> diagnostics;  // by matrix, when asked for
};

/// The report of a step that a device may not have done yet.
///
/// Whoever wants the report, waits: a step of which nobody does costs no wait. Ownership: of a device,
/// borrows it and the optimizer's groups until it is read.
class PendingReport {
 public:
  explicit PendingReport(StepReport known) : report_(std::move(known)) {}
  /// `complete` fills in what `known` lacks, and waits unless `over` says that it need not.
  PendingReport(StepReport known, std::function<bool()> over, std::function<void(StepReport&)> complete)
      : report_(std::move(known)), over_(std::move(over)), complete_(std::move(complete)) {}

  /// Whether `get` returns, or throws, without waiting.
  bool over() const { return !complete_ || over_(); }

  /// Waits for the device, the first time. Throws: Error, on all processes, when a state is not finite
  /// although its gradients are; the matrix was left alone, and its weight will not change before that is
  /// cured. What broke a group, when an exchange failed after `step` had returned: weights and state are
  /// those of no step then, and a run goes on from its last checkpoint.
  const StepReport& get() {
    if (auto complete = std::exchange(complete_, nullptr)) complete(report_);
    return report_;
  }
  // NOLINTNEXTLINE(google-explicit-constructor): whoever asks for a report gets it
  operator StepReport() { return get(); }

 private:
  StepReport report_;
  std::function<bool()> over_;
  std::function<void(StepReport&)> complete_;
};

/// Named pieces of state of this process, for checkpoints. Names are "<parameter>.<letter>" in the paper's
/// letters, with "[i]" behind it of block i. Values are views: saving reads them, loading writes them in
/// place; shapes and dtype must match exactly.
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
  /// The gradient of parameter `parameter` (its position) is complete for this step: its exchange may start.
  ///
  /// Never required: `step` takes care of parameters that were not announced. A gradient that was announced
  /// must not be touched before `step` returns, which may leave anything in it. Collective in the sense that
  /// all processes announce the same parameters, in any order; exchanges start in an order that is fixed
  /// beforehand.
  virtual void gradient_ready(Index parameter) = 0;
  /// Consumes the gradients of `parameters` (mean over this process's own tokens) and updates the weights.
  ///
  /// Without a device the step is over on return, and throws what its report would. On one it is enqueued.
  /// Throws: what the exchange threw, on whichever thread it ran.
  virtual PendingReport step(const StepInfo& info) = 0;
  /// All persistent state of this process, in a fixed order.
  virtual std::vector<StateTensor<Real>> state() = 0;
  /// What each step sends.
  virtual const PlannedTraffic& planned() const = 0;
  /// Payload bytes that a diagnosed step sends in addition along the replica axis, over the processes of one
  /// replica.
  virtual Index planned_periodic_bytes() const = 0;
};

}  // namespace lowband
