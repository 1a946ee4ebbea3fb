#include "c_world.h"

#include <array>
#include <functional>
#include <latch>
#include <limits>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using ::testing::AllOf;
using testing::expect_ok;
using ::testing::HasSubstr;
using testing::run_c_world;

/// One matrix (6, 4) and one vector of 4, and options for them.
struct Description {
  std::array<float, 28> weights{};
  std::array<float, 28> gradients{};
  std::vector<lowband_block> blocks{{LOWBAND_GATE, 2, 0}, {LOWBAND_UP, 1, 0}};
  std::vector<lowband_parameter> parameters{
      {"matrix", LOWBAND_MATRIX, LOWBAND_UNCUT, 6, 4, weights.data(), gradients.data(), 0, nullptr, 0, 0},
      {"bias", LOWBAND_NORM, LOWBAND_UNCUT, 1, 4, weights.data() + 24, gradients.data() + 24, 0, nullptr, 0,
       0}};
  lowband_options options;
  Description() {
    lowband_options_defaults(&options);
    options.uniform_rank = 2;
  }
  /// Blocks of the matrix, and an optimizer that takes them.
  void use_blocks() {
    parameters[0].blocks = blocks.data();
    parameters[0].block_count = 2;
    options.kind = LOWBAND_MUON;
    options.uniform_rank = 0;
  }
  lowband_status create(lowband_world* world, lowband_optimizer** optimizer) {
    return lowband_optimizer_create(world, parameters.data(), static_cast<int64_t>(parameters.size()),
                                    &options, optimizer);
  }
};

struct Case {
  std::function<void(Description&)> spoil;
  std::vector<std::string> message;
};

TEST(PluginErrors, name_the_field_the_value_found_and_the_value_expected) {
  const std::vector<Case> cases{
      {[](auto& d) { d.options.struct_bytes = 8; }, {"options.struct_bytes", "found 8", "expected"}},
      {[](auto& d) { d.options.mesh_tensor = 2; }, {"mesh", "found", "expected"}},
      {[](auto& d) { d.options.mesh_shard = 0; }, {"mesh.shard", "found 0", "expected at least 1"}},
      {[](auto& d) { d.options.mesh_replica = 3; }, {"mesh", "replica 3", "1 processes"}},
      {[](auto& d) { d.options.mu = 1; }, {"optimizer.mu", "found 1", "expected 0 <= mu < 1"}},
      {[](auto& d) { d.options.kind = 14; },
       {"options.kind", "found 14", "expected 0 (dion) .. 13 (galore)"}},
      {[](auto& d) { d.options.sign = 3; }, {"options.sign", "found 3", "expected 0 (newton_schulz_5) .. 2"}},
      {[](auto& d) { d.options.update_scale = -1; }, {"options.update_scale", "found -1", "expected 0"}},
      {[](auto& d) { d.options.muonbp_period = 0; }, {"optimizer.muonbp_period", "found 0", "at least 1"}},
      {[](auto& d) { d.options.dion2_numerator = 5; }, {"optimizer.dion2_numerator", "found 5", "1 to 4"}},
      {[](auto& d) { d.options.spectra_fraction = 2; }, {"optimizer.spectra_fraction", "found 2", "to 1"}},
      {[](auto& d) { d.options.galore_interval = 0; },
       {"optimizer.galore_interval", "found 0", "at least 1"}},
      {[](auto& d) { d.options.scalar_kind = LOWBAND_DION; },
       {"options.scalar_kind", "found 0", "expected 2 (adamw)"}},
      {[](auto& d) { d.options.dtype = 2; }, {"options.dtype", "found 2", "expected"}},
      {[](auto& d) { d.options.uniform_rank = 5; }, {"matrix", "found 5", "expected"}},
      {[](auto& d) { d.options.profile = LOWBAND_STRUCTURAL; },
       {"parameters[0] matrix.role", "found", "expected"}},
      {[](auto& d) { d.options.profile = LOWBAND_EXPLICIT; }, {"matrix", "found rank 0", "expected 1 to"}},
      {[](auto& d) { d.parameters[1].factor_rank = 1; },
       {"parameters[1] bias.factor_rank", "found 1", "expected 0"}},
      {[](auto& d) { d.parameters[0].name = nullptr; }, {"parameters[0].name", "found nothing", "expected"}},
      {[](auto& d) { d.parameters[1].name = "matrix"; },
       {"parameters[1] matrix.name", "found it again", "expected unique"}},
      {[](auto& d) { d.parameters[0].rows = 0; },
       {"parameters[0] matrix.rows", "found 0", "expected at least 1"}},
      {[](auto& d) { d.parameters[0].role = 11; },
       {"parameters[0] matrix.role", "found 11", "expected 0 (query) .. 10 (norm)"}},
      {[](auto& d) { d.parameters[1].weight = nullptr; },
       {"parameters[1] bias.weight", "found NULL", "expected a pointer"}},
      {[](auto& d) { d.parameters[0].gradient = nullptr; },
       {"parameters[0] matrix.gradient", "found NULL", "expected a pointer"}},
      {[](auto& d) { d.parameters.clear(); }, {"parameter", "expected"}},
      {[](auto& d) { d.options.parameter_bytes = 7; }, {"options.parameter_bytes", "found 7", "expected"}},
      {[](auto& d) {
         d.use_blocks();
         d.blocks[1].lines = 2;
       },
       {"parameters[0] matrix.blocks: found 4 lines in all, expected 6 rows or a divisor of it"}},
      {[](auto& d) {
         d.use_blocks();
         d.parameters[0].blocks_of_columns = 1;
       },
       {"parameters[0] matrix.blocks: found 3 lines in all, expected 4 columns or a divisor"}},
      {[](auto& d) {
         d.use_blocks();
         d.blocks[1].lines = 0;
       },
       {"parameters[0] matrix.blocks[1].lines: found 0, expected at least 1"}},
      {[](auto& d) {
         d.use_blocks();
         d.blocks[1].role = LOWBAND_NORM;
       },
       {"parameters[0] matrix.blocks[1].role: found norm, expected 0 (query) .. 7 (matrix)"}},
      {[](auto& d) {
         d.use_blocks();
         d.blocks[0].role = -1;
       },
       {"parameters[0] matrix.blocks[0].role: found -1, expected 0 (query)"}},
      {[](auto& d) {
         d.use_blocks();
         d.parameters[0].blocks = nullptr;
       },
       {"parameters[0] matrix.blocks: found NULL, expected a pointer"}},
      {[](auto& d) {
         d.use_blocks();
         d.parameters[0].block_count = -1;
       },
       {"parameters[0] matrix.block_count: found -1, expected at least 0"}},
      {[](auto& d) {
         d.use_blocks();
         std::swap(d.parameters[0].blocks, d.parameters[1].blocks);
         std::swap(d.parameters[0].block_count, d.parameters[1].block_count);
       },
       {"parameters[1] bias.blocks: found 2 of a parameter that is no matrix, expected none"}},
      {[](auto& d) {
         d.use_blocks();
         d.blocks[1].factor_rank = 1;
         d.options.kind = LOWBAND_DION;
         d.options.uniform_rank = 1;
       },
       {"parameters[0] matrix.blocks[1].factor_rank: found 1, expected 0 unless"}},
      {[](auto& d) {
         d.use_blocks();
         d.parameters[0].factor_rank = 1;
         d.options.kind = LOWBAND_DION;
         d.options.profile = LOWBAND_EXPLICIT;
       },
       {"parameters[0] matrix.factor_rank: found 1, expected 0 beside blocks"}},
      {[](auto& d) {
         d.use_blocks();
         d.options.kind = LOWBAND_ADAMW;
       },
       {"blocks of matrix: found 2, expected none"}},
  };
  run_c_world(1, [&](lowband_world* world) {
    for (std::size_t i = 0; i < cases.size(); ++i) {
      Description description;
      cases[i].spoil(description);
      lowband_optimizer* optimizer = nullptr;
      EXPECT_EQ(description.create(world, &optimizer), LOWBAND_INVALID_ARGUMENT) << "case " << i;
      EXPECT_EQ(optimizer, nullptr);
      for (const std::string& part : cases[i].message)
        EXPECT_THAT(lowband_last_error(), HasSubstr(part)) << "case " << i;
    }
    // None of them spoiled the world.
    Description description;
    lowband_optimizer* optimizer = nullptr;
    expect_ok(description.create(world, &optimizer));
    lowband_optimizer* second = nullptr;
    EXPECT_EQ(description.create(world, &second), LOWBAND_INVALID_ARGUMENT);
    EXPECT_THAT(lowband_last_error(), HasSubstr("found one with an optimizer"));
    lowband_optimizer_free(optimizer);
  });
}

TEST(PluginErrors, are_those_of_all_processes_when_one_described_something_else) {
  run_c_world(2, [&](lowband_world* world) {
    const int process = lowband_world_process(world);
    lowband_optimizer* optimizer = nullptr;
    Description other;
    if (process == 1) other.parameters[0].cols = 3;
    EXPECT_EQ(other.create(world, &optimizer), LOWBAND_INVALID_ARGUMENT);
    EXPECT_THAT(lowband_last_error(),
                AllOf(HasSubstr("[process 1 of 2]"), HasSubstr("found parameters[0] matrix: matrix, 6 x 3"),
                      HasSubstr("expected, as on process 0, parameters[0] matrix: matrix, 6 x 4")));
    Description longer;
    if (process == 1) longer.parameters.pop_back();
    EXPECT_EQ(longer.create(world, &optimizer), LOWBAND_INVALID_ARGUMENT);
    EXPECT_THAT(lowband_last_error(), HasSubstr("found nothing more"));
    Description rate;
    if (process == 0) rate.options.weight_decay = 0.5;
    EXPECT_EQ(rate.create(world, &optimizer), LOWBAND_INVALID_ARGUMENT);
    EXPECT_THAT(lowband_last_error(), HasSubstr("options.weight_decay: 0.5"));
    Description blocked;
    blocked.use_blocks();
    if (process == 1) std::swap(blocked.blocks[0].lines, blocked.blocks[1].lines);
    EXPECT_EQ(blocked.create(world, &optimizer), LOWBAND_INVALID_ARGUMENT);
    EXPECT_THAT(lowband_last_error(),
                AllOf(HasSubstr("uncut; 1 rows gate, 2 rows up; expected, as on process 0"),
                      HasSubstr("uncut; 2 rows gate, 1 rows up")));
    Description missing;
    if (process == 1) missing.parameters[1].gradient = nullptr;
    EXPECT_EQ(missing.create(world, &optimizer), LOWBAND_INVALID_ARGUMENT);
    EXPECT_THAT(lowband_last_error(), HasSubstr("[process 1 of 2] parameters[1] bias.gradient: found NULL"));
    Description right;
    expect_ok(right.create(world, &optimizer));
    lowband_optimizer_free(optimizer);
  });
}

TEST(PluginErrors, refuse_a_plan_beyond_the_budget) {
  constexpr int64_t kPlan = 4 * (2 * (6 + 4) + 4);
  run_c_world(2, [&](lowband_world* world) {
    lowband_optimizer* optimizer = nullptr;
    Description description;
    description.options.budget_bytes = kPlan - 1;
    EXPECT_EQ(description.create(world, &optimizer), LOWBAND_BUDGET_EXCEEDED);
    EXPECT_THAT(lowband_last_error(), AllOf(HasSubstr("options.budget_bytes: found a plan of 96 bytes"),
                                            HasSubstr("at most 95"), HasSubstr("uniform rank 1 fits")));
    description.options.budget_bytes = kPlan;
    expect_ok(description.create(world, &optimizer));
    lowband_optimizer_free(optimizer);
  });
}

TEST(PluginErrors, of_a_step_leave_the_optimizer_as_it_is) {
  run_c_world(1, [&](lowband_world* world) {
    Description description;
    lowband_optimizer* optimizer = nullptr;
    expect_ok(description.create(world, &optimizer));
    lowband_step_info info;
    lowband_step_info_defaults(&info);
    info.step = -1;
    EXPECT_EQ(lowband_step(optimizer, &info, nullptr), LOWBAND_INVALID_ARGUMENT);
    EXPECT_THAT(lowband_last_error(), HasSubstr("info.step: found -1, expected 0 or more"));
    EXPECT_EQ(lowband_gradient_ready(optimizer, 2), LOWBAND_INVALID_ARGUMENT);
    EXPECT_THAT(lowband_last_error(), HasSubstr("parameter: found 2, expected 0 .. 1"));
    expect_ok(lowband_gradient_ready(optimizer, 1));
    EXPECT_EQ(lowband_gradient_ready(optimizer, 1), LOWBAND_INVALID_ARGUMENT);
    EXPECT_THAT(lowband_last_error(), HasSubstr("found bias after it was announced"));
    EXPECT_EQ(lowband_rebind(optimizer, 1, description.weights.data(), description.gradients.data()),
              LOWBAND_INVALID_ARGUMENT);
    info.step = 0;
    expect_ok(lowband_step(optimizer, &info, nullptr));
    description.gradients[3] = std::numeric_limits<float>::quiet_NaN();
    lowband_step_report report;
    lowband_step_report_defaults(&report);
    info.step = 1;
    expect_ok(lowband_step(optimizer, &info, &report));
    EXPECT_EQ(report.skipped_matrices, 1);
    EXPECT_EQ(report.skipped_other, 0);
    lowband_optimizer_free(optimizer);
  });
}

TEST(PluginErrors, of_one_process_s_step_are_those_of_all) {
  run_c_world(2, [&](lowband_world* world) {
    const int process = lowband_world_process(world);
    Description description;
    lowband_optimizer* optimizer = nullptr;
    expect_ok(description.create(world, &optimizer));
    lowband_step_info right;
    lowband_step_info_defaults(&right);
    right.learning_rate = 0.5;
    const auto refused = [&](auto spoil, std::string_view message) {
      lowband_step_info info = right;
      if (process == 1) spoil(info);
      EXPECT_EQ(lowband_step(optimizer, &info, nullptr), LOWBAND_INVALID_ARGUMENT);
      EXPECT_THAT(lowband_last_error(), HasSubstr(std::string(message)));
    };
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    refused([](auto& info) { info.learning_rate = std::numeric_limits<double>::quiet_NaN(); },
            "[process 1 of 2] info.learning_rate: found nan, expected 0 or more");
    refused([](auto& info) { info.scalar_learning_rate = kInfinity; },
            "[process 1 of 2] info.scalar_learning_rate: found inf, expected 0 or more");
    refused([](auto& info) { info.learning_rate = 0.25; },
            "[process 1 of 2] info.learning_rate: found 0.25; expected, as on process 0, 0.5");
    refused([](auto& info) { info.step = 7; }, "[process 1 of 2] info.step: found 7; expected");
    refused([](auto& info) { info.diagnose = 1; }, "[process 1 of 2] info.diagnose: found 1; expected");
    EXPECT_EQ(description.weights, Description().weights);
    expect_ok(lowband_step(optimizer, &right, nullptr));
    lowband_optimizer_free(optimizer);
  });
}

TEST(PluginErrors, reach_the_others_when_a_process_gives_up) {
  std::latch created(2);
  run_c_world(2, [&](lowband_world* world) {
    Description description;
    lowband_optimizer* optimizer = nullptr;
    expect_ok(description.create(world, &optimizer));
    created.arrive_and_wait();
    if (lowband_world_process(world) == 0) {
      expect_ok(lowband_world_abort(world, "out of patience"));
    } else {
      lowband_step_info info;
      lowband_step_info_defaults(&info);
      EXPECT_EQ(lowband_step(optimizer, &info, nullptr), LOWBAND_PEER_FAILED);
      EXPECT_THAT(lowband_last_error(), HasSubstr("out of patience"));
    }
    lowband_optimizer_free(optimizer);
  });
}

TEST(PluginErrors, of_meetings_come_before_anybody_waits) {
  const auto refuses = [](void*, const void*, void*, int64_t) { return 5; };
  lowband_world* world = nullptr;
  EXPECT_EQ(lowband_world_from_all_gather(0, 2, refuses, nullptr, &world), LOWBAND_INTERNAL);
  EXPECT_THAT(lowband_last_error(), HasSubstr("all_gather: found 5"));
  EXPECT_EQ(lowband_world_from_all_gather(2, 2, refuses, nullptr, &world), LOWBAND_INVALID_ARGUMENT);
  EXPECT_THAT(lowband_last_error(), HasSubstr("process: found 2, expected 0 .. 1"));
  lowband_meeting meeting;
  lowband_meeting_defaults(&meeting);
  meeting.address = "localhost";
  meeting.port = 70000;
  EXPECT_EQ(lowband_world_from_tcp(&meeting, &world), LOWBAND_INVALID_ARGUMENT);
  EXPECT_THAT(lowband_last_error(), HasSubstr("meeting.port: found 70000, expected 1 .. 65535"));
  EXPECT_EQ(world, nullptr);
}

}  // namespace
}  // namespace lowband
