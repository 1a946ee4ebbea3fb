#pragma once

#include "optimizers/cut_matrix.h"
#include "optimizers/matrix_optimizer.h"

#include <span>
#include <vector>

namespace lowband {

/// A process's piece of a parameter as the pieces of its matrices: what matrix optimizers are handed. A
/// parameter without blocks is one matrix, and its piece that of the matrix.
template <class Real>
class BlockViews {
 public:
  using Piece = typename MatrixOptimizer<Real>::Piece;

  BlockViews(const ParameterInfo& info, const CutMatrix& cut, const MeshPosition& position);

  /// Matrices of the parameter.
  Index size() const { return static_cast<Index>(runs_.size()); }

  /// pieces[j].gradient <- block j of `gradient`, contiguous. Where blocks do not lie one after the other,
  /// the elements of `gradient` change places until they do, through `scratch`.
  void show_gradient(MatrixView<Real> gradient, Buffer<Real>& scratch, std::span<Piece> pieces) const;
  /// pieces[j].weight <- block j of `weight`: a view of it, or a copy where the block does not lie in one
  /// piece.
  void show_weight(MatrixView<Real> weight, std::span<Piece> pieces);
  /// What has become of the copies, into `weight`.
  void put_weight(MatrixView<Real> weight, std::span<const Piece> pieces) const;

 private:
  MatrixView<Real> lines(MatrixView<Real> whole, Index begin, Index count) const {
    return of_rows_ ? whole.block(begin, count, 0, whole.cols) : whole.block(0, whole.rows, begin, count);
  }
  Index lines_of(std::size_t j) const;
  /// Calls visit(lines of `whole`, the same lines in `block`) for every run of block j.
  template <class Visit>
  void for_each_run(std::size_t j, MatrixView<Real> whole, MatrixView<Real> block, Visit visit) const;

  bool of_rows_;
  bool in_order_ = true;                  // blocks lie one after the other, each contiguous
  std::vector<std::vector<Range>> runs_;  // by block, lines of the piece
  Index rows_, cols_;                     // of the piece
  Buffer<Real> copies_;                   // of blocks of several runs, one after the other
};

}  // namespace lowband
