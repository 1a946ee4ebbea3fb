#pragma once

#include "optimizers/state_place.h"
#include "sharding/process_mesh.h"
#include "trainer/checkpoint_file.h"

#include <functional>
#include <memory>
#include <span>
#include <vector>

namespace lowband {

/// Where the tensors of a checkpoint lie, on any mesh.
struct TensorPlaces {
  /// The piece of a tensor, here with `tensor.cols` columns, that the process at `position` holds.
  std::function<PiecePlace(const NamedTensor& tensor, const MeshShape& mesh, const MeshPosition& position)>
      place;
  /// Whether each replica has its own. All others hold what replica 0 holds.
  std::function<bool(const NamedTensor& tensor)> differs_between_replicas;
  /// For an optimizer whose result depends on how shard and tensor axis cut a matrix.
  bool only_replicas_may_differ = false;

  bool accept(const MeshShape& from, const MeshShape& to) const {
    return !only_replicas_may_differ || (from.shard == to.shard && from.tensor == to.tensor);
  }
};

/// The tensor files of all processes of one mesh, for a process of another.
///
/// What differs between replicas (M of Dion, e of PowerSGD) stays a replica's own where there are as many as
/// before. Otherwise every replica gets the mean over the old ones: updates come from the mean over replicas
/// of what they hold, and keep coming from the same.
class ReshardedFiles {
 public:
  /// `files`: one for each process of `mesh`, in their order.
  ReshardedFiles(const MeshShape& mesh, std::vector<std::unique_ptr<TensorFile>> files, TensorPlaces places);

  /// Verifies that the files hold all that `tensors` of the process at `position` of `to` are made of, under
  /// the same names and in the same order, and that none of it is damaged. Throws: as TensorFile::check.
  void check(std::span<const NamedTensor> tensors, const MeshShape& to, const MeshPosition& position) const;

  /// Fills `tensors`. Requires check with the same arguments.
  void copy_to(std::span<const NamedTensor> tensors, const MeshShape& to, const MeshPosition& position) const;

 private:
  /// Replicas of which `tensor` is the mean.
  std::vector<int> sources(const NamedTensor& tensor, const MeshShape& to,
                           const MeshPosition& position) const;
  /// Calls visit(place, elements) for every piece of tensor number `i` in the files of one replica.
  template <class Visit>
  void for_each_piece(Index i, const NamedTensor& tensor, int replica, Visit visit) const;
  template <class Real>
  void fill(Index i, const NamedTensor& tensor, const MeshShape& to, const MeshPosition& position) const;

  MeshShape mesh_;
  std::vector<std::unique_ptr<TensorFile>> files_;
  TensorPlaces places_;
};

}  // namespace lowband
