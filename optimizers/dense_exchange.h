#pragma once

#include "runtime/buffer.h"
#include "sharding/parameter.h"
#include "sharding/process_mesh.h"

#include <span>
#include <vector>

namespace lowband {

/// Everything of a step that travels uncompressed: gradients to the processes that own their pieces, dense
/// gradients between replicas, updated weights back to every shard.
///
/// The shard axis cuts a *matrix* (what a matrix optimizer treats) as MatrixLayout says, and every other
/// parameter, *dense* from here on, into ranges of consecutive elements. All parameters travel in one buffer,
/// cut without padding. An axis of one process costs no copy. A dense parameter that the tensor axis does not
/// cut is held, updated and sent by every process of that axis.
///
/// Ownership: borrows the mesh, weights and gradients.
template <class Real>
class DenseExchange {
 public:
  /// Collective, as all operations: all processes of the mesh, equal arguments.
  /// Throws: InvalidArgument when a weight or gradient is not the contiguous tensor piece of its parameter.
  DenseExchange(ProcessMesh& mesh, std::span<Parameter<Real>> parameters, std::vector<bool> is_matrix);

  /// gradient(i) <- sum over shards.  Purpose: gradient.
  void reduce_over_shards();
  /// gradient(i) <- sum over replicas, of the dense parameters.  Purpose: dense.
  void reduce_over_replicas();
  /// Every shard's piece of every weight, to all.  Purpose: weight.
  void gather_weights();

  /// This process's piece: a block of a matrix, or one row of consecutive elements.
  MatrixView<Real> gradient(Index i) const { return gradients_[static_cast<std::size_t>(i)]; }
  MatrixView<Real> weight(Index i) const;

  /// Global row and column of the first element of a matrix piece.
  struct Origin {
    Index row = 0;
    Index col = 0;
  };
  Origin matrix_origin(Index i) const;

  /// Payload elements of reduce_over_replicas, summed over the processes of one replica.
  Index dense_elements() const { return dense_elements_; }

 private:
  MatrixLayout layout(Index i) const;
  MatrixView<Real> piece(Index i, MatrixView<Real> whole, int shard) const;
  void place_pieces();

  ProcessMesh* mesh_;
  std::span<Parameter<Real>> parameters_;
  std::vector<bool> is_matrix_;
  std::vector<Index> order_;                 // of travel: dense parameters first
  std::vector<MatrixView<Real>> gradients_;  // by parameter
  Buffer<Real> owned_;                // own pieces, in order; where nothing is cut only what replicas sum
  Buffer<Real> packed_;               // pieces of all shards, process after process
  std::vector<Index> counts_;         // elements of each shard in packed_
  std::vector<PayloadShare> shares_;  // of packed_
  std::vector<PayloadShare> dense_shares_;  // of the dense prefix of owned_
  Index owned_dense_elements_ = 0;
  Index dense_elements_ = 0;
};

}  // namespace lowband
