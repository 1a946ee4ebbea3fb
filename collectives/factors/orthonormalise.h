#pragma once

#include "collectives/communicator.h"
#include "runtime/buffer.h"
#include "runtime/device.h"
#include "runtime/factorisation.h"
#include "runtime/tensor.h"

#include <array>
#include <vector>

namespace lowband {

/// Whether Cholesky QR was not accurate.
inline bool fell_back(Factorisation factorisation) {
  return factorisation == Factorisation::kHouseholder || factorisation == Factorisation::kGramSchmidt;
}

/// A column is dead when what remains of it after the columns before it is a smaller fraction than this: for
/// float input that remainder is rounding noise, which would be blown up to a unit vector.
/// Reference: algorithms.md 3; 1e-5 lies between the rounding of a product of float factors (about 1e-6) and
/// the columns that still carry information.
inline constexpr double kDeadColumnTolerance = 1e-5;

/// Largest amplification with which a follower counts as accurate: four bits at most are lost of those that a
/// product with the orthonormal factor itself would have.
inline constexpr double kLargestAmplification = 16;

/// Orthonormalises matrices whose rows are spread over the processes of a group, all of them together: each
/// becomes the factor P of its unpivoted QR with positive diagonal, dead columns zero.
///
/// The result depends on the rows and on nothing else but rounding: not on their order, the scale of the
/// matrix or the number of processes. Every decision comes from reduced quantities, so that all processes
/// take it together.
/// Traffic: one maximum for each matrix, then r(r+1)/2 doubles for each matrix and pass in one buffer; a
/// group of one exchanges nothing.
///
/// With P_in = P U, a *follower* F of a matrix becomes F U^-1: where F = B^T P_in it is then B^T P, without
/// another pass over B. Rounding of column i of F, relative to the norm d_i of column i of P_in, reaches
/// column j multiplied by d_i |U^-1|_ij; the largest sum over i is the *amplification*, which does not depend
/// on the scales of the columns, 1 for orthogonal ones and of the order of their condition number otherwise.
/// On a device that holds whole matrices all of it is done there, without followers and without a wait.
/// Ownership: borrows the group, the blocks and the followers.
/// Reference: CholeskyQR2 (Yamamoto et al. 2015) with a double-precision Gram matrix and a pivot test.
template <class Real>
class Orthonormaliser {
 public:
  /// Shapes: blocks[i] are this process's rows of matrix i, contiguous, possibly none; over all processes it
  /// has at least as many rows as columns.
  /// Collective: all processes of `group`; equal column counts in equal order.
  /// Throws: InvalidArgument, on all processes, when a matrix is wider than tall, or has a follower in a
  /// group of several.
  /// followers[i] (any rows, columns of matrix i), contiguous; none with no data.
  Orthonormaliser(Communicator& group, std::vector<MatrixView<Real>> blocks,
                  std::vector<MatrixView<Real>> followers = {});

  /// A new set of inputs is in the blocks, or comes there before it is its turn.
  void begin() { next_ = 0; }
  /// Replaces all blocks up to `count` that are not done since `begin`. Collective.
  void run(Index count);
  /// Replaces one more block of the first `count`, in a group of one; false when there is none.
  bool run_next(Index count);
  void run() { begin(), run(static_cast<Index>(blocks_.size())); }

  /// Of the last run; equal on all processes. They wait for a device that did all of it.
  Factorisation factorisation(Index i) const { return told(i).factorisation; }
  std::span<const std::uint8_t> dead(Index i) const { return told(i).dead; }
  /// The same as numbers, Factorisation first, to where `to` lies, which is where the blocks lie or the host.
  /// Waits for a device only from one place to the other.
  void copy_outcome(Index i, MatrixView<Real> to) const;
  /// Whether the follower of matrix i is F U^-1 to an amplification of at most kLargestAmplification.
  /// Otherwise, as after a Householder factorisation, it may hold anything.
  bool followed(Index i) const { return at(i).followed; }

 private:
  struct Block {
    MatrixView<Real> p;
    MatrixView<Real> follower;  // without data: none
    bool followed = false;
    std::array<Real, 2> unit_scale = {};  // whose product brings max |P| near 1
    std::vector<Index> elements_of;       // of each process
    Index triangle_offset = 0;            // of its Gram matrix in triangles_
    Index outcome_offset = 0;             // in outcomes_there_
    Buffer<Real> scaled;                  // the input after scaling, for the fallback
    std::vector<std::uint8_t> dead;
    Factorisation factorisation = Factorisation::kCholesky;
    bool accurate = true;
    bool factorisable() const {
      return factorisation != Factorisation::kZero && factorisation != Factorisation::kNonFinite;
    }
  };
  const Block& at(Index i) const { return blocks_[static_cast<std::size_t>(i)]; }
  const Block& told(Index i) const;
  MatrixView<const Real> outcome_there(const Block& block) const {
    return outcomes_there_.matrix(block.outcome_offset, 1, 1 + block.p.cols);
  }

  void run_on_device(Index count);
  void find_largest(std::span<const Block> blocks, std::span<double> largest);
  void run_together(std::span<Block> blocks);
  void scale_to_unit(std::span<Block> blocks);
  void sum_grams(std::span<Block> blocks);
  void cholesky_pass(Block& block, bool second);
  void householder(Block& block);

  Communicator* group_;
  Device* device_ = nullptr;           // where all blocks lie
  mutable std::vector<Block> blocks_;  // outcomes_there_ are told when they are asked for
  Buffer<Real> outcomes_there_;        // on a device that holds whole matrices
  mutable bool told_ = true;           // outcomes_there_ to blocks_
  Index next_ = 0;                     // the first block that is not done
  Buffer<double> largest_;             // max |P| of each matrix, infinity when it is not finite
  Buffer<double> triangles_;           // upper triangles of all Gram matrices, one after the other
  Buffer<double> square_;              // one Gram matrix
};

}  // namespace lowband
