#pragma once

#include "optimizers/matrix_sign.h"
#include "sharding/parameter.h"
#include "sharding/process_mesh.h"

#include <optional>
#include <span>
#include <string_view>
#include <vector>

namespace lowband {

/// How a matrix that lies in blocks on the processes of a replica is brought to its sign.
enum class Assembly : std::uint8_t {
  kLocal,  // one process holds all of it
  kOwner,  // blocks go to one process, which computes, and come back: twice m n elements
  kGram,   // blocks stay where they are, and their Gram matrices are summed in every step of the iteration
};
std::string_view assembly_name(Assembly assembly);

/// Whichever sends fewer bytes, over all N = F T processes of a replica: 2 m n (N - 1) / N elements with
/// kOwner, 2 (N - 1) u^2 for each of `steps` Gram matrices, u the extent that is not cut. kGram needs a
/// matrix that is cut along one dimension only. A pure function of global shapes.
Assembly choose_assembly(const ParameterInfo& matrix, const MeshShape& mesh, Index steps);

/// Payload bytes that one sign of `matrix` costs on axis within_replica, as every process of it counts them.
Index sign_bytes(const ParameterInfo& matrix, const MeshShape& mesh, SignPolynomial polynomial,
                 Index element_bytes);

/// The signs of a set of matrices, each computed once in a replica and exactly as if it were not cut.
///
/// Owners share the work: they are dealt by elements and flops (`choose_homes`). Replicas repeat each other's
/// work on equal bits, since to share it they would have to send the results, m n elements, over the slowest
/// axis.
///
/// Collective: all processes of the mesh, equal arguments. Purpose: update, axis within_replica.
/// Ownership: borrows the mesh.
template <class Real>
class DistributedSign {
 public:
  /// `rotation` turns the owners, so that sets of one matrix do not all choose the first process.
  /// Throws: InvalidArgument when the tensor axis does not cut a matrix although it has several processes.
  DistributedSign(ProcessMesh& mesh, std::vector<ParameterInfo> matrices, SignPolynomial polynomial,
                  Index rotation = 0);

  Index size() const { return static_cast<Index>(matrices_.size()); }
  const ParameterInfo& matrix(Index i) const { return matrices_[static_cast<std::size_t>(i)]; }
  Assembly assembly(Index i) const { return assemblies_[static_cast<std::size_t>(i)]; }
  /// This process's block of matrix i, contiguous: before `compute` of U, after it of sign U.
  MatrixView<Real> block(Index i) { return blocks_[static_cast<std::size_t>(i)]; }

  /// Global row and column of the first element of the block.
  Index first_row(Index i) const { return place(i, group_->process()).rows.begin; }
  Index first_col(Index i) const { return place(i, group_->process()).cols.begin; }

  void compute();
  /// Each block <- its own sign; sends nothing.
  void compute_blocks();

 private:
  /// A matrix that this process computes.
  struct Owned {
    Index matrix = 0;
    std::vector<MatrixView<Real>> parts;  // in parts_, by process that holds the block
  };
  /// Rows and columns of matrix i that a process of the replica holds.
  struct Place {
    Range rows, cols;
    Index elements() const { return rows.size() * cols.size(); }
  };

  int processes() const { return group_->size(); }
  Place place(Index i, int process) const;
  std::vector<Index> of(Assembly assembly) const;
  void choose_owners(Index rotation);
  void place_blocks();
  void place_parts();
  void compute_owned();
  void compute_by_gram();

  ProcessMesh* mesh_;
  Communicator* group_;  // the replica
  std::vector<ParameterInfo> matrices_;
  std::vector<MatrixLayout> layouts_;
  std::vector<Assembly> assemblies_;
  std::vector<int> owners_;  // by matrix, of those that have one
  std::optional<MatrixSign<Real>> sign_;
  Buffer<Real> own_;                      // blocks: by owner those that have one, then the others
  std::vector<MatrixView<Real>> blocks_;  // by matrix
  // To owners and back.
  Index sent_elements_ = 0;  // of own_
  std::vector<Index> counts_, counts_back_;
  std::vector<PayloadShare> shares_;
  Buffer<Real> parts_;  // of owned_, by process and then by matrix
  std::vector<Owned> owned_;
  Buffer<Real> whole_;  // one of owned_
  // By Gram matrices.
  std::vector<Index> by_gram_;
  std::vector<PayloadShare> norm_shares_, gram_shares_;
  Buffer<double> norms_;
  Buffer<Real> grams_;
};

}  // namespace lowband
