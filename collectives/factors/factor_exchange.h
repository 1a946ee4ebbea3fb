#pragma once

#include "collectives/factors/factor_rows.h"
#include "collectives/factors/orthonormalise.h"
#include "runtime/numbers.h"

#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

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
  /// Before exchange_left, right holds B^T (B Q), which becomes B^T P with it: see right_followed. Of
  /// matrices that one process holds and no other replica has.
  bool right_follows = false;
};

/// A tensor that travels uncompressed beside the left factors: a sum over replicas.
struct DenseTensor {
  std::string name;
  Index elements = 0;  // of this process's piece
};

/// Element type of the factors on the replica axis. Dense tensors always travel as they are computed.
enum class FactorWire : std::uint8_t {
  kAsComputed,  // Real
  kBF16,        // rounded to nearest even; sums over replicas are formed in float32
};

struct FactorExchangeOptions {
  bool keep_own_right = false;  // this replica's own R is needed after the exchange
  bool right_only = false;      // no left factors: there is no memory for them, nor an exchange_left
  FactorWire wire = FactorWire::kAsComputed;
};

/// Where the time of exchanges went, in seconds since construction or `reset_times`.
struct ExchangeTimes {
  double pack = 0;            // copies and casts into what is sent
  double reduce_scatter = 0;  // collectives over replicas, waiting included
  double orthonormalise = 0;  // what was not done while a collective waited
  double all_gather = 0;
  double unpack = 0;          // copies and casts out of what was received
  double within_replica = 0;  // sums and gathers over the axes that cut the matrices
};

/// The collective of low-rank synchronisation: turns products of every process's own matrices into the
/// factors P = orth(mean B Q) and R = mean B^T P on which all processes agree, for all matrices at once, and
/// sums dense tensors on the way.
///
/// One exchange over D replicas, each of which holds every matrix (its processes hold pieces):
///   1. the P of all matrices lie in one flat buffer, without padding; a reduce-scatter *by matrix* gives
///      each replica the sums of the matrices it is home to
///   2. the home replica orthonormalises them: once per matrix, so each replica does 1/D of the work
///   3. an all-gather brings P to all replicas, so that all hold the bits of the home, and with it how each
///      matrix was factorised and which of its columns are dead: 1 + r numbers for each matrix, as control
///   4. R, whose mean is all that is wanted, is reduced in even parts
/// Where P is large it goes in two waves: while the collectives of one wait, the other is orthonormalised.
/// Homes balance the bytes and the cost of orthonormalisation, and follow from the global shapes alone. Dense
/// tensors ride along with P, cut so that the parts become as equal as they can (with a rounded wire they are
/// summed apart). Bytes on the wire are those of two ring all-reduces of B(r).
///
/// Per matrix and step the replica axis carries exactly r (a + b) elements, summed over the processes of one
/// replica: each process reduces only the rows it owns.
///
/// With FactorWire::kBF16, own_right is what was really sent: R_i rounded, and on the process that rounded
/// the sum also the error of that rounding, so that the mean of all own_right is the R that everyone
/// received, and the local residual conserves mass to the rounding of Real.
///
/// Collective: all processes of the mesh construct it, and call the two exchanges in turn; equal shapes apart
/// from the row counts of the pieces.
/// Throws: InvalidArgument on all processes, for FactorWire::kBF16 with Real = double, for a rank above a,
/// for right_follows with several processes, and when the processes within a replica say that they are in
/// several. Ownership: borrows the groups; owns all factor buffers. Nothing is allocated by an exchange, save
/// for the Householder fallback.
template <class Real>
class FactorExchange {
 public:
  FactorExchange(const FactorGroups& groups, const std::vector<FactorShape>& shapes,
                 std::vector<DenseTensor> dense, const FactorExchangeOptions& options);

  /// (left_rows, r), unless `right_only`. Before exchange_left: B Q of this process's block. After it: these
  /// rows of P.
  MatrixView<Real> left(Index i) { return left_.piece(i); }
  /// (right_rows, r). Before exchange_right: B^T P of this process's block. After it: these rows of the mean
  /// R.
  MatrixView<Real> right(Index i) { return right_.piece(i); }
  /// The share of the rows of right(i) that this process keeps, (owned rows, r): what gather_right sends.
  MatrixView<Real> owned_right(Index i) { return right_.owned(i); }
  /// What this replica alone contributed to R, valid after exchange_right. Throws: InvalidArgument without
  /// `keep_own_right`.
  MatrixView<const Real> own_right(Index i);

  /// Copies this process's summand of dense tensor k into the buffer; before exchange_left. Contiguous.
  void put_dense(Index k, MatrixView<const Real> values);
  /// Copies the sum over replicas of dense tensor k out of the buffer; after exchange_left.
  void get_dense(Index k, MatrixView<Real> values) const;

  /// left <- orth(mean over replicas of the sum over blocks). Dead columns are zero. Dense tensors are
  /// summed.
  void exchange_left();
  /// right <- mean over replicas of the sum over blocks
  void exchange_right();

  /// right <- the rows that each process has put into owned_right, of all matrices; for what is to be
  /// multiplied before the exchange begins. Where across_a has one process nothing is sent: right is
  /// owned_right.
  void gather_right();

  /// Of the last exchange_left, where the factors lie: how matrix i was factorised, a Factorisation as a
  /// number, then for each column 1 where it is dead and 0 otherwise; equal on all processes.
  MatrixView<const Real> outcome(Index i) const {
    return outcome_values_.matrix(outcome_begin(i), 1, 1 + columns(i));
  }
  /// Of all matrices, on their way to the host, and where those of matrix i begin.
  Arriving<Real> outcomes() const { return Arriving<Real>(outcome_values_.line()); }
  Index outcome_begin(Index i) const { return outcome_begins_[static_cast<std::size_t>(i)]; }
  /// The same on the host: these wait for a device.
  Factorisation factorisation(Index i) const;
  std::span<const std::uint8_t> dead(Index i) const;
  /// Whether right(i) = B^T P since the last exchange_left, to the accuracy of a product with P (see
  /// Orthonormaliser); otherwise it is to be computed. Always false without `right_follows`.
  bool right_followed(Index i) const;
  /// Norms of the columns of the mean R, of the last exchange_right, where the factors lie; equal on all
  /// processes.
  MatrixView<const double> norms_of_right(Index i) const {
    return norms_.matrix(norm_offsets_[static_cast<std::size_t>(i)], 1, columns(i));
  }
  MatrixView<const double> norms_of_right() const { return norms_.line(); }  // of all matrices
  /// The same on the host: this waits for a device.
  std::span<const double> right_norms(Index i) const;

  /// The replica that orthonormalises matrix i; equal on all processes.
  int home(Index i) const { return homes_[static_cast<std::size_t>(i)]; }

  const ExchangeTimes& times() const { return times_; }
  void reset_times() { times_ = {}; }

 private:
  /// Matrices whose P travel together.
  struct Wave {
    Index begin = 0;  // of the elements of left_.all_owned
    Index elements = 0;
    std::vector<Index> counts;  // by replica
    std::vector<PayloadShare> shares;
    Index orthonormalised = 0;  // matrices of this home that must be so before this wave is gathered
  };

  /// `lefts`: the shapes whose left factors are exchanged, all or none.
  FactorExchange(const FactorGroups& groups, const std::vector<FactorShape>& shapes,
                 const std::vector<FactorShape>& lefts, std::vector<DenseTensor> dense,
                 const FactorExchangeOptions& options);

  static constexpr bool kCanRound = std::is_same_v<Real, float>;
  bool rounds() const { return options_.wire == FactorWire::kBF16; }

  void cut_waves();
  void sum_dense();
  /// The two halves for one wave; the first `orthonormalisable` matrices of this home are orthonormalised in
  /// passing.
  void reduce_wave(std::size_t w, Index orthonormalisable);
  void gather_wave(std::size_t w, Index orthonormalisable);
  void orthonormalise(Index count);
  void place_outcomes();
  void write_outcomes(std::size_t w);
  void read_outcomes();
  Index columns(Index i) const {
    return norm_offsets_[static_cast<std::size_t>(i) + 1] - norm_offsets_[static_cast<std::size_t>(i)];
  }
  std::span<const std::uint8_t> outcome_on_host(Index i) const;
  /// Calls visit(part of left_, its outcomes in outcome_values_, the same in left_).
  template <class Visit>
  void for_each_outcomes(Visit visit);
  /// The two halves of a reduction over replicas of the elements of `owned` from `begin` on, cut into
  /// `counts`: with a rounded wire, the same range of `wire_` then holds what this process sent, and what it
  /// received.
  void reduce(std::span<Real> owned, Index begin, std::span<const Index> counts,
              std::span<const PayloadShare> shares);
  void gather(std::span<Real> owned, Index begin, std::span<const Index> counts,
              std::span<const PayloadShare> shares);
  /// What this replica sent of R, copied piece by piece: while its sum is on the way, where that is possible.
  void keep_what_was_sent();
  bool keep_a_piece();
  void keep_rounding_error();
  void finish_right();
  /// Calls visit(elements of slice as one row, offset of the same elements in tensor k).
  template <class Visit>
  void for_each_slice(Index k, Visit visit) const;
  void check_dense_size(Index k, Index elements) const;
  /// A span of our buffers as one row.
  template <class T>
  MatrixView<T> line(std::span<T> elements) const {
    const Index n = std::ssize(elements);
    return {elements.data(), 1, n, n, groups_.replica->device()};
  }
  Timeline* timeline() const { return groups_.replica->timeline(); }

  FactorGroups groups_;
  FactorExchangeOptions options_;
  std::vector<int> homes_;
  std::vector<Wave> waves_;
  std::vector<int> wave_of_;  // by matrix
  std::vector<DenseTensor> dense_tensors_;
  std::vector<Index> dense_offsets_;
  FactorRows<Real> left_;  // by wave and home; slices of the dense tensors are guests of the first wave
  FactorRows<Real> right_;
  std::optional<FactorRows<Real>> own_right_;  // absent where it would equal right_: one replica, or not kept
  std::vector<Index> at_home_;                 // the matrices of this home
  Orthonormaliser<Real> orthonormaliser_;      // of at_home_
  std::vector<Index> outcomes_of_part_;        // elements, by part of left_
  Buffer<Real> outcome_values_;                // by part: what the end of each part carries
  std::vector<Index> outcome_begins_;          // by matrix, in these: its Factorisation, then `dead`
  mutable std::vector<std::uint8_t> outcomes_on_host_;  // the same as they were asked for; empty before that
  std::vector<PayloadShare> dense_shares_;
  Buffer<Real> dense_;                         // with a rounded wire: all dense tensors
  std::vector<std::span<Real>> dense_slices_;  // consecutive, all dense tensors together
  Index kept_ = 0;                             // elements of what was sent, in this exchange
  std::vector<Index> even_counts_;             // of the owned rows of R, by replica
  Buffer<BFloat16> wire_;                      // with a rounded wire: the owned rows of P or of R
  std::vector<Index> norm_offsets_;
  Buffer<double> norms_;
  mutable std::vector<double> norms_on_host_;  // as they were asked for; empty before that
  Buffer<Real> rounding_;  // with a rounded wire, to keep its own R: the error of this replica's part
  ExchangeTimes times_;
};

}  // namespace lowband
