// State is kept once over the processes of a replica. What of it is multiplied as a whole is gathered for
// that.

#include "collectives/local/local_world.h"
#include "optimizers/spectra.h"
#include "world_run.h"

#include <mutex>
#include <numeric>

#include <gtest/gtest.h>

namespace lowband {
namespace {

using namespace test;

/// Names a mesh in a test's name: "D2F1T2".
std::string mesh_name(const testing::TestParamInfo<MeshShape>& mesh) {
  return cat("D", mesh.param.replica, "F", mesh.param.shard, "T", mesh.param.tensor);
}

/// Those with one, two, four and eight processes to a replica divide the matrices `even` and `wide`.
const MeshShape kMeshes[] = {{1, 1, 1}, {1, 1, 2}, {1, 2, 1}, {2, 1, 1}, {2, 2, 2},
                             {1, 1, 4}, {1, 4, 1}, {1, 4, 2}, {2, 1, 2}, {2, 2, 1},
                             {1, 3, 1}, {1, 1, 3}, {1, 3, 2}, {1, 2, 3}, {1, 1, 7}};

std::vector<TestParameter> matrices() {
  std::vector<TestParameter> matrices = assorted_parameters();
  std::erase_if(matrices, [](const TestParameter& test) { return test.factor_rank == 0; });
  matrices.push_back(
      {{.name = "even", .role = Role::kUp, .rows = 64, .cols = 32, .cut = TensorCut::kRows}, 8});
  matrices.push_back(
      {{.name = "wide", .role = Role::kDown, .rows = 32, .cols = 64, .cut = TensorCut::kCols}, 8});
  return matrices;
}

/// The axes of `mesh` that cut a matrix: the tensor axis in the way of the parameter, the shard axis in the
/// other.
struct Axis {
  const char* name;
  Index processes;
};
Axis across_rows(const ParameterInfo& info, const MeshShape& mesh) {
  return info.cut == TensorCut::kCols ? Axis{"shard", mesh.shard} : Axis{"tensor", mesh.tensor};
}
Axis across_cols(const ParameterInfo& info, const MeshShape& mesh) {
  return info.cut == TensorCut::kCols ? Axis{"tensor", mesh.tensor} : Axis{"shard", mesh.shard};
}

/// The smallest and the largest of pieces.
struct Sizes {
  Index least = 0, most = 0;
  Sizes cut(Index pieces) const { return {least / pieces, (most + pieces - 1) / pieces}; }
  Sizes times(Sizes other) const { return {least * other.least, most * other.most}; }
  Sizes operator+(Sizes other) const { return {least + other.least, most + other.most}; }
};
Sizes whole(Index extent) { return {extent, extent}; }

// ---- Elements
// -------------------------------------------------------------------------------------------------

/// What one m x n matrix keeps, over the processes of a replica. Reference: table 1 of "Spectra", and the
/// counts of algorithms.md, section 1, for the others.
struct Kept {
  const char* name;
  OptimizerOptions options;
  Index dense = 0;   // times m n
  Index longer = 0;  // times max(m, n) r
  Index shorter = 0;
  Index cols = 0;  // times n k
  Index rows = 0;  // times m

  Index elements(const ParameterInfo& info, Index r) const {
    return dense * info.elements() + longer * std::max(info.rows, info.cols) * r +
           shorter * std::min(info.rows, info.cols) * r + cols * info.cols * k(info) + rows * info.rows;
  }
  /// On one process: blocks, and shares of the rows of factors that blocks have.
  Sizes elements_of_one(const ParameterInfo& info, Index r, const MeshShape& mesh) const {
    const Index row_pieces = across_rows(info, mesh).processes,
                col_pieces = across_cols(info, mesh).processes;
    const Sizes block_rows = whole(info.rows).cut(row_pieces), columns = whole(info.cols).cut(col_pieces);
    const Sizes shared_rows = block_rows.cut(col_pieces), shared_cols = columns.cut(row_pieces);
    const bool tall = info.rows >= info.cols;
    const Sizes elementwise =
        (info.cut == TensorCut::kCols ? whole(info.rows).times(columns) : block_rows.times(whole(info.cols)))
            .cut(mesh.shard);
    const Sizes blocks = has_matrix_optimizer(options.kind) ? block_rows.times(columns) : elementwise;
    return blocks.times(whole(dense)) + (tall ? shared_rows : shared_cols).times(whole(longer * r)) +
           (tall ? shared_cols : shared_rows).times(whole(shorter * r)) +
           shared_cols.times(whole(cols * k(info))) + shared_rows.times(whole(rows));
  }

 private:
  Index k(const ParameterInfo& info) const { return spectra_rank(info, options.spectra_fraction); }
};

const Kept kKept[] = {
    {.name = "AdamW", .options = {.kind = OptimizerKind::kAdamW}, .dense = 2},
    {.name = "Muon", .options = {.kind = OptimizerKind::kMuon}, .dense = 1},
    {.name = "NorMuon", .options = {.kind = OptimizerKind::kNorMuon}, .dense = 1, .rows = 1},
    {.name = "NorDion2", .options = {.kind = OptimizerKind::kNorDion2}, .dense = 1, .rows = 1},
    {.name = "Spectra",
     .options = {.kind = OptimizerKind::kSpectra, .spectra_fraction = 0.2},
     .dense = 1,
     .cols = 1},
    {.name = "Dion", .options = {.kind = OptimizerKind::kDion}, .dense = 1, .shorter = 1},
    {.name = "PowerSgd", .options = {.kind = OptimizerKind::kPowerSgd}, .dense = 2, .shorter = 1},
    {.name = "Galore", .options = {.kind = OptimizerKind::kGalore}, .longer = 2, .shorter = 1},
    {.name = "AcpSgd", .options = {.kind = OptimizerKind::kAcpSgd}, .dense = 2, .longer = 1, .shorter = 1},
};

class StateShares : public testing::TestWithParam<MeshShape> {};

/// By matrix, of each process of replica 0; without the counts of updates, one number for each matrix.
std::map<std::string, std::vector<Index>> elements_kept(const MeshShape& shape,
                                                        const OptimizerOptions& options) {
  std::map<std::string, std::vector<Index>> found;
  std::mutex mutex;
  run_world(shape.processes(), [&](Communicator& world) {
    ProcessMesh mesh(world, shape);
    RankProfile profile{.name = "test", .matrices = {}, .factor_ranks = {}};
    std::vector<Buffer<float>> storage;
    std::vector<Parameter<float>> parameters;
    for (const TestParameter& test : matrices()) {
      const ParameterInfo& info = test.info;
      const MatrixLayout layout(info.rows, info.cols, info.cut, shape.tensor, shape.shard);
      const Index rows = layout.tensor_rows(mesh.position().tensor).size();
      const Index cols = layout.tensor_cols(mesh.position().tensor).size();
      storage.emplace_back(2 * rows * cols);
      parameters.push_back(
          {info, storage.back().matrix(0, rows, cols), storage.back().matrix(rows * cols, rows, cols)});
      add_ranks(profile, test);
    }
    ShardedOptimizer<float> optimizer(mesh, parameters, profile, options);
    if (mesh.position().replica > 0) return;
    std::map<std::string, Index> own;
    for (const StateTensor<float>& tensor : optimizer.state()) {
      if (!tensor.name.ends_with(".t"))
        own[tensor.name.substr(0, tensor.name.rfind('.'))] += tensor.value.elements();
    }
    const std::lock_guard lock(mutex);
    for (const auto& [name, elements] : own) found[name].push_back(elements);
  });
  return found;
}

TEST_P(StateShares, AreTheFormulasOverShardTimesTensor) {
  const MeshShape mesh = GetParam();
  const Index processes = mesh.shard * mesh.tensor;
  for (const Kept& kept : kKept) {
    const auto found = elements_kept(mesh, kept.options);
    for (const auto& [info, r] : matrices()) {
      const std::vector<Index>& shares = found.at(info.name);
      EXPECT_EQ(std::ssize(shares), processes);
      EXPECT_EQ(std::reduce(shares.begin(), shares.end()), kept.elements(info, r))
          << kept.name << ", " << info.name;
      const Sizes of_one = kept.elements_of_one(info, r, mesh);
      const bool divides = (info.name == "even" || info.name == "wide") && 8 % processes == 0;
      for (const Index share : shares) {
        EXPECT_GE(share, of_one.least) << kept.name << ", " << info.name;
        EXPECT_LE(share, of_one.most) << kept.name << ", " << info.name;
        if (divides) {
          EXPECT_EQ(share * processes, kept.elements(info, r)) << kept.name << ", " << info.name;
        }
      }
    }
  }
}

// ---- Bytes
// ----------------------------------------------------------------------------------------------------

// A sum of a factor over an axis is two transfers of the rows of the block, Q one more: on the axis whose
// processes share R, which has the rows of Q. Dion and PowerSGD send the same.
TEST_P(StateShares, AreGatheredOnceInAStep) {
  const MeshShape mesh = GetParam();
  for (const OptimizerKind kind : {OptimizerKind::kDion, OptimizerKind::kPowerSgd}) {
    for (const Residual residual : {Residual::kLocal, Residual::kAggregated}) {
      for (const ExchangeChoice choice : {ExchangeChoice::kFactors, ExchangeChoice::kDense}) {
        std::map<std::string, Index> expected{{"shard", 0}, {"tensor", 0}};
        for (const auto& [info, r] : matrices()) {
          const MatrixLayout layout(info.rows, info.cols, info.cut, mesh.tensor, mesh.shard);
          const bool tall = info.rows >= info.cols;
          const Index rows = layout.owned_rows(0, 0).size(), cols = layout.owned_cols(0, 0).size();
          const Axis sums_left = tall ? across_cols(info, mesh) : across_rows(info, mesh);
          const Axis sums_right = tall ? across_rows(info, mesh) : across_cols(info, mesh);
          // Each replica's own R is gathered beside the mean, or summed like it where the mean of B travels.
          Index own_right = 0;
          if (residual == Residual::kLocal)
            own_right = choice == ExchangeChoice::kDense ? 2 : Index{mesh.replica > 1};
          if (sums_left.processes > 1) expected[sums_left.name] += 2 * (tall ? rows : cols) * r;
          if (sums_right.processes > 1)
            expected[sums_right.name] += (1 + 2 + own_right) * (tall ? cols : rows) * r;
        }
        RunPlan plan;
        plan.mesh = mesh;
        plan.parameters = matrices();
        plan.options = {.kind = kind, .residual = residual, .clip_norm = 0, .exchange = choice};
        plan.gradient = noisy_gradient;
        plan.shares = mesh.replica * mesh.shard;
        plan.steps = 2;
        for (const Snapshot& snapshot : run<float>(plan)) {
          for (const auto& [axis, elements] : expected)
            EXPECT_EQ(snapshot.factor_bytes_on.at(axis), 4 * elements)
                << axis << ", " << static_cast<int>(kind) << static_cast<int>(residual)
                << static_cast<int>(choice);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Meshes, StateShares, testing::ValuesIn(kMeshes), mesh_name);

}  // namespace
}  // namespace lowband
