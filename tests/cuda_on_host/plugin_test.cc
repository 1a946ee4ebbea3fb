// The C interface with weights and gradients in device memory, against the same on the host.
#include "collectives/local/local_world.h"
#include "optimizers/sharded_optimizer.h"
#include "plugin/lowband.h"
#include "runtime/buffer.h"
#include "runtime/copy.h"
#include "runtime/cuda/stream.h"
#include "runtime/device.h"
#include "tests/cuda_on_host/waits.h"
#include "tests/plugin/c_world.h"

#include <array>
#include <cmath>
#include <cstddef>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using ::testing::AllOf;
using testing::COptimizer;
using testing::expect_ok;
using ::testing::HasSubstr;
using testing::payload;
using testing::run_c_world;

struct Shape {
  const char* name;
  lowband_role role;
  Index rows, cols;
};
constexpr std::array<Shape, 3> kShapes{
    {{"wq", LOWBAND_QUERY, 17, 11}, {"embed", LOWBAND_EMBEDDING, 13, 5}, {"norm", LOWBAND_NORM, 1, 23}}};
constexpr Index kElements = 17 * 11 + 13 * 5 + 23;

float noise(Index seed, Index i) {
  return static_cast<float>(
      std::sin(0.37 * static_cast<double>(i) + 1.3 * static_cast<double>(seed * seed + 1)));
}

/// Weights and gradients of kShapes on one process.
struct Memory {
  std::unique_ptr<Device> device;
  Buffer<float> weights, gradients;
  explicit Memory(bool on_device)
      : device(on_device ? open_device() : nullptr),
        weights(kElements, device.get()),
        gradients(kElements, device.get()) {
    write(0, weights);
  }
  void write(Index seed, Buffer<float>& to) {
    Buffer<float> values(kElements);
    for (Index i = 0; i < kElements; ++i) values[i] = noise(seed, i);
    copy<float>(values.line(), to.line());
  }
  std::vector<float> read_weights() {
    Buffer<float> values(kElements);
    copy<float>(weights.line(), values.line());
    return {values.data(), values.data() + kElements};
  }
  std::vector<lowband_parameter> described() {
    std::vector<lowband_parameter> parameters;
    Index offset = 0;
    for (const auto& [name, role, rows, cols] : kShapes) {
      parameters.push_back({name, role, LOWBAND_UNCUT, rows, cols, weights.matrix(offset, rows, cols).data,
                            gradients.matrix(offset, rows, cols).data, 0, nullptr, 0, 0});
      offset += rows * cols;
    }
    return parameters;
  }
};

lowband_options options_of(lowband_optimizer_kind kind, const Memory& memory) {
  lowband_options options;
  lowband_options_defaults(&options);
  options.kind = kind;
  options.uniform_rank = kind == LOWBAND_DION || kind == LOWBAND_POWER_SGD ? 3 : 0;
  options.clip_norm = 1;
  options.device = memory.device ? 0 : -1;
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

void take_step(const COptimizer& optimizer, Index step, lowband_world* world, Memory& memory) {
  memory.write(1 + 10 * step + lowband_world_process(world), memory.gradients);
  const lowband_step_info info = step_info(step);
  expect_ok(lowband_step(optimizer.handle, &info, nullptr));
}

/// Each piece of the state, by name.
std::map<std::string, MatrixView<float>> state_of(const COptimizer& optimizer, Device* device) {
  std::map<std::string, MatrixView<float>> pieces;
  for (Index i = 0; i < lowband_state_count(optimizer.handle); ++i) {
    lowband_state_piece piece;
    lowband_state_piece_defaults(&piece);
    expect_ok(lowband_state_at(optimizer.handle, i, &piece));
    EXPECT_EQ(piece.device, device != nullptr && device->holds(piece.data) ? 0 : -1) << piece.name;
    pieces[piece.name] = {static_cast<float*>(piece.data), piece.rows, piece.cols, piece.row_stride,
                          piece.device == 0 ? device : nullptr};
  }
  return pieces;
}

constexpr Index kSteps = 3;

/// Weights of process 0 after kSteps, and what it sent in the last one.
struct Outcome {
  std::vector<float> weights;
  Index factor_bytes = 0, dense_bytes = 0;
};
Outcome trained(lowband_optimizer_kind kind, bool on_device) {
  Outcome outcome;
  std::mutex mutex;
  run_c_world(2, [&](lowband_world* world) {
    Memory memory(on_device);
    const COptimizer optimizer(world, memory.described(), options_of(kind, memory));
    for (Index step = 0; step < kSteps; ++step) take_step(optimizer, step, world, memory);
    const std::vector<float> weights = memory.read_weights();
    const std::lock_guard lock(mutex);
    if (lowband_world_process(world) == 0) {
      outcome = {weights, payload(optimizer.handle, LOWBAND_FACTOR),
                 payload(optimizer.handle, LOWBAND_DENSE)};
    } else {
      outcome.weights = outcome.weights.empty() ? weights : outcome.weights;
    }
  });
  return outcome;
}

// Float sums of at most 23 terms in two orders differ by 23 u of their terms; the factors of Dion amplify
// that by the condition number of B Q, here below 100; steps add up.
constexpr double kTolerance = 23 * 0x1p-24 * 100 * static_cast<double>(kSteps);

TEST(PluginOnDevice, TrainsAsOnTheHostAndSendsAsMuch) {
  for (const lowband_optimizer_kind kind : {LOWBAND_DION, LOWBAND_POWER_SGD, LOWBAND_MUON, LOWBAND_ADAMW}) {
    SCOPED_TRACE(kind);
    const Outcome host = trained(kind, false), device = trained(kind, true);
    EXPECT_EQ(device.factor_bytes, host.factor_bytes);
    EXPECT_EQ(device.dense_bytes, host.dense_bytes);
    for (std::size_t i = 0; i < host.weights.size(); ++i)
      ASSERT_NEAR(device.weights[i], host.weights[i], kTolerance) << i;
  }
}

TEST(PluginOnDevice, StateGoesFromDeviceToHostAndBack) {
  run_c_world(1, [](lowband_world* world) {
    std::vector<std::vector<float>> ends;
    for (const bool changes_place : {false, true}) {
      Buffer<float> weights(kElements);
      std::map<std::string, std::vector<float>> saved;
      for (Index step = 0; step < 4;
           ++step) {  // a new optimizer for every step, which goes on with the last state
        Memory memory(!changes_place || step % 2 == 0);
        const COptimizer optimizer(world, memory.described(), options_of(LOWBAND_DION, memory));
        const auto state = state_of(optimizer, memory.device.get());
        EXPECT_EQ(state.at("wq.M").device, memory.device.get());
        if (step > 0) {
          copy<float>(weights.line(), memory.weights.line());
          for (const auto& [name, piece] : state)
            copy<float>(MatrixView<const float>(saved.at(name).data(), piece.rows, piece.cols), piece);
        }
        take_step(optimizer, step, world, memory);
        for (const auto& [name, piece] : state) {
          saved[name].resize(static_cast<std::size_t>(piece.elements()));
          copy<float>(piece, MatrixView<float>(saved[name].data(), piece.rows, piece.cols));
        }
        copy<float>(memory.weights.line(), weights.line());
      }
      ends.emplace_back(weights.data(), weights.data() + kElements);
    }
    for (std::size_t i = 0; i < ends[0].size(); ++i) ASSERT_NEAR(ends[1][i], ends[0][i], kTolerance) << i;
  });
}

// Of one process: others would have to be waited for.
TEST(PluginOnDevice, WaitsForNothingButTheReportThatIsAskedFor) {
  run_c_world(1, [&](lowband_world* world) {
    Memory memory(true);
    const COptimizer optimizer(world, memory.described(), options_of(LOWBAND_ADAMW, memory));
    lowband_step_report report{};
    lowband_step_report_defaults(&report);
    EXPECT_EQ(lowband_last_report(optimizer.handle, &report), LOWBAND_INVALID_ARGUMENT);
    EXPECT_THAT(lowband_last_error(), ::testing::HasSubstr("found no step, expected one before it"));
    for (int step = 0; step < 3; ++step) {
      memory.write(1 + step, memory.gradients);
      const lowband_step_info info = step_info(step);
      const long before = cuda_on_host::host_waits();
      expect_ok(lowband_step(optimizer.handle, &info, nullptr));
      EXPECT_EQ(cuda_on_host::host_waits(), before);
    }
    const long before = cuda_on_host::host_waits();
    expect_ok(lowband_last_report(optimizer.handle, &report));
    EXPECT_GT(cuda_on_host::host_waits(), before);
    EXPECT_GT(report.gradient_norm, 0);
    lowband_step_report again = report;
    expect_ok(lowband_last_report(optimizer.handle, &again));
    EXPECT_EQ(again.gradient_norm, report.gradient_norm);
    const lowband_step_info info = step_info(3);
    expect_ok(lowband_step(optimizer.handle, &info, &again));
    EXPECT_NE(again.gradient_norm, 0);
  });
}

TEST(PluginOnDevice, BeginsAfterTheStreamOfTheProgramAndThatGoesOnAfterIt) {
  run_c_world(1, [](lowband_world* world) {
    Memory memory(true);
    const COptimizer optimizer(world, memory.described(), options_of(LOWBAND_ADAMW, memory));
    lowband_step_info info = step_info(0);
    const CudaStream program;
    info.stream = program.handle();
    cuda_on_host::log_stream_order(true);
    expect_ok(lowband_step(optimizer.handle, &info, nullptr));
    const std::vector<cuda_on_host::StreamOrder> order = cuda_on_host::log_stream_order(false);
    ASSERT_EQ(order.size(), 2U);
    EXPECT_EQ(order[0].earlier, program.handle());
    EXPECT_EQ(order[1].later, program.handle());
    EXPECT_EQ(order[0].later, order[1].earlier);
    EXPECT_NE(order[0].later, order[0].earlier);
  });
}

TEST(PluginOnDevice, TakesTheStepInfoOfAnEarlierVersion) {
  run_c_world(1, [](lowband_world* world) {
    Memory memory(true);
    const COptimizer optimizer(world, memory.described(), options_of(LOWBAND_ADAMW, memory));
    lowband_step_info info = step_info(0);
    info.struct_bytes = offsetof(lowband_step_info, stream);
    info.stream = &info;
    cuda_on_host::log_stream_order(true);
    expect_ok(lowband_step(optimizer.handle, &info, nullptr));
    EXPECT_EQ(cuda_on_host::log_stream_order(false)[0].earlier, nullptr);
  });
}

TEST(PluginOnDevice, RefusesByName) {
  run_c_world(1, [](lowband_world* world) {
    Memory memory(true), on_host(false);
    const auto refused = [&](Memory& used, auto spoil, const std::vector<std::string>& message) {
      lowband_options options = options_of(LOWBAND_DION, memory);
      std::vector<lowband_parameter> parameters = used.described();
      spoil(options, parameters);
      lowband_optimizer* optimizer = nullptr;
      EXPECT_EQ(
          lowband_optimizer_create(world, parameters.data(), std::ssize(parameters), &options, &optimizer),
          LOWBAND_INVALID_ARGUMENT);
      for (const std::string& part : message) EXPECT_THAT(lowband_last_error(), HasSubstr(part));
    };
    const auto as_it_is = [](auto&, auto&) {};
    refused(memory, [](auto& o, auto&) { o.device = 1; },
            {"options.device: found 1", "there is device 0 alone"});
    refused(memory, [](auto& o, auto&) { o.device = -2; },
            {"options.device: found -2", "or -1 for the host"});
    refused(memory, [](auto& o, auto&) { o.dtype = LOWBAND_F64; },
            {"options.dtype: found float64 with options.device 0", "expected float32"});
    refused(memory, [](auto& o, auto&) { o.overlap = 1; }, {"options.overlap: found 1", "expected 0"});
    refused(on_host, as_it_is, {"wq", "weight: found an address of other memory", "expected one of cuda:0"});
    refused(memory, [&](auto&, auto& p) { p[1].gradient = on_host.gradients.data(); },
            {"embed", "gradient: found an address of other memory", "expected one of cuda:0"});

    const COptimizer optimizer(world, memory.described(), options_of(LOWBAND_DION, memory));
    EXPECT_EQ(lowband_rebind(optimizer.handle, 0, memory.weights.data(), on_host.gradients.data()),
              LOWBAND_INVALID_ARGUMENT);
    EXPECT_THAT(lowband_last_error(), AllOf(HasSubstr("gradient"), HasSubstr("expected one of cuda:0")));
  });
}

TEST(PluginOnDevice, AllProcessesOrNone) {
  run_c_world(2, [](lowband_world* world) {
    Memory memory(lowband_world_process(world) == 0);
    const lowband_options options = options_of(LOWBAND_DION, memory);
    const std::vector<lowband_parameter> parameters = memory.described();
    lowband_optimizer* optimizer = nullptr;
    EXPECT_EQ(
        lowband_optimizer_create(world, parameters.data(), std::ssize(parameters), &options, &optimizer),
        LOWBAND_INVALID_ARGUMENT);
    EXPECT_THAT(lowband_last_error(), AllOf(HasSubstr("options.device"), HasSubstr("a CUDA device")));
  });
}

}  // namespace
}  // namespace lowband
