#include "c_world.h"
#include "collectives/local/local_world.h"
#include "optimizers/sharded_optimizer.h"
#include "runtime/random.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <string>
#include <type_traits>

#include <gtest/gtest.h>

namespace lowband {
namespace {

using testing::COptimizer;
using testing::expect_ok;
using testing::payload;
using testing::run_c_world;

constexpr int kReplicas = 2;
constexpr Index kSteps = 6;

struct Shape {
  const char* name;
  lowband_role role;
  Index rows, cols;
};
constexpr Shape kShapes[] = {{"wq", LOWBAND_QUERY, 17, 11},
                             {"embed", LOWBAND_EMBEDDING, 13, 5},
                             {"w_down", LOWBAND_DOWN, 7, 19},
                             {"norm", LOWBAND_NORM, 1, 23}};
constexpr Index kRank = 3;
// r (m + n) of the two matrices; all elements of the other two.
constexpr Index kFactorElements = kRank * (17 + 11) + kRank * (7 + 19);
constexpr Index kBucketElements = 100;  // where exchanges overlap
constexpr Index kDenseElements = 13 * 5 + 23;

struct Kind {
  lowband_optimizer_kind in_c;
  OptimizerKind in_cpp;
};
constexpr Kind kKinds[] = {
    {LOWBAND_DION, OptimizerKind::kDion},       {LOWBAND_POWER_SGD, OptimizerKind::kPowerSgd},
    {LOWBAND_ADAMW, OptimizerKind::kAdamW},     {LOWBAND_SGD, OptimizerKind::kSgd},
    {LOWBAND_LION, OptimizerKind::kLion},       {LOWBAND_MUON, OptimizerKind::kMuon},
    {LOWBAND_NORMUON, OptimizerKind::kNorMuon}, {LOWBAND_MUONBP, OptimizerKind::kMuonBp},
    {LOWBAND_DION2, OptimizerKind::kDion2},     {LOWBAND_NORDION2, OptimizerKind::kNorDion2},
    {LOWBAND_SPECGD, OptimizerKind::kSpecGd},   {LOWBAND_SPECTRA, OptimizerKind::kSpectra},
    {LOWBAND_ACP_SGD, OptimizerKind::kAcpSgd},  {LOWBAND_GALORE, OptimizerKind::kGalore}};
bool sends_both_factors(lowband_optimizer_kind kind) {
  return kind == LOWBAND_DION || kind == LOWBAND_POWER_SGD;
}
bool has_factor_ranks(lowband_optimizer_kind kind) {
  return sends_both_factors(kind) || kind == LOWBAND_ACP_SGD || kind == LOWBAND_GALORE;
}

double noise(Index seed, Index i) {
  std::uint64_t x = static_cast<std::uint64_t>(seed * 1'000'003 + i) * 0x9E3779B97F4A7C15ULL;
  x = (x ^ (x >> 31)) * 0xBF58476D1CE4E5B9ULL;
  return static_cast<double>((x ^ (x >> 29)) >> 11) / 4503599627370496.0 - 1;
}

/// Weights and gradients of kShapes; gradients of (replica, step) are noise that no two share.
template <class Real>
struct Memory {
  std::vector<std::vector<Real>> weights, gradients;
  Memory() {
    for (Index k = 0; k < std::ssize(kShapes); ++k) {
      std::vector<Real> weight(static_cast<std::size_t>(kShapes[k].rows * kShapes[k].cols));
      gradients.push_back(weight);
      for (std::size_t i = 0; i < weight.size(); ++i)
        weight[i] = static_cast<Real>(noise(k, static_cast<Index>(i)));
      weights.push_back(weight);
    }
  }
  void fill(int replica, Index step) {
    for (std::size_t k = 0; k < gradients.size(); ++k) {
      for (std::size_t i = 0; i < gradients[k].size(); ++i)
        gradients[k][i] = static_cast<Real>(
            noise(1000 + static_cast<Index>(k) + 10 * replica + 100 * step, static_cast<Index>(i)));
    }
  }
  std::vector<lowband_parameter> described() {
    std::vector<lowband_parameter> parameters;
    for (std::size_t k = 0; k < weights.size(); ++k)
      parameters.push_back({kShapes[k].name, kShapes[k].role, LOWBAND_UNCUT, kShapes[k].rows, kShapes[k].cols,
                            weights[k].data(), gradients[k].data(), 0, nullptr, 0, 0});
    return parameters;
  }
};

lowband_options options_of(lowband_optimizer_kind kind, lowband_dtype dtype) {
  lowband_options options;
  lowband_options_defaults(&options);
  options.kind = kind;
  options.dtype = dtype;
  options.uniform_rank = has_factor_ranks(kind) ? kRank : 0;
  options.galore_interval = 2;
  options.muonbp_period = 2;
  options.muonbp_block_rate = 0.5;
  options.seed = 5;
  return options;
}

lowband_step_info step_info(Index step) {
  lowband_step_info info;
  lowband_step_info_defaults(&info);
  info.step = step;
  info.learning_rate = 0.02;
  info.scalar_learning_rate = 0.003;
  return info;
}

template <class Real>
std::vector<std::vector<Real>> weights_from_cpp(lowband_optimizer_kind kind, bool overlap = false) {
  std::vector<std::vector<Real>> weights;
  std::mutex mutex;
  run_world(kReplicas, [&](Communicator& world) {
    ProcessMesh mesh(world, {.replica = kReplicas});
    Memory<Real> memory;
    std::vector<Parameter<Real>> parameters;
    const std::map<lowband_role, Role> roles{{LOWBAND_QUERY, Role::kQuery},
                                             {LOWBAND_EMBEDDING, Role::kEmbedding},
                                             {LOWBAND_DOWN, Role::kDown},
                                             {LOWBAND_NORM, Role::kNorm}};
    std::vector<ParameterInfo> infos;
    for (std::size_t k = 0; k < std::size(kShapes); ++k) {
      const auto [name, role, rows, cols] = kShapes[k];
      infos.push_back({name, roles.at(role), rows, cols, TensorCut::kNone});
      parameters.push_back(
          {infos.back(), {memory.weights[k].data(), rows, cols}, {memory.gradients[k].data(), rows, cols}});
    }
    OptimizerOptions options;
    options.kind = std::ranges::find(kKinds, kind, &Kind::in_c)->in_cpp;
    options.seed = 5;
    options.galore_interval = 2;
    options.muonbp_period = 2;
    options.muonbp_block_rate = 0.5;
    options.overlap = overlap;
    options.bucket_elements = kBucketElements;
    ProfileSpec spec;
    spec.uniform_rank = kRank;
    ShardedOptimizer<Real> optimizer(mesh, parameters, make_profile(spec, infos), options);
    for (Index step = 0; step < kSteps; ++step) {
      memory.fill(world.process(), step);
      optimizer.step({.step = step, .learning_rate = 0.02, .scalar_learning_rate = 0.003});
    }
    const std::lock_guard lock(mutex);
    if (world.process() == 0) weights = memory.weights;
  });
  return weights;
}

template <class Real>
class PluginOptimizer : public ::testing::Test {};
using Reals = ::testing::Types<float, double>;
TYPED_TEST_SUITE(PluginOptimizer, Reals);

template <class Real>
constexpr lowband_dtype kDType = std::is_same_v<Real, float> ? LOWBAND_F32 : LOWBAND_F64;

TYPED_TEST(PluginOptimizer, gives_the_bits_of_the_optimizer_behind_it_and_sends_what_it_plans) {
  using Real = TypeParam;
  for (const auto& [kind, in_cpp] : kKinds) {
    SCOPED_TRACE(kind);
    const auto expected = weights_from_cpp<Real>(kind);
    run_c_world(kReplicas, [&](lowband_world* world) {
      Memory<Real> memory;
      const COptimizer optimizer(world, memory.described(), options_of(kind, kDType<Real>));
      for (Index step = 0; step < kSteps; ++step) {
        Index factor_bytes = 0;
        Index dense_bytes = 0;
        expect_ok(lowband_planned_bytes(optimizer.handle, &factor_bytes, &dense_bytes));
        const bool factored = sends_both_factors(kind);
        if (factored || !has_factor_ranks(kind)) {
          EXPECT_EQ(factor_bytes, factored ? kFactorElements * Index{sizeof(Real)} : 0);
          EXPECT_EQ(dense_bytes, (kDenseElements + (factored ? 0 : 17 * 11 + 7 * 19)) * Index{sizeof(Real)});
        }
        memory.fill(lowband_world_process(world), step);
        const lowband_step_info info = step_info(step);
        lowband_step_report report;
        lowband_step_report_defaults(&report);
        expect_ok(lowband_step(optimizer.handle, &info, &report));
        EXPECT_GT(report.gradient_norm, 1);
        EXPECT_LT(report.clip_scale, 1);
        EXPECT_EQ(payload(optimizer.handle, LOWBAND_FACTOR), factor_bytes);
        EXPECT_EQ(payload(optimizer.handle, LOWBAND_DENSE), dense_bytes);
      }
      EXPECT_EQ(memory.weights, expected);
    });
  }
}

TYPED_TEST(PluginOptimizer, goes_on_bit_by_bit_from_saved_state) {
  using Real = TypeParam;
  for (const auto& [kind, in_cpp] : kKinds) {
    SCOPED_TRACE(kind);
    const auto expected = weights_from_cpp<Real>(kind);
    run_c_world(kReplicas, [&](lowband_world* world) {
      const int process = lowband_world_process(world);
      const lowband_options options = options_of(kind, kDType<Real>);
      Memory<Real> memory;
      std::map<std::string, std::vector<Real>> saved;
      const auto each_piece = [&](const COptimizer& optimizer, auto visit) {
        for (Index i = 0; i < lowband_state_count(optimizer.handle); ++i) {
          lowband_state_piece piece;
          lowband_state_piece_defaults(&piece);
          expect_ok(lowband_state_at(optimizer.handle, i, &piece));
          ASSERT_EQ(piece.dtype, kDType<Real>);
          lowband_state_place place;
          lowband_state_place_defaults(&place);
          expect_ok(lowband_state_place_of(optimizer.handle, i, &place));
          EXPECT_EQ(place.element_end - place.element_begin, piece.rows * piece.cols) << piece.name;
          EXPECT_EQ(place.rows * place.cols, piece.rows * piece.cols)
              << piece.name;  // a replica is one process
          const std::string letter = std::string(piece.name).substr(std::string(piece.name).rfind('.') + 1);
          EXPECT_EQ(place.differs_between_replicas, letter == "M" || letter == "e" ? 1 : 0) << piece.name;
          for (Index row = 0; row < piece.rows; ++row)
            visit(std::string(piece.name) + std::to_string(row),
                  std::span<Real>(static_cast<Real*>(piece.data) + row * piece.row_stride,
                                  static_cast<std::size_t>(piece.cols)));
        }
      };
      {
        const COptimizer first(world, memory.described(), options);
        for (Index step = 0; step < kSteps / 2; ++step) {
          memory.fill(process, step);
          const lowband_step_info info = step_info(step);
          expect_ok(lowband_step(first.handle, &info, nullptr));
        }
        each_piece(first, [&](const std::string& name, std::span<Real> row) {
          saved[name] = std::vector<Real>(row.begin(), row.end());
        });
      }
      const COptimizer second(world, memory.described(), options);
      each_piece(second, [&](const std::string& name, std::span<Real> row) {
        std::ranges::copy(saved.at(name), row.begin());
      });
      for (Index step = kSteps / 2; step < kSteps; ++step) {
        memory.fill(process, step);
        const lowband_step_info info = step_info(step);
        expect_ok(lowband_step(second.handle, &info, nullptr));
      }
      EXPECT_EQ(memory.weights, expected);
    });
  }
}

// Gradients elsewhere in every step, announced from the last to the first, exchanged while that goes on.
TYPED_TEST(PluginOptimizer, follows_memory_that_moves_and_overlaps) {
  using Real = TypeParam;
  const auto expected = weights_from_cpp<Real>(LOWBAND_POWER_SGD, true);
  run_c_world(kReplicas, [&](lowband_world* world) {
    lowband_options options = options_of(LOWBAND_POWER_SGD, kDType<Real>);
    options.overlap = 1;
    options.bucket_elements = kBucketElements;
    Memory<Real> memory;
    const COptimizer optimizer(world, memory.described(), options);
    std::vector<Memory<Real>> elsewhere(kSteps);
    for (Index step = 0; step < kSteps; ++step) {
      Memory<Real>& here = elsewhere[static_cast<std::size_t>(step)];
      here.fill(lowband_world_process(world), step);
      for (Index k = std::ssize(kShapes) - 1; k >= 0; --k) {
        const auto at = static_cast<std::size_t>(k);
        expect_ok(lowband_rebind(optimizer.handle, k, memory.weights[at].data(), here.gradients[at].data()));
        expect_ok(lowband_gradient_ready(optimizer.handle, k));
      }
      const lowband_step_info info = step_info(step);
      expect_ok(lowband_step(optimizer.handle, &info, nullptr));
      EXPECT_EQ(payload(optimizer.handle, LOWBAND_FACTOR), kFactorElements * Index{sizeof(Real)});
    }
    EXPECT_EQ(memory.weights, expected);
  });
}

// Query, key and value interleaved in two groups are matrices of their own, as three parameters would be: the
// same bits.
TYPED_TEST(PluginOptimizer, takes_the_blocks_of_a_parameter_for_matrices_of_their_own) {
  using Real = TypeParam;
  constexpr Index kCols = 7, kRows = 2 * (4 + 2 + 1);
  const std::vector<lowband_block> blocks{{LOWBAND_QUERY, 4, 0}, {LOWBAND_KEY, 2, 0}, {LOWBAND_VALUE, 1, 0}};
  const auto train = [](lowband_world* world, lowband_optimizer_kind kind, const lowband_parameter& parameter,
                        const std::vector<Index>& rows) {
    lowband_options options = options_of(kind, kDType<Real>);
    options.clip_norm = 0;  // the norm is that of all parameters
    options.uniform_rank = has_factor_ranks(kind) ? 2 : 0;
    lowband_optimizer* optimizer = nullptr;
    expect_ok(lowband_optimizer_create(world, &parameter, 1, &options, &optimizer));
    for (Index step = 0; step < kSteps; ++step) {
      for (std::size_t i = 0; i < rows.size(); ++i) {
        for (Index j = 0; j < kCols; ++j)
          static_cast<Real*>(parameter.gradient)[static_cast<Index>(i) * kCols + j] =
              static_cast<Real>(noise(10 * lowband_world_process(world) + 100 * step + rows[i], j));
      }
      const lowband_step_info info = step_info(step);
      expect_ok(lowband_step(optimizer, &info, nullptr));
    }
    lowband_optimizer_free(optimizer);
  };
  std::vector<Index> all_rows(kRows);
  std::iota(all_rows.begin(), all_rows.end(), Index{0});
  for (const auto& [kind, in_cpp] : kKinds) {
    if (!has_matrix_optimizer(in_cpp)) continue;
    SCOPED_TRACE(kind);
    run_c_world(kReplicas, [&, kind = kind](lowband_world* world) {
      std::vector<Real> fused(kRows * kCols), gradient(fused.size());
      train(world, kind,
            {"qkv", LOWBAND_MATRIX, LOWBAND_UNCUT, kRows, kCols, fused.data(), gradient.data(), 0,
             blocks.data(), 3, 0},
            all_rows);
      Index before = 0;
      for (std::size_t j = 0; j < blocks.size(); ++j) {
        std::vector<Index> rows;
        for (Index row = before; row < kRows; row += kRows / 2) {
          for (Index i = 0; i < blocks[j].lines; ++i) rows.push_back(row + i);
        }
        before += blocks[j].lines;
        std::vector<Real> alone(rows.size() * kCols);
        const std::string name = "qkv[" + std::to_string(j) + "]";
        train(world, kind,
              {name.c_str(), blocks[j].role, LOWBAND_UNCUT, std::ssize(rows), kCols, alone.data(),
               gradient.data(), 0, nullptr, 0, 0},
              rows);
        for (std::size_t k = 0; k < alone.size(); ++k)
          EXPECT_EQ(fused[static_cast<std::size_t>(rows[k / kCols]) * kCols + k % kCols], alone[k])
              << name << " " << k;
      }
    });
  }
}

TEST(PluginBlocks, have_ranks_diagnoses_and_states_of_their_own) {
  run_c_world(kReplicas, [&](lowband_world* world) {
    const std::vector<lowband_block> blocks{{LOWBAND_GATE, 3, 2}, {LOWBAND_UP, 2, 1}};
    std::vector<float> weight(10 * 6), gradient(weight.size());
    for (std::size_t k = 0; k < gradient.size(); ++k)
      gradient[k] = static_cast<float>(noise(lowband_world_process(world), static_cast<Index>(k)));
    const lowband_parameter fused{
        "fused", LOWBAND_MATRIX, LOWBAND_UNCUT, 10, 6, weight.data(), gradient.data(), 0, blocks.data(), 2,
        0};
    lowband_options options = options_of(LOWBAND_DION, LOWBAND_F32);
    options.profile = LOWBAND_EXPLICIT;
    lowband_optimizer* optimizer = nullptr;
    expect_ok(lowband_optimizer_create(world, &fused, 1, &options, &optimizer));
    Index factor_bytes = 0, dense_bytes = 0, factor_rank = 0;
    expect_ok(lowband_planned_bytes(optimizer, &factor_bytes, &dense_bytes));
    EXPECT_EQ(factor_bytes, 4 * (2 * (6 + 6) + 1 * (4 + 6)));
    for (Index j = 0; j < 2; ++j) {
      expect_ok(lowband_block_factor_rank(optimizer, 0, j, &factor_rank));
      EXPECT_EQ(factor_rank, 2 - j);
    }
    EXPECT_EQ(lowband_block_factor_rank(optimizer, 0, 2, &factor_rank), LOWBAND_INVALID_ARGUMENT);
    EXPECT_STREQ(lowband_last_error(), "block of fused: found 2, expected 0 .. 1");
    EXPECT_EQ(lowband_factor_rank(optimizer, 0, &factor_rank), LOWBAND_INVALID_ARGUMENT);
    EXPECT_STREQ(lowband_last_error(),
                 "parameter: found fused of 2 blocks, expected one without: lowband_block_factor_rank");
    lowband_step_info info = step_info(0);
    info.diagnose = 1;
    expect_ok(lowband_step(optimizer, &info, nullptr));
    EXPECT_EQ(payload(optimizer, LOWBAND_FACTOR), factor_bytes);
    lowband_diagnosis diagnosis;
    lowband_diagnosis_defaults(&diagnosis);
    for (Index j = 0; j < 2; ++j) {
      expect_ok(lowband_block_diagnosis(optimizer, 0, j, &diagnosis));
      EXPECT_GT(diagnosis.captured_energy, 0);
      EXPECT_LT(diagnosis.captured_energy, 1);
    }
    EXPECT_EQ(lowband_diagnosis_of(optimizer, 0, &diagnosis), LOWBAND_INVALID_ARGUMENT);
    std::map<std::string, std::pair<Index, Index>> shapes;
    for (Index i = 0; i < lowband_state_count(optimizer); ++i) {
      lowband_state_place place;
      lowband_state_place_defaults(&place);
      lowband_state_piece piece;
      lowband_state_piece_defaults(&piece);
      expect_ok(lowband_state_at(optimizer, i, &piece));
      expect_ok(lowband_state_place_of(optimizer, i, &place));
      shapes[piece.name] = {place.rows, place.cols};
      EXPECT_EQ(place.differs_between_replicas, std::string(piece.name).find(".M[") != std::string::npos);
    }
    EXPECT_EQ(
        shapes,
        (std::map<std::string, std::pair<Index, Index>>{
            {"fused.M[0]", {6, 6}}, {"fused.Q[0]", {6, 2}}, {"fused.M[1]", {4, 6}}, {"fused.Q[1]", {4, 1}}}));
    lowband_optimizer_free(optimizer);
  });
}

/// A run of a program that was compiled with an earlier header: its structs are shorter, and its parameters
/// lie side by side as such.
void expect_same_from_earlier_version(std::size_t options_bytes) {
  constexpr std::size_t kBytes = offsetof(lowband_parameter, blocks);
  const auto expected = weights_from_cpp<float>(LOWBAND_DION);
  run_c_world(kReplicas, [&](lowband_world* world) {
    lowband_options options = options_of(LOWBAND_DION, LOWBAND_F32);
    options.struct_bytes = static_cast<std::int64_t>(options_bytes);
    std::memset(reinterpret_cast<std::byte*>(&options) + options_bytes, 77, sizeof options - options_bytes);
    Memory<float> memory;
    const std::vector<lowband_parameter> described = memory.described();
    std::vector<std::byte> parameters(described.size() * kBytes);
    for (std::size_t k = 0; k < described.size(); ++k)
      std::memcpy(parameters.data() + k * kBytes, &described[k], kBytes);
    lowband_optimizer* optimizer = nullptr;
    expect_ok(lowband_optimizer_create(world, reinterpret_cast<const lowband_parameter*>(parameters.data()),
                                       std::ssize(described), &options, &optimizer));
    for (Index step = 0; step < kSteps; ++step) {
      memory.fill(lowband_world_process(world), step);
      const lowband_step_info info = step_info(step);
      expect_ok(lowband_step(optimizer, &info, nullptr));
    }
    lowband_optimizer_free(optimizer);
    EXPECT_EQ(memory.weights, expected);
  });
}

TEST(PluginOptimizerOptions, of_version_2_are_completed) {
  expect_same_from_earlier_version(offsetof(lowband_options, sign));
}
TEST(PluginOptimizerOptions, of_version_3_are_completed) {
  expect_same_from_earlier_version(offsetof(lowband_options, parameter_bytes));
}

TEST(PluginOptimizerReport, diagnoses_matrices_when_asked) {
  run_c_world(kReplicas, [&](lowband_world* world) {
    Memory<float> memory;
    const COptimizer optimizer(world, memory.described(), options_of(LOWBAND_DION, LOWBAND_F32));
    lowband_step_info info = step_info(0);
    info.diagnose = 1;
    memory.fill(lowband_world_process(world), 0);
    expect_ok(lowband_step(optimizer.handle, &info, nullptr));
    lowband_diagnosis diagnosis;
    lowband_diagnosis_defaults(&diagnosis);
    expect_ok(lowband_diagnosis_of(optimizer.handle, 0, &diagnosis));
    EXPECT_GT(diagnosis.drift, 0);
    EXPECT_GT(diagnosis.captured_energy, 0);
    EXPECT_LT(diagnosis.captured_energy, 1);
    EXPECT_EQ(lowband_diagnosis_of(optimizer.handle, 1, &diagnosis), LOWBAND_INVALID_ARGUMENT);
    EXPECT_GT(payload(optimizer.handle, LOWBAND_PERIODIC), 0);
  });
}

}  // namespace
}  // namespace lowband
