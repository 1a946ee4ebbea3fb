#pragma once

#include "runtime/buffer.h"
#include "sharding/parameter.h"
#include "sharding/process_mesh.h"

#include <span>
#include <vector>

namespace lowband {

/// What crosses the shard axis for a set of parameters: gradients to the processes that own their pieces,
/// updated weights back to all shards.
///
/// The shard axis cuts a *matrix* (what a matrix optimizer treats) as MatrixLayout says, and every other
/// parameter, *dense* from here on, into ranges of consecutive elements. All travel in one buffer, cut
/// without padding. An axis of one process costs no copy. A dense parameter that the tensor axis does not cut
/// is held and updated by every process of that axis.
///
/// Ownership: borrows the mesh, weights and gradients.
template <class Real>
class ShardExchange {
 public:
  /// Collective, as all operations: all processes of the mesh, equal arguments.
  /// Throws: InvalidArgument when a weight or gradient is not the contiguous tensor piece of its parameter.
  ShardExchange(ProcessMesh& mesh, std::vector<Parameter<Real>> parameters, std::vector<bool> is_matrix);

  /// The memory of parameter i from now on, of the same shape. Not while its exchange runs.
  void rebind(Index i, Real* weight, Real* gradient);

  /// gradient(i) <- sum over shards.  Purpose: gradient.
  void reduce_gradients();
  /// Every shard's piece of every weight, to all.  Purpose: weight.
  void gather_weights();

  /// This process's piece, contiguous: a block of a matrix, or one row of consecutive elements. On an axis of
  /// one process it is the parameter's own gradient.
  MatrixView<Real> gradient(Index i) const { return gradients_[static_cast<std::size_t>(i)]; }
  MatrixView<Real> weight(Index i) const;

 private:
  MatrixLayout layout(Index i) const;
  MatrixView<Real> piece(Index i, MatrixView<Real> whole, int shard) const;
  void place_pieces();

  ProcessMesh* mesh_;
  std::vector<Parameter<Real>> parameters_;
  std::vector<bool> is_matrix_;
  std::vector<MatrixView<Real>> gradients_;  // by parameter
  Buffer<Real> owned_;                       // own pieces of gradients, in order
  Buffer<Real> packed_;                      // pieces of all shards, process after process
  std::vector<Index> counts_;                // elements of each shard in packed_
  std::vector<PayloadShare> shares_;         // of packed_
};

}  // namespace lowband
