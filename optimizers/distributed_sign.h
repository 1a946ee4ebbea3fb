#pragma once

#include "optimizers/cut_matrix.h"
#include "optimizers/matrix_sign.h"
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
/// matrix that is cut along one dimension only.
Assembly choose_assembly(const CutMatrix& matrix, Index steps);

/// Payload bytes that one sign of `matrix` costs on axis within_replica, as every process of it counts them.
Index sign_bytes(const CutMatrix& matrix, SignPolynomial polynomial, Index element_bytes);

/// The signs of a set of matrices, each computed once in a replica and exactly as if it were not cut.
///
/// Owners share the work: they are dealt by elements and flops (`choose_homes`). Replicas repeat each other's
/// work on equal bits, since to share it they would have to send the results, m n elements, over the slowest
/// axis.
///
/// Which rows or columns are where may change from one `compute` to the next; what is sent for a matrix does
/// not, since all its elements travel or none.
///
/// Collective: all processes of the mesh, equal arguments. Purpose: update, axis within_replica.
/// Ownership: borrows the mesh.
template <class Real>
class DistributedSign {
 public:
  /// `rotation` turns the owners, so that sets of one matrix do not all choose the first process.
  DistributedSign(ProcessMesh& mesh, std::vector<CutMatrix> matrices, SignPolynomial polynomial,
                  Index rotation = 0);

  Index size() const { return static_cast<Index>(matrices_.size()); }
  const CutMatrix& matrix(Index i) const { return matrices_[static_cast<std::size_t>(i)]; }
  Assembly assembly(Index i) const { return assemblies_[static_cast<std::size_t>(i)]; }
  /// This process's block of matrix i, contiguous: before `compute` of U, after it of sign U.
  MatrixView<Real> block(Index i) { return blocks_[static_cast<std::size_t>(i)]; }
  MatrixView<const Real> block(Index i) const { return blocks_[static_cast<std::size_t>(i)]; }

  /// The pieces of matrix i, of the same extents, until they are set again; all blocks are void afterwards.
  /// Takes effect with the next `arrange`.
  void set_row_pieces(Index i, std::vector<Range> pieces);
  void set_col_pieces(Index i, std::vector<Range> pieces);
  /// Blocks as the pieces say. Sends nothing.
  void arrange();

  /// Row and column of the first element of the block.
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
  void reserve_workspace();
  void compute_owned();
  void compute_by_gram();

  ProcessMesh* mesh_;
  Communicator* group_;  // the replica
  SignPolynomial polynomial_;
  std::vector<CutMatrix> matrices_;
  std::vector<Assembly> assemblies_;
  std::vector<int> owners_;  // by matrix, of those that have one
  std::optional<MatrixSign<Real>> sign_;
  Index sign_side_ = 0, sign_elements_ = 0;  // that sign_ has room for
  Buffer<Real> own_;                         // blocks: by owner those that have one, then the others
  std::vector<MatrixView<Real>> blocks_;     // by matrix
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
