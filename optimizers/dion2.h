#pragma once

#include "optimizers/distributed_sign.h"
#include "optimizers/layer_matrix.h"
#include "optimizers/matrix_optimizer.h"
#include "optimizers/options.h"
#include "optimizers/row_scaling.h"

#include <optional>

namespace lowband {

/// Dion2: the sign of the largest slices of the momentum, which alone forget. Slices are rows where m <= n,
/// otherwise columns; K holds k = ceil(f x slices) of them:
///
///     M    <- M + G
///     K    <- the slices of largest L1 norm, ties to the lower index; or k drawn at random
///     U    <- M_K
///     M_K  <- mu M_K
///     U    <- sign(U)
///     W    <- (1 - eta wd) W              everywhere
///     W_K  <- W_K - eta c(m, n) U         c of the whole shape
///
/// NorDion2 (also Dion3) takes rows whatever the shape, and brings rows of U to equal size (RowScaling)
/// before they move the weights.
///
/// G is the mean gradient, dense over replicas. Norms are those of whole slices, so that the selection is one
/// for all processes; draws are keyed by (seed, parameter, step), and send nothing. What is signed lies in
/// uneven pieces on the processes, but is k slices together: what a step sends does not depend on the data.
///
/// State: "<name>.M"; NorDion2 also "<name>.row_v", of a share of the rows of the block, as NorMuon.
/// Reference: "Dion2", arXiv 2512.16928, and the public Dion code; conventions of algorithms.md 2.8.
template <class Real>
class Dion2 final : public MatrixOptimizer<Real> {
 public:
  using typename MatrixOptimizer<Real>::Piece;
  using typename MatrixOptimizer<Real>::LaterOutcome;
  using typename MatrixOptimizer<Real>::Outcome;

  /// `rotation`: of the processes that compute signs.
  Dion2(ProcessMesh& mesh, std::vector<LayerMatrix> matrices, const OptimizerOptions& options,
        Index rotation);

  LaterOutcome update(std::span<const Piece> pieces, const Scalar& scale, const StepInfo& info,
                      Diagnosis<Real>* diagnosis) override;
  Index size() const override { return static_cast<Index>(matrices_.size()); }
  std::vector<StateTensor<Real>> state(Index i) override;

 private:
  struct Matrix {
    LayerMatrix definition;
    bool of_rows = true;       // slices
    Range own;                 // slices of this process
    Index norms_begin = 0;     // in norms_
    Buffer<Real> momentum, v;  // of the owned block, and of those of its rows that are kept here
    Index first_kept = 0;      // of the block's rows
    MatrixView<Real> m;
    std::vector<Index> selected;    // all k, increasing
    std::vector<Index> own_places;  // of those that this process owns: slices of its block
    Index slices() const { return of_rows ? definition.info.rows : definition.info.cols; }
  };

  void sum_norms();
  void select(Index step);
  void take(const Matrix& matrix, MatrixView<Real> u);
  void scale_rows(std::span<const Piece> pieces);
  void move_weight(const Matrix& matrix, MatrixView<const Real> u, MatrixView<Real> weight, double eta) const;

  OptimizerOptions options_;
  Communicator* group_;
  std::vector<Matrix> matrices_;
  DistributedSign<Real> sign_;  // of what is selected
  std::optional<RowScaling<Real>> row_scaling_;
  Buffer<double> norms_;  // of all slices of all matrices
  std::vector<PayloadShare> norm_shares_;
};

/// Whether slices are rows, otherwise columns.
bool slices_are_rows(const ParameterInfo& matrix, const OptimizerOptions& options);
/// k, in integers.
Index selected_slices(Index slices, const OptimizerOptions& options);
/// Those slices as a matrix in blocks, in places that some selection has: what is signed of `matrix`.
CutMatrix selected_part(const LayerMatrix& matrix, const OptimizerOptions& options);
/// Payload bytes of the norms of the slices of `matrix` on axis within_replica, as each of its processes
/// counts them.
Index slice_norm_bytes(const ParameterInfo& matrix, const MeshShape& mesh, const OptimizerOptions& options);

}  // namespace lowband
