#pragma once

#include "collectives/communicator.h"
#include "runtime/buffer.h"
#include "runtime/tensor.h"

#include <string>
#include <vector>

namespace lowband {

/// How many of `rows` rows of a factor process `process` owns, of the `processes` of the axis that sums it:
/// shares whose sizes differ by at most one, some empty.
Index owned_row_count(Index rows, Index processes, Index process);
/// The first of them; those of a process are consecutive.
Index first_owned_row(Index rows, Index processes, Index process);

/// One factor (P or R) of all matrices, between its two forms.
///
/// *piece*: the rows of the factor that belong to this process's piece of the matrix. Each process of the
/// axis that cuts the other dimension holds a partial sum of the same piece. *owned*: the share of those rows
/// that this process sums and owns. The owned rows of all matrices lie one after the other in one buffer,
/// which is what crosses the replica axis: no padding, r x rows elements in all over the processes of a
/// replica. The buffer falls into *parts*: in each the rows of its matrices, then a guest's elements.
///
/// Where the axis has one process, piece and owned rows are the same memory, and nothing is packed or sent.
template <class Real>
class FactorRows {
 public:
  struct Shape {
    std::string name;
    Index rows = 0;  // of the piece
    Index factor_rank = 0;
    Communicator* axis = nullptr;  // the processes that hold partial sums of the piece
    int part = 0;                  // of the buffer of owned rows, equal on all processes of the axis
    /// How many rows of the piece this process owns.
    Index owned_rows() const;
  };

  /// `guest_elements` of every part.
  /// Collective (reduce_scatter and all_gather too): all processes of every axis named in `shapes`; matrices
  /// in equal order with equal ranks, pieces of equal size along an axis.
  /// `device`: in whose memory all rows are to lie; null for the host's.
  explicit FactorRows(std::vector<Shape> shapes, const std::vector<Index>& guest_elements = {0},
                      Device* device = nullptr);

  MatrixView<Real> piece(Index i);
  MatrixView<Real> owned(Index i);
  std::span<Real> all_owned() { return owned_.span(); }
  /// Elements of each part of `all_owned`, guests included.
  std::span<const Index> part_elements() const { return part_elements_; }
  std::span<Real> part(int part);
  std::span<Real> guest(int part);
  /// Elements of `all_owned` by parameter, guests excluded.
  std::span<const PayloadShare> owned_shares() const { return owned_shares_; }

  /// owned <- sum over the axis of the pieces
  void reduce_scatter();
  /// piece <- owned rows of all processes of the axis
  void all_gather();

 private:
  /// The matrices that one axis sums. Packed form: for each process, the rows of each matrix that it owns.
  struct Group {
    Communicator* axis;
    std::vector<Index> members;
    std::vector<Index> counts;  // packed elements of each process
    Index own_offset = 0;       // of this process's rows in `packed`
    Buffer<Real> packed;
    std::vector<PayloadShare> shares;
  };
  struct Placement {
    bool split = false;      // false: the piece is the owned rows
    Index piece_offset = 0;  // in pieces_, when split
    Index owned_offset = 0;
    Index owned_rows = 0;
  };
  /// Calls visit(rows of a piece, the same rows in the packed buffer), in packed order.
  template <class Visit>
  void for_each_packed(Group& group, Visit visit);
  std::span<Real> own_packed(Group& group);

  std::vector<Shape> shapes_;
  std::vector<Placement> placements_;
  std::vector<Group> groups_;
  std::vector<PayloadShare> owned_shares_;
  std::vector<Index> part_elements_;
  std::vector<Index> guest_elements_;
  Buffer<Real> pieces_;
  Buffer<Real> owned_;
};

}  // namespace lowband
