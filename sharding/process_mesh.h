#pragma once

#include "collectives/communicator.h"

#include <memory>

namespace lowband {

/// Sizes of the axes. process = tensor + T * (shard + F * replica), tensor fastest.
struct MeshShape {
  int replica = 1;
  int shard = 1;
  int tensor = 1;
  int processes() const { return replica * shard * tensor; }
  friend bool operator==(const MeshShape&, const MeshShape&) = default;
};

/// Throws: InvalidArgument "mesh.tensor: found 0, expected at least 1", or when the product does not fit an
/// int.
void validate(const MeshShape& shape);
/// As above, and InvalidArgument "mesh: found replica 2 x shard 1 x tensor 2 = 4, expected the 3 processes of
/// this job" when the product differs.
void validate(const MeshShape& shape, int processes);

struct MeshPosition {
  int replica = 0;
  int shard = 0;
  int tensor = 0;
};
MeshPosition mesh_position(const MeshShape& shape, int process);

/// The processes of a job arranged along named axes, with one communicator for each.
///
/// Ownership: borrows the world communicator.
class ProcessMesh {
 public:
  /// Collective: all processes of `world`, equal `shape`.
  /// Throws: InvalidArgument as `validate`, on every process and before anything is sent.
  ProcessMesh(Communicator& world, const MeshShape& shape);

  const MeshShape& shape() const { return shape_; }
  const MeshPosition& position() const { return position_; }
  Communicator& world() const { return *world_; }
  Communicator& replica() const { return *replica_; }                // same shard and tensor
  Communicator& shard() const { return *shard_; }                    // same replica and tensor
  Communicator& tensor() const { return *tensor_; }                  // same replica and shard
  Communicator& within_replica() const { return *within_replica_; }  // shard x tensor, all of one replica
  /// Data-parallel position: processes with equal value read the same tokens.
  int data_index() const { return position_.shard + shape_.shard * position_.replica; }
  int data_size() const { return shape_.replica * shape_.shard; }
  /// Throws what broke one of the groups, where something did. Does not wait.
  void throw_if_broken() const {
    for (Communicator* const group :
         {world_, replica_.get(), shard_.get(), tensor_.get(), within_replica_.get()})
      group->throw_if_broken();
  }

 private:
  MeshShape shape_;
  MeshPosition position_;
  Communicator* world_;
  std::unique_ptr<Communicator> replica_, shard_, tensor_, within_replica_;
};

}  // namespace lowband
