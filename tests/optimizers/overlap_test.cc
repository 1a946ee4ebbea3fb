// The communication thread, and that it changes nothing but when things happen.

#include "collectives/local/local_world.h"
#include "optimizers/communication_thread.h"
#include "world_run.h"

#include <atomic>
#include <cstring>
#include <future>
#include <numeric>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using namespace test;

// ---- The thread

TEST(CommunicationThread, RunsTasksInOrderOnOneOtherThread) {
  CommunicationThread thread;
  std::vector<int> order;  // not guarded: tasks run one after the other
  std::vector<std::thread::id> ids;
  for (int k = 0; k < 100; ++k) {
    EXPECT_EQ(thread.submit([&, k] {
      order.push_back(k);
      ids.push_back(std::this_thread::get_id());
    }),
              k + 1);
  }
  thread.wait(100);
  std::vector<int> expected(100);
  std::iota(expected.begin(), expected.end(), 0);
  EXPECT_EQ(order, expected);
  EXPECT_EQ(std::ranges::count(ids, thread.id()), 100);
  EXPECT_NE(thread.id(), std::this_thread::get_id());
}

TEST(CommunicationThread, RunsBesideItsOwner) {
  CommunicationThread thread;
  std::promise<void> go;
  std::atomic<bool> ran = false;
  const Index task = thread.submit([&] {
    go.get_future().wait();  // would never return if `submit` ran the task
    ran = true;
  });
  go.set_value();
  thread.wait(task);
  EXPECT_TRUE(ran);
}

TEST(CommunicationThread, CarriesTheFirstFailureToEveryWaitAndRunsNothingElse) {
  CommunicationThread thread;
  std::atomic<int> ran = 0;
  thread.submit([&] { ++ran; });
  const Index bad = thread.submit([] { throw PeerFailed("process 3 is gone"); });
  thread.submit([&] { ++ran; });
  for (int k = 0; k < 3; ++k) {
    try {
      thread.wait(bad);
      ADD_FAILURE() << "nothing thrown";
    } catch (const PeerFailed& failure) {
      EXPECT_STREQ(failure.what(), "process 3 is gone");
    }
  }
  EXPECT_THROW(thread.wait(thread.submit([&] { ++ran; })), PeerFailed);
  EXPECT_EQ(ran, 1);
}

TEST(CommunicationThread, DropsWhatHasNotBegunWhenItEnds) {
  std::atomic<int> ran = 0;
  {
    CommunicationThread thread;
    for (int k = 0; k < 100'000; ++k) {
      thread.submit([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        ++ran;
      });
    }
  }
  EXPECT_LT(ran, 100'000);
}

// ---- The optimizer with it

RunPlan plan_for(const MeshShape& mesh, OptimizerKind kind, double clip_norm) {
  RunPlan plan;
  plan.mesh = mesh;
  plan.parameters = assorted_parameters();
  plan.options = {.kind = kind, .weight_decay = 0.1, .clip_norm = clip_norm, .seed = 3};
  plan.gradient = noisy_gradient;
  plan.shares = 12;
  plan.steps = 5;
  return plan;
}

void expect_same_bits(const std::vector<Snapshot>& found, const std::vector<Snapshot>& expected) {
  const auto same = [](const Dense& x, const Dense& y) {
    return std::memcmp(x.a.data(), y.a.data(), x.a.size() * sizeof(double)) == 0;
  };
  for (std::size_t step = 0; step < expected.size(); ++step) {
    for (const auto& [name, weight] : expected[step].weights)
      EXPECT_TRUE(same(found[step].weights.at(name), weight)) << name << " at step " << step;
    for (std::size_t replica = 0; replica < expected[step].states.size(); ++replica) {
      for (const auto& [name, state] : expected[step].states[replica])
        EXPECT_TRUE(same(found[step].states[replica].at(name), state)) << name << " at step " << step;
    }
    EXPECT_EQ(found[step].factor_bytes, expected[step].factor_bytes);
    EXPECT_EQ(found[step].dense_bytes, expected[step].dense_bytes);
    EXPECT_EQ(found[step].factor_bytes, found[step].planned_factor_bytes);
    EXPECT_EQ(found[step].dense_bytes, found[step].planned_dense_bytes);
  }
}

class OverlapOn : public testing::TestWithParam<MeshShape> {};

// Local groups sum element by element, so neither the thread nor the buckets can matter.
TEST_P(OverlapOn, ChangesNoBit) {
  struct Case {
    OptimizerKind kind;
    double clip_norm;
    ExchangeChoice exchange;
  };
  const Case cases[] = {{OptimizerKind::kDion, 0, ExchangeChoice::kFactors},
                        {OptimizerKind::kDion, 3, ExchangeChoice::kAuto},
                        {OptimizerKind::kPowerSgd, 3, ExchangeChoice::kAuto},
                        {OptimizerKind::kAdamW, 3, ExchangeChoice::kFactors},
                        {OptimizerKind::kMuon, 3, ExchangeChoice::kFactors}};
  for (const auto& [kind, clip_norm, exchange] : cases) {
    RunPlan plan = plan_for(GetParam(), kind, clip_norm);
    plan.options.exchange = exchange;
    const auto expected = run<float>(plan);
    plan.options.overlap = true;
    for (const Index bucket_elements : {Index{1}, Index{500}, Index{1} << 20}) {
      plan.options.bucket_elements = bucket_elements;
      plan.announced = {9, 8, 7, 6, 5, 4, 3, 2, 1, 0};
      expect_same_bits(run<float>(plan), expected);
      plan.announced = {0, 3, 9, 7, 8, 2};  // out of order, and not all of them
      expect_same_bits(run<float>(plan), expected);
      plan.announced = {};
      expect_same_bits(run<float>(plan), expected);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Meshes, OverlapOn,
                         testing::Values(MeshShape{1, 1, 1}, MeshShape{2, 1, 1}, MeshShape{3, 1, 1},
                                         MeshShape{1, 2, 2}, MeshShape{2, 2, 1}, MeshShape{2, 1, 2}));

/// Two replicas with one matrix and overlap, for what needs more than `run`.
struct SmallWorld {
  explicit SmallWorld(Communicator& world, const OptimizerOptions& options)
      : mesh(world, {.replica = world.size()}),
        storage(4 * 12 * 8),
        parameters{{info("a"), storage.matrix(0, 12, 8), storage.matrix(96, 12, 8)},
                   {info("b"), storage.matrix(192, 12, 8), storage.matrix(288, 12, 8)}},
        optimizer(mesh, parameters,
                  {.name = "test", .matrices = {info("a"), info("b")}, .factor_ranks = {2, 2}}, options) {
    std::ranges::fill(storage.span(), 1.0f);
  }
  static ParameterInfo info(const char* name) {
    return {.name = name, .role = Role::kQuery, .rows = 12, .cols = 8, .cut = TensorCut::kRows};
  }
  ProcessMesh mesh;
  Buffer<float> storage;
  std::vector<Parameter<float>> parameters;
  ShardedOptimizer<float> optimizer;
};

const OptimizerOptions kOverlapped{.clip_norm = 0, .overlap = true, .bucket_elements = 1};

TEST(Overlap, StartsBeforeTheStep) {
  run_world(2, [](Communicator& world) {
    SmallWorld small(world, kOverlapped);
    world.ledger().begin_step();
    small.optimizer.gradient_ready(1);
    // The exchange of b ends without `step`, and that of a has not begun.
    const Index bytes = 2 * (12 + 8) * 4;
    const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (world.ledger().step_sum("replica", Purpose::kFactor).payload_bytes < bytes) {
      ASSERT_LT(std::chrono::steady_clock::now(), give_up);
      std::this_thread::yield();
    }
    EXPECT_EQ(world.ledger().step_sum("replica", Purpose::kFactor).payload_bytes, bytes);
    small.optimizer.gradient_ready(0);
    small.optimizer.step({.learning_rate = 0.1});
    EXPECT_EQ(world.ledger().step_sum("replica", Purpose::kFactor).payload_bytes, 2 * bytes);
  });
}

TEST(Overlap, WaitsForEarlierBuckets) {
  run_world(2, [](Communicator& world) {
    SmallWorld small(world, kOverlapped);
    world.ledger().begin_step();
    small.optimizer.gradient_ready(0);
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    EXPECT_EQ(world.ledger().step_sum().calls, 0);
    small.optimizer.step({.learning_rate = 0.1});
  });
}

TEST(Overlap, ReportsWhatTheCallerWaitedFor) {
  run_world(2, [](Communicator& world) {
    for (const bool overlap : {true, false}) {
      OptimizerOptions options = kOverlapped;
      options.overlap = overlap;
      SmallWorld small(world, options);
      const StepReport report = small.optimizer.step({.learning_rate = 0.1});
      EXPECT_GT(report.communication_seconds, 0);
      EXPECT_GT(report.exposed_seconds, 0);
      EXPECT_LE(report.exposed_seconds, report.seconds);
      EXPECT_LE(report.exposed_seconds, report.communication_seconds);
      if (!overlap) {
        EXPECT_EQ(report.exposed_seconds, report.communication_seconds);
      }
      // Nothing is carried over to another step.
      double sum = 0;
      const auto begin = std::chrono::steady_clock::now();
      for (int step = 1; step < 4; ++step) {
        small.optimizer.gradient_ready(1);
        small.optimizer.gradient_ready(0);
        sum += small.optimizer.step({.step = step, .learning_rate = 0.1}).get().communication_seconds;
      }
      // of two threads
      EXPECT_LE(sum, 2 * std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    }
  });
}

TEST(Overlap, RefusesAParameterTwiceOrNotThere) {
  run_world(2, [](Communicator& world) {
    SmallWorld small(world, kOverlapped);
    small.optimizer.gradient_ready(1);
    EXPECT_THROW(small.optimizer.gradient_ready(1), InvalidArgument);
    EXPECT_THROW(small.optimizer.gradient_ready(2), InvalidArgument);
    EXPECT_THROW(small.optimizer.gradient_ready(-1), InvalidArgument);
    small.optimizer.step({.learning_rate = 0.1});
    small.optimizer.gradient_ready(1);  // another step
    small.optimizer.step({.learning_rate = 0.1});
  });
}

// A process that never comes: the others' `step` throws what their threads met, and nobody hangs.
TEST(Overlap, AFailedPeerReachesTheCallerOfStep) {
  const LocalWorldOptions options{.deadline = std::chrono::milliseconds(300),
                                  .total_deadline = std::chrono::milliseconds(20'000)};
  const auto begin = std::chrono::steady_clock::now();
  std::atomic<int> failed = 0;
  run_world(
      3,
      [&](Communicator& world) {
        SmallWorld small(world, kOverlapped);
        if (world.process() == 1) {
          std::this_thread::sleep_for(std::chrono::milliseconds(900));
          return;
        }
        small.optimizer.gradient_ready(1);
        try {
          small.optimizer.step({.learning_rate = 0.1});
        } catch (const PeerFailed&) {
          ++failed;
        }
        EXPECT_THROW(small.optimizer.step({.learning_rate = 0.1}), PeerFailed);  // it stays broken
      },
      options);
  EXPECT_EQ(failed, 2);
  EXPECT_LE(std::chrono::steady_clock::now() - begin, std::chrono::seconds(10));
}

// A caller that fails while its thread is in a collective takes the thread with it, and the peers: nobody
// waits for the deadline.
TEST(Overlap, AFailedCallerEndsWithItsThreadAndItsPeers) {
  using Clock = std::chrono::steady_clock;
  const LocalWorldOptions options{.deadline = std::chrono::seconds(30),
                                  .total_deadline = std::chrono::seconds(60)};
  std::promise<void> gave_up;
  const std::shared_future<void> given_up = gave_up.get_future().share();
  run_world(
      3,
      [&](Communicator& world) {
        auto small = std::make_unique<SmallWorld>(world, kOverlapped);
        if (world.process() == 1) {
          small->optimizer.gradient_ready(1);
          std::this_thread::sleep_for(std::chrono::milliseconds(50));  // its thread waits for the others
          const Clock::time_point begin = Clock::now();
          EXPECT_THROW(
              {
                const auto unwound = std::move(small);
                throw IoError("the disk is gone");
              },
              IoError);
          EXPECT_LT(Clock::now() - begin, std::chrono::seconds(1));
          gave_up.set_value();
          return;
        }
        given_up.wait();
        const Clock::time_point begin = Clock::now();
        try {
          small->optimizer.step({.learning_rate = 0.1});
          ADD_FAILURE() << "nothing thrown";
        } catch (const PeerFailed& failure) {
          EXPECT_THAT(failure.what(), testing::HasSubstr("gave up in the middle of a step"));
        }
        EXPECT_LT(Clock::now() - begin, std::chrono::seconds(1));
      },
      options);
}

}  // namespace
}  // namespace lowband
