#pragma once

#include "collectives/byte_budget.h"
#include "collectives/factors/factor_rows.h"
#include "optimizers/compressed_matrices.h"
#include "optimizers/factored_matrices.h"
#include "optimizers/options.h"
#include "sharding/process_mesh.h"

#include <vector>

namespace lowband {

/// The steps in which GaLore takes a new basis for a matrix: step 0, and one of every `interval`, which one
/// following from the name, so that matrices do not all take theirs at once.
StepPhase basis_steps(const ParameterInfo& matrix, Index interval);

/// The process of the mesh that computes the basis of a matrix.
int basis_owner(const ParameterInfo& matrix, const MeshShape& mesh);

/// GaLore: Adam on the gradient in a subspace, which is all that replicas exchange of it.
///
///     every so many steps:  B <- singular vectors of mean G for its r largest singular values, of the
///     shorter
///                           side: right ones where m >= n, left ones otherwise
///     H  <- mean G B, or mean G^T B                       (max(m, n), r)
///     m1 <- b1 m1 + (1 - b1) c H ; m2 <- b2 m2 + (1 - b2) (c H)^2
///     N  <- sqrt(1 - b2^t) / (1 - b1^t) m1 / (sqrt m2 + eps)
///     W  <- (1 - eta wd) (W - alpha eta N B^T), or B N^T
///
/// with b1 = 0.9, b2 = 0.999, eps = 1e-6, t the number of updates, and c the update scale, which clips |H|.
/// What lies outside of the basis is lost: nothing is fed back. Moments are not rotated when the basis
/// changes. The signs of singular vectors, which are arbitrary, are those that make the entry of largest
/// magnitude positive.
///
/// Exchange between replicas: H is linear in G, so that mean H is the mean of each replica's own. In
/// `basis_steps` G itself travels, H follows from its mean, and B from one owner to all processes. While the
/// mean gradient of such a step is zero, or left alone, the basis stays; it begins as unit vectors.
///
/// State: "<name>.basis" (min(m, n), r), "<name>.m1" and "<name>.m2" (max(m, n), r), of which every process
/// has a share of the rows of its block, each once over the processes of a replica; "<name>.t". The rows of
/// the basis that a block multiplies are gathered in every step. Reference: Zhao et al., "GaLore", arXiv
/// 2403.03507, algorithm 2; conventions of algorithms.md 2.11.
template <class Real>
class Galore final : public CompressedMatrices<Real> {
 public:
  using typename MatrixOptimizer<Real>::Piece;
  using typename MatrixOptimizer<Real>::LaterOutcome;
  using typename MatrixOptimizer<Real>::Outcome;

  /// `exchange` runs on `exchange_mesh`, `update` on `update_mesh`. Collective: all processes of both, equal
  /// arguments. Throws: InvalidArgument for FactorWire::kBF16 with Real = double.
  Galore(ProcessMesh& exchange_mesh, ProcessMesh& update_mesh, const std::vector<LayerMatrix>& matrices,
         const OptimizerOptions& options);

  void exchange(std::span<const Piece> pieces, const Scalar& gradient_scale, Index step) override;
  /// |H|^2
  void add_sum_of_squares(MatrixView<double> sum) const override;
  LaterOutcome update(std::span<const Piece> pieces, const Scalar& update_scale, const StepInfo& info,
                      Diagnosis<Real>* diagnosis) override;
  Index size() const override { return static_cast<Index>(matrices_.size()); }
  std::vector<StateTensor<Real>> state(Index i) override;

 private:
  struct Matrix {
    LayerMatrix definition;
    bool tall = true;
    StepPhase basis_steps;
    int owner = 0;        // of the world
    Range rows, cols;     // of the block
    Range kept;           // rows of the basis
    Buffer<Real> m1, m2;  // of the owned rows of H
    Buffer<Real> t = Buffer<Real>(1);
    Range basis_rows() const { return tall ? cols : rows; }  // that the block multiplies
    Op op() const { return tall ? Op::kNone : Op::kTranspose; }
  };
  static std::vector<Matrix> make_matrices(const ProcessMesh& mesh,
                                           const std::vector<LayerMatrix>& definitions, Index interval);
  static std::vector<typename FactorRows<Real>::Shape> shapes_of_h(ProcessMesh& mesh,
                                                                   const std::vector<Matrix>& matrices);
  static std::vector<typename FactorRows<Real>::Shape> shapes_of_basis(ProcessMesh& mesh,
                                                                       const std::vector<Matrix>& matrices);

  /// H from the mean gradient, with a new basis.
  void project_mean(Index i, const Piece& piece, const Scalar& gradient_scale);
  /// basis <- singular vectors of the mean whose blocks all processes hold, unless that is zero.
  void take_basis(Index i, MatrixView<const Real> block);
  /// Owned rows of H of the matrices that are not in `from_means` <- means over replicas.
  void average(const std::vector<bool>& from_means);

  ProcessMesh* mesh_;
  OptimizerOptions options_;
  std::vector<Matrix> matrices_;
  FactorRows<Real> basis_;  // owned: between steps; on the exchange mesh
  FactorRows<Real> h_;      // likewise
  FactorRows<Real> n_;      // on the update mesh
  Buffer<Real> sums_;       // owned rows of H, packed
  Buffer<BFloat16> wire_;
  Buffer<Real> block_;           // of a mean gradient
  std::vector<double> squares_;  // by matrix, of H
};

}  // namespace lowband
