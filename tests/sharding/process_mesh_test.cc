#include "sharding/process_mesh.h"

#include "collectives/local/local_world.h"

#include <set>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

namespace lowband {
namespace {

const std::vector<MeshShape> kShapes{{1, 1, 1}, {2, 1, 1}, {1, 1, 3}, {2, 1, 2},
                                     {1, 7, 1}, {2, 2, 2}, {3, 1, 2}};

TEST(MeshPosition, CountsTensorFastestThenShardThenReplica) {
  const MeshShape shape{.replica = 2, .shard = 3, .tensor = 5};
  int process = 0;
  for (int replica = 0; replica < 2; ++replica)
    for (int shard = 0; shard < 3; ++shard)
      for (int tensor = 0; tensor < 5; ++tensor, ++process) {
        const MeshPosition position = mesh_position(shape, process);
        EXPECT_EQ(std::tuple(position.replica, position.shard, position.tensor),
                  std::tuple(replica, shard, tensor));
      }
  EXPECT_THROW(mesh_position(shape, 30), InvalidArgument);
  EXPECT_THROW(mesh_position(shape, -1), InvalidArgument);
}

TEST(MeshShape, MustHoldExactlyTheProcessesOfTheJob) {
  const auto message = [](const MeshShape& shape, int processes) -> std::string {
    try {
      validate(shape, processes);
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(message({2, 1, 2}, 4), "");
  EXPECT_EQ(message({2, 1, 2}, 3),
            "mesh: found replica 2 x shard 1 x tensor 2 = 4, expected the 3 processes of this job");
  EXPECT_EQ(message({1, 1, 0}, 1), "mesh.tensor: found 0, expected at least 1");
  EXPECT_EQ(message({-1, 1, -1}, 1), "mesh.replica: found -1, expected at least 1");
  // 2^32 in 32 bits would be 0, 2^64 in 64 bits as well.
  EXPECT_EQ(message({1 << 20, 1 << 12, 1}, 1),
            "mesh: found replica 1048576 x shard 4096 x tensor 1, expected at most 2147483647 processes");
  EXPECT_EQ(
      message({1 << 30, 1 << 30, 1 << 4}, 1),
      "mesh: found replica 1073741824 x shard 1073741824 x tensor 16, expected at most 2147483647 processes");
}

// Every process says 2^(its number); the sum over an axis must be made of the processes that share the other
// two positions, in order along the axis.
TEST(ProcessMesh, AxisGroupsHoldTheProcessesThatDifferOnThatAxisOnly) {
  for (const MeshShape& shape : kShapes) {
    run_world(shape.processes(), [&](Communicator& world) {
      ProcessMesh mesh(world, shape);
      const MeshPosition here = mesh.position();
      const auto expect_group = [&](Communicator& group, const char* axis, int size, int index, auto member) {
        EXPECT_EQ(group.axis(), axis);
        EXPECT_EQ(group.size(), size);
        EXPECT_EQ(group.process(), index);
        std::int64_t expected = 0;
        for (int process = 0; process < shape.processes(); ++process)
          if (member(mesh_position(shape, process))) expected += std::int64_t{1} << process;
        std::vector<std::int64_t> sum{std::int64_t{1} << world.process()};
        group.all_reduce(std::span(sum), Reduction::kSum, {Purpose::kControl});
        EXPECT_EQ(sum.front(), expected) << axis << " of process " << world.process();
      };
      expect_group(mesh.replica(), "replica", shape.replica, here.replica,
                   [&](const MeshPosition& p) { return p.shard == here.shard && p.tensor == here.tensor; });
      expect_group(mesh.shard(), "shard", shape.shard, here.shard, [&](const MeshPosition& p) {
        return p.replica == here.replica && p.tensor == here.tensor;
      });
      expect_group(mesh.tensor(), "tensor", shape.tensor, here.tensor,
                   [&](const MeshPosition& p) { return p.replica == here.replica && p.shard == here.shard; });
      expect_group(mesh.within_replica(), "within_replica", shape.shard * shape.tensor,
                   here.tensor + shape.tensor * here.shard,
                   [&](const MeshPosition& p) { return p.replica == here.replica; });
    });
  }
}

TEST(ProcessMesh, DataIndexNumbersTheGroupsThatReadDifferentTokens) {
  const MeshShape shape{.replica = 2, .shard = 3, .tensor = 2};
  run_world(shape.processes(), [&](Communicator& world) {
    ProcessMesh mesh(world, shape);
    EXPECT_EQ(mesh.data_size(), 6);
    EXPECT_EQ(mesh.data_index(), world.process() / 2);
  });
}

TEST(ProcessMesh, RefusesAWrongProductOnEveryProcess) {
  run_world(3, [](Communicator& world) {
    EXPECT_THROW(ProcessMesh(world, MeshShape{.replica = 2, .shard = 1, .tensor = 2}), InvalidArgument);
    world.barrier();  // the world is still usable: nothing was sent
  });
}

}  // namespace
}  // namespace lowband
