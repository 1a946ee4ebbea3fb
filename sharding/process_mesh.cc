#include "sharding/process_mesh.h"

#include <limits>

namespace lowband {

void validate(const MeshShape& shape) {
  const auto check_axis = [](const char* axis, int size) {
    LB_EXPECTS(size >= 1, "mesh.", axis, ": found ", size, ", expected at least 1");
  };
  check_axis("replica", shape.replica);
  check_axis("shard", shape.shard);
  check_axis("tensor", shape.tensor);
  // Two ints multiply inside 64 bits, so two steps see every overflow.
  constexpr Index kMost = std::numeric_limits<int>::max();
  const Index replica_shard = Index{shape.replica} * shape.shard;
  LB_EXPECTS(replica_shard <= kMost && replica_shard * shape.tensor <= kMost, "mesh: found replica ",
             shape.replica, " x shard ", shape.shard, " x tensor ", shape.tensor, ", expected at most ",
             kMost, " processes");
}

void validate(const MeshShape& shape, int processes) {
  validate(shape);
  LB_EXPECTS(shape.processes() == processes, "mesh: found replica ", shape.replica, " x shard ", shape.shard,
             " x tensor ", shape.tensor, " = ", shape.processes(), ", expected the ", processes,
             " processes of this job");
}

MeshPosition mesh_position(const MeshShape& shape, int process) {
  LB_EXPECTS(process >= 0 && process < shape.processes(), "mesh: found process ", process, ", expected 0 to ",
             shape.processes() - 1);
  return {.replica = process / (shape.tensor * shape.shard),
          .shard = process / shape.tensor % shape.shard,
          .tensor = process % shape.tensor};
}

ProcessMesh::ProcessMesh(Communicator& world, const MeshShape& shape) : shape_(shape), world_(&world) {
  validate(shape, world.size());
  position_ = mesh_position(shape, world.process());
  const auto [replica, shard, tensor] = position_;
  // The colour of a group is its position on the other two axes.
  replica_ = world.split(tensor + shape.tensor * shard, replica, "replica");
  shard_ = world.split(tensor + shape.tensor * replica, shard, "shard");
  tensor_ = world.split(shard + shape.shard * replica, tensor, "tensor");
  within_replica_ = world.split(replica, tensor + shape.tensor * shard, "within_replica");
}

}  // namespace lowband
