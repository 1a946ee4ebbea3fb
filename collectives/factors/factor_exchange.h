#pragma once

#include "collectives/factors/factor_rows.h"
#include "collectives/factors/orthonormalise.h"

#include <optional>

namespace lowband {

/// The groups in which the processes of a mesh exchange factors. Borrowed.
struct FactorGroups {
  Communicator* replica = nullptr;         // same piece of every matrix, other data
  Communicator* within_replica = nullptr;  // all pieces of one replica
};

/// One matrix B (a x b, a >= b) as this process takes part in its exchange. It holds a block of B, which one
/// axis cuts along a and another along b.
struct FactorShape {
  std::string name;
  Index factor_rank = 0;
  Index left_rows = 0;               // rows of the block, of P
  Index right_rows = 0;              // columns of the block, rows of R
  Communicator* across_b = nullptr;  // cuts b: B Q is summed over it
  Communicator* across_a = nullptr;  // cuts a: B^T P is summed over it
};

/// The collective of low-rank synchronisation: turns products of every process's own matrices into the
/// factors P = orth(mean B Q) and R = mean B^T P on which all processes agree, for all matrices at once.
///
/// Per matrix and step the replica axis carries exactly r (a + b) elements, summed over the processes of one
/// replica: each process reduces only the rows it owns.
///
/// Collective: all processes of the mesh construct it, and call the two exchanges in turn; equal shapes apart
/// from the row counts of the pieces.
/// Ownership: borrows the groups; owns all factor buffers. Nothing is allocated by an exchange, save for the
/// Householder fallback.
template <class Real>
class FactorExchange {
 public:
  /// `keep_own_right`: this replica's own R is needed after the exchange.
  FactorExchange(const FactorGroups& groups, std::vector<FactorShape> shapes, bool keep_own_right);

  /// (left_rows, r). Before exchange_left: B Q of this process's block. After it: these rows of P.
  MatrixView<Real> left(Index i) { return left_.piece(i); }
  /// (right_rows, r). Before exchange_right: B^T P of this process's block. After it: these rows of the mean
  /// R.
  MatrixView<Real> right(Index i) { return right_.piece(i); }
  /// R of this replica alone, valid after exchange_right; needs `keep_own_right`.
  MatrixView<const Real> own_right(Index i) { return own_right_ ? own_right_->piece(i) : right_.piece(i); }

  /// left <- orth(mean over replicas of the sum over blocks). Dead columns are zero.
  void exchange_left();
  /// right <- mean over replicas of the sum over blocks
  void exchange_right();

  /// Of the last exchange_left; equal on all processes.
  Factorisation factorisation(Index i) const { return orthonormaliser_.factorisation(i); }
  std::span<const std::uint8_t> dead(Index i) const { return orthonormaliser_.dead(i); }
  /// Norms of the columns of the mean R, of the last exchange_right; equal on all processes.
  std::span<const double> right_norms(Index i) const;

 private:
  void average_over_replicas(FactorRows<Real>& factor);
  void sum_column_norms();

  FactorGroups groups_;
  FactorRows<Real> left_;
  FactorRows<Real> right_;
  std::optional<FactorRows<Real>> own_right_;  // absent where it would equal right_: one replica, or not kept
  Orthonormaliser<Real> orthonormaliser_;
  std::vector<Index> norm_offsets_;
  Buffer<double> norms_;
};

}  // namespace lowband
