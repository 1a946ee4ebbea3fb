#include "world_run.h"

#include "collectives/local/local_world.h"
#include "optimizers/state_place.h"
#include "runtime/copy.h"
#include "runtime/passes.h"
#include "runtime/random.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>

#include <gtest/gtest.h>

namespace lowband::test {
namespace {

MatrixLayout layout_of(const ParameterInfo& info, const MeshShape& mesh) {
  return MatrixLayout(info.rows, info.cols, info.cut, mesh.tensor, mesh.shard);
}

/// Copies a piece into its place, and checks a place written before for equal bits.
struct Assembly {
  std::map<std::string, Dense> whole;
  std::map<std::string, std::vector<bool>> written;

  template <class Real>
  void add(const std::string& name, Index rows, Index cols, MatrixView<const Real> piece, Index row,
           Index col) {
    auto [place, fresh] = whole.try_emplace(name, rows, cols);
    std::vector<bool>& seen = written[name];
    if (fresh) seen.resize(place->second.a.size());
    for (Index i = 0; i < piece.rows; ++i) {
      for (Index j = 0; j < piece.cols; ++j) {
        const auto k = static_cast<std::size_t>((row + i) * cols + col + j);
        const double value = static_cast<double>(piece(i, j));
        if (seen[k] && std::memcmp(&place->second.a[k], &value, sizeof value) != 0)
          ADD_FAILURE() << name << "(" << row + i << ", " << col + j
                        << ") differs between processes: " << place->second.a[k] << " and " << value;
        place->second.a[k] = value;
        seen[k] = true;
      }
    }
  }
};

}  // namespace

Dense Snapshot::mean(const std::string& name) const {
  Dense sum = states[0].at(name);
  for (std::size_t i = 1; i < states.size(); ++i) sum = sum + states[i].at(name);
  return (1.0 / static_cast<double>(states.size())) * sum;
}

Dense initial_weight(const ParameterInfo& info) {
  Dense weight(info.rows, info.cols);
  const RandomStream stream(11, info.name + ".weight");
  for (std::size_t k = 0; k < weight.a.size(); ++k)
    weight.a[k] = static_cast<double>(static_cast<float>(0.1 * stream.normal(static_cast<Index>(k))));
  return weight;
}

Dense gradient_of(const GradientFunction& gradient, const ParameterInfo& info, Index step, int first_share,
                  int shares) {
  Dense mean(info.rows, info.cols);
  for (Index i = 0; i < info.rows; ++i) {
    for (Index j = 0; j < info.cols; ++j) {
      for (int share = first_share; share < first_share + shares; ++share)
        mean(i, j) += gradient(info, step, share, i, j) / shares;
    }
  }
  return mean;
}

double cheap_noise(const std::string& name, Index step, Index share, Index row, Index col) {
  std::uint64_t x = std::hash<std::string>()(name);
  for (const Index key : {step, share, row, col}) {
    x = (x ^ static_cast<std::uint64_t>(key)) * 0x9e3779b97f4a7c15u;
    x ^= x >> 29;
  }
  double sum = 0;
  for (int word = 0; word < 4; ++word) sum += static_cast<double>(x >> (16 * word) & 0xffffu) / 65536.0 - 0.5;
  return sum * std::sqrt(3.0);
}

double noisy_gradient(const ParameterInfo& info, Index step, int share, Index row, Index col) {
  return 0.5 * cheap_noise(info.name, step, -1, row, col) + cheap_noise(info.name, step, share, row, col);
}

void add_ranks(RankProfile& profile, const TestParameter& test) {
  for (const ParameterInfo& matrix : matrices_of(test.info)) {
    if (test.factor_rank == 0) continue;
    profile.matrices.push_back(matrix);
    const Index largest = test.info.blocks.empty() ? test.factor_rank : std::min(matrix.rows, matrix.cols);
    profile.factor_ranks.push_back(std::min(test.factor_rank, largest));
  }
}

std::vector<TestParameter> blocked_parameters() {
  const auto matrix = [](const char* name, Role role, Index rows, Index cols, TensorCut cut,
                         ParameterBlocks blocks) {
    return TestParameter{
        {.name = name, .role = role, .rows = rows, .cols = cols, .cut = cut, .blocks = std::move(blocks)}, 3};
  };
  const auto heads = [](TestParameter test) {
    test.info = with_heads(std::move(test.info), 8);
    return test;
  };
  return {heads(matrix("heads", Role::kQuery, 24, 16, TensorCut::kRows, {})),
          heads(matrix("head", Role::kKey, 8, 16, TensorCut::kRows, {})),
          heads(matrix("out", Role::kOutput, 16, 24, TensorCut::kCols, {})),
          matrix("qkv", Role::kUp, 18, 11, TensorCut::kRows,
                 {.ranges = {{{0, 4}, {9, 13}}, {{4, 6}, {13, 15}}, {{6, 9}, {15, 18}}},
                  .roles = {Role::kQuery, Role::kKey, Role::kValue}}),
          matrix("gate_up", Role::kUp, 26, 7, TensorCut::kRows, {.ranges = {{{0, 13}}, {{13, 26}}}}),
          matrix("columns", Role::kDown, 5, 21, TensorCut::kCols,
                 {.of_rows = false, .ranges = {{{0, 1}, {20, 21}}, {{1, 20}}}}),
          matrix("one_row", Role::kUp, 6, 9, TensorCut::kRows, {.ranges = {{{5, 6}}, {{0, 5}}}})};
}

std::vector<TestParameter> assorted_parameters() {
  const auto matrix = [](const char* name, Role role, Index rows, Index cols, TensorCut cut, Index rank) {
    return TestParameter{{.name = name, .role = role, .rows = rows, .cols = cols, .cut = cut}, rank};
  };
  return {
      matrix("embed", Role::kEmbedding, 29, 16, TensorCut::kRows, 0),
      matrix("q", Role::kQuery, 24, 16, TensorCut::kRows, 5),
      matrix("o", Role::kOutput, 16, 24, TensorCut::kCols, 3),
      matrix("k", Role::kKey, 16, 16, TensorCut::kRows, 8),
      matrix("norm", Role::kNorm, 1, 17, TensorCut::kNone, 0),
      matrix("gate", Role::kGate, 37, 16, TensorCut::kRows, 6),
      matrix("up", Role::kUp, 13, 31, TensorCut::kRows, 13),
      matrix("down", Role::kDown, 23, 11, TensorCut::kCols, 11),
      matrix("row", Role::kValue, 1, 9, TensorCut::kRows, 1),
      matrix("column", Role::kValue, 9, 1, TensorCut::kRows, 1),
  };
}

template <class Real>
std::vector<Snapshot> run(const RunPlan& plan) {
  LB_EXPECTS(plan.shares % (plan.mesh.replica * plan.mesh.shard) == 0, "run: found ", plan.shares,
             " shares, expected a multiple of replica x shard");
  std::vector<Snapshot> snapshots(static_cast<std::size_t>(plan.steps));
  std::vector<Assembly> weights(snapshots.size());
  std::vector<std::vector<Assembly>> states(
      snapshots.size(), std::vector<Assembly>(static_cast<std::size_t>(plan.mesh.replica)));
  std::mutex mutex;
  run_world(plan.mesh.processes(), [&](Communicator& host) {
    const std::unique_ptr<Communicator> made = plan.world ? plan.world(host) : nullptr;
    Communicator& world = made ? *made : host;
    const std::unique_ptr<Device> device = plan.on_device ? open_device() : nullptr;
    world.set_device(device.get());
    ProcessMesh mesh(world, plan.mesh);
    const MeshPosition position = mesh.position();

    std::vector<Buffer<Real>> storage;
    std::vector<Parameter<Real>> parameters;
    RankProfile profile{.name = "test", .matrices = {}, .factor_ranks = {}};
    for (const TestParameter& test : plan.parameters) {
      const MatrixLayout layout = layout_of(test.info, plan.mesh);
      const Range rows = layout.tensor_rows(position.tensor);
      const Range cols = layout.tensor_cols(position.tensor);
      storage.emplace_back(2 * rows.size() * cols.size(), device.get());
      const MatrixView<Real> weight = storage.back().matrix(0, rows.size(), cols.size());
      const MatrixView<Real> gradient = storage.back().matrix(weight.elements(), rows.size(), cols.size());
      const Dense initial = initial_weight(test.info);
      Buffer<Real> on_host(weight.elements());
      for (Index i = 0; i < rows.size(); ++i) {
        for (Index j = 0; j < cols.size(); ++j)
          on_host[i * cols.size() + j] = static_cast<Real>(initial(rows.begin + i, cols.begin + j));
      }
      copy<Real>(on_host.line(), weight.line());
      parameters.push_back({test.info, weight, gradient});
      add_ranks(profile, test);
    }
    ShardedOptimizer<Real> optimizer(mesh, parameters, profile, plan.options);

    for (Index step = 0; step < plan.steps; ++step) {
      const int shares = plan.shares / mesh.data_size();
      const auto fill_in = [&](const Parameter<Real>& parameter) {
        const Dense mean =
            gradient_of(plan.gradient, parameter.info, step, shares * mesh.data_index(), shares);
        const MatrixLayout layout = layout_of(parameter.info, plan.mesh);
        const Index row = layout.tensor_rows(position.tensor).begin;
        const Index col = layout.tensor_cols(position.tensor).begin;
        Buffer<Real> on_host(parameter.gradient.elements());
        for (Index i = 0; i < parameter.gradient.rows; ++i) {
          for (Index j = 0; j < parameter.gradient.cols; ++j)
            on_host[i * parameter.gradient.cols + j] = static_cast<Real>(mean(row + i, col + j));
        }
        copy<Real>(on_host.line(), parameter.gradient.line());
      };
      world.ledger().begin_step();
      for (std::size_t i = 0; i < parameters.size(); ++i) {
        if (std::ranges::count(plan.announced, static_cast<Index>(i)) == 0) {
          fill_in(parameters[i]);
        } else {  // whoever reads too early finds this
          fill<Real>(std::numeric_limits<Real>::quiet_NaN(), parameters[i].gradient);
        }
      }
      for (const Index i : plan.announced) {
        fill_in(parameters[static_cast<std::size_t>(i)]);
        optimizer.gradient_ready(i);
      }
      const StepReport report = optimizer.step({.step = step,
                                                .learning_rate = plan.learning_rate,
                                                .scalar_learning_rate = plan.scalar_learning_rate,
                                                .diagnose = plan.diagnose});

      const std::lock_guard lock(mutex);
      const auto s = static_cast<std::size_t>(step);
      Snapshot& snapshot = snapshots[s];
      if (snapshot.planned_factor_bytes + snapshot.planned_dense_bytes > 0) {
        EXPECT_EQ(snapshot.report.gradient_norm, report.gradient_norm);
        EXPECT_EQ(snapshot.report.clip_scale, report.clip_scale);
        EXPECT_EQ(snapshot.report.skipped_matrices, report.skipped_matrices);
        EXPECT_EQ(snapshot.report.skipped_other, report.skipped_other);
        EXPECT_EQ(snapshot.report.dead_columns, report.dead_columns);
        EXPECT_EQ(snapshot.report.householder_fallbacks, report.householder_fallbacks);
        EXPECT_EQ(snapshot.report.diagnostics.size(), report.diagnostics.size());
        for (std::size_t i = 0; i < report.diagnostics.size(); ++i) {
          EXPECT_EQ(snapshot.report.diagnostics[i].name, report.diagnostics[i].name);
          EXPECT_EQ(snapshot.report.diagnostics[i].drift, report.diagnostics[i].drift);
          EXPECT_EQ(snapshot.report.diagnostics[i].mass_leak, report.diagnostics[i].mass_leak);
          EXPECT_EQ(snapshot.report.diagnostics[i].captured_energy, report.diagnostics[i].captured_energy);
        }
      }
      snapshot.report = report;
      const StepBytes planned = optimizer.planned().of(step);
      snapshot.planned_factor_bytes = planned.factor;
      snapshot.planned_dense_bytes = planned.dense;
      snapshot.planned_periodic_bytes = optimizer.planned_periodic_bytes();
      snapshot.planned_update_bytes = planned.update;
      const Ledger& ledger = world.ledger();
      snapshot.update_bytes = ledger.step_sum("within_replica", Purpose::kUpdate).payload_bytes;
      snapshot.periodic_bytes_within[world.process()] =
          ledger.step_sum("within_replica", Purpose::kPeriodic).payload_bytes;
      EXPECT_EQ(snapshot.update_bytes, snapshot.planned_update_bytes) << "process " << world.process();
      if (world.process() == 0) {
        snapshot.calls = ledger.step_sum().calls;
        for (const char* axis : {"replica", "shard", "tensor"})
          snapshot.factor_bytes_on[axis] = ledger.step_sum(axis, Purpose::kFactor).payload_bytes;
        for (const auto& [key, bytes] : ledger.step_parameters()) {
          if (key.purpose == Purpose::kUpdate) snapshot.update_bytes_of[key.parameter] += bytes;
        }
      }
      if (position.replica == 0) {
        snapshot.factor_bytes += ledger.step_sum("replica", Purpose::kFactor).payload_bytes;
        snapshot.dense_bytes += ledger.step_sum("replica", Purpose::kDense).payload_bytes;
        snapshot.periodic_bytes += ledger.step_sum("replica", Purpose::kPeriodic).payload_bytes;
        for (const auto& [key, bytes] : ledger.step_parameters()) {
          if (key.axis == "replica" && key.purpose == Purpose::kFactor)
            snapshot.factor_bytes_of[key.parameter] += bytes;
          if (key.axis == "replica" && key.purpose == Purpose::kDense)
            snapshot.dense_bytes_of[key.parameter] += bytes;
        }
      }

      Assembly& state_of_replica = states[s][static_cast<std::size_t>(position.replica)];
      for (const Parameter<Real>& parameter : parameters) {
        const ParameterInfo& info = parameter.info;
        const MatrixLayout layout = layout_of(info, plan.mesh);
        weights[s].add(info.name, info.rows, info.cols, OnHost<Real>(parameter.weight).view(),
                       layout.tensor_rows(position.tensor).begin, layout.tensor_cols(position.tensor).begin);
      }
      for (const StateTensor<Real>& tensor : optimizer.state()) {
        const std::size_t dot = tensor.name.rfind('.');
        const std::string letter = tensor.name.substr(dot + 1);
        if (letter == "m" || letter == "v") continue;  // elements, no rows and columns
        const auto parameter = std::ranges::find_if(plan.parameters, [&](const TestParameter& p) {
          return p.info.name == tensor.name.substr(0, dot);
        });
        ASSERT_NE(parameter, plan.parameters.end()) << tensor.name;
        const PiecePlace place = state_place(parameter->info, letter, tensor.value.cols, plan.mesh, position);
        EXPECT_EQ(tensor.value.rows, place.block_rows.size()) << tensor.name;
        EXPECT_EQ(tensor.value.cols, place.block_cols.size()) << tensor.name;
        state_of_replica.add(tensor.name, place.rows, place.cols, OnHost<Real>(tensor.value).view(),
                             place.block_rows.begin, place.block_cols.begin);
      }
    }
  });
  for (std::size_t s = 0; s < snapshots.size(); ++s) {
    snapshots[s].weights = std::move(weights[s].whole);
    for (Assembly& replica : states[s]) snapshots[s].states.push_back(std::move(replica.whole));
    for (const auto& [name, first] : snapshots[s].states[0]) {
      if (differs_between_replicas(name.substr(name.rfind('.') + 1))) continue;
      for (const auto& replica : snapshots[s].states)
        EXPECT_EQ(std::memcmp(replica.at(name).a.data(), first.a.data(), first.a.size() * sizeof(double)), 0)
            << name << " differs between replicas";
    }
  }
  return snapshots;
}

template std::vector<Snapshot> run<float>(const RunPlan& plan);
template std::vector<Snapshot> run<double>(const RunPlan& plan);

}  // namespace lowband::test
