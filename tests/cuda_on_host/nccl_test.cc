// The group over NCCL as it is, between threads, against the stand-ins for NCCL and CUDA.
#include "collectives/local/local_world.h"
#include "collectives/nccl/nccl_group.h"
#include "collectives/nccl/nccl_status.h"
#include "runtime/copy.h"
#include "runtime/cuda/buffer.h"
#include "runtime/cuda/stream_device.h"
#include "runtime/passes.h"
#include "tests/collectives/communicator_cases.h"
#include "tests/cuda_on_host/nccl_faults.h"
#include "tests/cuda_on_host/small_training.h"
#include "tests/cuda_on_host/waits.h"
#include "tests/optimizers/world_run.h"

#include <chrono>
#include <functional>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <tuple>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using cuda_on_host::living_nccl_communicators;
using cuda_on_host::nccl_counts;
using cuda_on_host::NcclFault;
using cuda_on_host::set_nccl_fault;
using std::chrono::milliseconds;
using testing::AllOf;
using testing::HasSubstr;

void run_over_nccl(int processes, const std::function<void(Communicator&)>& body) {
  run_world(processes, [&](Communicator& host) { body(*make_nccl_group(host, 0)); });
}

class NcclOnHost : public testing::TestWithParam<std::tuple<CommunicatorCase, int>> {};

TEST_P(NcclOnHost, Conforms) {
  const auto& [conformance, processes] = GetParam();
  if (conformance.name == std::string_view("a_silent_process_is_named_at_the_deadline") && processes > 2)
    GTEST_SKIP()
        << "processes come to a call at other times after NCCL has connected them: who comes first may "
           "name one that itself waits for the silent one";
  run_over_nccl(processes, conformance.body);
  EXPECT_EQ(living_nccl_communicators(), 0);
}

INSTANTIATE_TEST_SUITE_P(
    All, NcclOnHost,
    testing::Combine(testing::ValuesIn(communicator_cases().begin(), communicator_cases().end()),
                     testing::Values(1, 2, 3, 4)),
    [](const auto& test) { return cat(std::get<0>(test.param).name, "_on_", std::get<1>(test.param)); });

// ---- spans in device memory

class DeviceSpans : public testing::TestWithParam<std::tuple<int, Determinism>> {};

// Every operation, with numbers whose sums are exact, on a part of a buffer.
TEST_P(DeviceSpans, GoInAndOutAsTheyAre) {
  const auto& [processes, level] = GetParam();
  run_over_nccl(processes, [level = level](Communicator& world) {
    const auto group = world.split(0, 0, "device");
    group->set_determinism(level);
    const CudaStream stream;
    const int n = group->size();
    const auto at = [](Index i) { return static_cast<std::size_t>(i); };
    std::vector<Index> uneven(at(n), 10), even(at(n), 12);
    uneven.back() = 17;
    const auto value = [](int process, Index e) { return static_cast<float>((process + 1) * (e + 1)); };
    const auto sum = [&](Index e) { return static_cast<float>(n * (n + 1) / 2 * (e + 1)); };
    for (const std::vector<Index>& counts : {uneven, even}) {
      const Index total = std::accumulate(counts.begin(), counts.end(), Index{0});
      const Index own = counts[at(group->process())];
      const Index begin = std::accumulate(counts.begin(), counts.begin() + group->process(), Index{0});
      std::vector<float> mine(at(total)), found(at(total)), expected(at(total));
      for (Index e = 0; e < total; ++e) mine[at(e)] = value(group->process(), e);
      for (Index e = 0; e < total; ++e) expected[at(e)] = sum(e);
      DeviceBuffer<float> whole(total, stream), part(own, stream), gathered(total, stream);
      const auto span = [](DeviceBuffer<float>& buffer) {
        return std::span(buffer.data(), static_cast<std::size_t>(buffer.size()));
      };
      const auto reset = [&] {
        whole.fill_from(mine);
        stream.synchronize();
      };

      reset();
      group->all_reduce<float>(span(whole), Reduction::kSum, {Purpose::kDense});
      whole.copy_to(found);
      EXPECT_EQ(found, expected);

      reset();
      group->reduce_scatter<float>(span(whole), span(part), counts, Reduction::kSum, {Purpose::kDense});
      whole.copy_to(found);
      EXPECT_EQ(found, mine) << "the argument was changed";
      group->all_gather<float>(span(part), span(gathered), counts, {Purpose::kDense});
      gathered.copy_to(found);
      EXPECT_EQ(found, expected);

      // In place: the part lies where it belongs in the whole.
      const auto place = span(whole).subspan(at(begin), at(own));
      group->reduce_scatter<float>(span(whole), place, counts, Reduction::kSum, {Purpose::kDense});
      group->all_gather<float>(place, span(whole), counts, {Purpose::kDense});
      whole.copy_to(found);
      EXPECT_EQ(found, expected);

      reset();
      group->broadcast<float>(span(whole), n - 1, {Purpose::kDense});
      whole.copy_to(found);
      for (Index e = 0; e < total; ++e) ASSERT_EQ(found[at(e)], value(n - 1, e)) << "element " << e;

      // From p to q go q + 1 elements; one side on the device, the other on the host.
      std::vector<Index> pairs;
      for (int p = 0; p < n; ++p) {
        for (int q = 0; q < n; ++q) pairs.push_back(q + 1);
      }
      DeviceBuffer<float> out(n * (n + 1) / 2, stream);
      out.fill_from(std::span(mine).first(at(out.size())));
      stream.synchronize();
      std::vector<float> in(at(Index{n} * (group->process() + 1)));
      group->all_to_all<float>(span(out), in, pairs, {Purpose::kDense});
      const Index first = Index{group->process()} * (group->process() + 1) / 2;
      for (int p = 0; p < n; ++p) {
        for (Index e = 0; e <= group->process(); ++e)
          ASSERT_EQ(in[at(p * Index{group->process() + 1} + e)], value(p, first + e)) << "from " << p;
      }
    }
  });
}

INSTANTIATE_TEST_SUITE_P(All, DeviceSpans,
                         testing::Combine(testing::Values(1, 2, 3, 4),
                                          testing::Values(Determinism::kExact, Determinism::kFast)),
                         [](const auto& test) {
                           return cat(determinism_name(std::get<1>(test.param)), "_on_",
                                      std::get<0>(test.param));
                         });

TEST(NcclOnHost, SaysWhatItIs) {
  EXPECT_TRUE(nccl_status().built_in);
  EXPECT_EQ(nccl_status().version, "2.28.9");
  run_over_nccl(1, [](Communicator& world) { EXPECT_EQ(world.backend(), "nccl"); });
}

// ---- what goes wrong after all have come

std::string failure_of(Communicator& group, Index elements) {
  std::vector<float> data(static_cast<std::size_t>(elements), 1);
  try {
    group.all_reduce<float>(data, Reduction::kSum, {Purpose::kDense});
  } catch (const PeerFailed& failure) {
    EXPECT_EQ(data.front(), 1) << "half of a result";
    return failure.what();
  }
  return "";
}

// The stream waits for a transfer that never ends; nobody may wait longer than the deadline, and the
// communicator is aborted, so that the stream runs dry.
TEST(NcclFaults, ATransferThatNeverEndsMeetsTheDeadline) {
  for (const Determinism level : {Determinism::kExact, Determinism::kFast}) {
    const long aborted = nccl_counts().aborted;
    run_over_nccl(3, [&](Communicator& world) {
      const auto group = world.split(0, 0, "replica");
      group->set_determinism(level);
      group->set_deadline(milliseconds(300));
      set_nccl_fault(world.process() == 1 ? NcclFault::kNeverStarts : NcclFault::kNone);
      const auto begin = std::chrono::steady_clock::now();
      const std::string text = failure_of(*group, 1000);
      EXPECT_LT(std::chrono::steady_clock::now() - begin, milliseconds(5000));
      // Who is first tells the others.
      EXPECT_THAT(text, testing::AnyOf(AllOf(HasSubstr("all_reduce(sum, f32, 1000 elements, dense) on axis "
                                                       "replica"),
                                             HasSubstr("did not end within 300 ms")),
                                       HasSubstr("aborted axis replica")));
      EXPECT_EQ(failure_of(*group, 1000), text) << "a broken group must stay broken";
      set_nccl_fault(NcclFault::kNone);
      world.barrier();
      EXPECT_EQ(failure_of(world, 10), "");  // other groups go on
    });
    EXPECT_EQ(nccl_counts().aborted, aborted + 3);
    EXPECT_EQ(living_nccl_communicators(), 0);
  }
}

TEST(NcclFaults, AnAsynchronousErrorEndsTheCall) {
  run_over_nccl(2, [](Communicator& world) {
    const auto group = world.split(0, 0, "replica");
    group->set_deadline(milliseconds(1000));
    if (world.process() == 1) set_nccl_fault(NcclFault::kRemoteError);
    const auto begin = std::chrono::steady_clock::now();
    const std::string text = failure_of(*group, 1000);
    if (world.process() == 1) {
      EXPECT_LT(std::chrono::steady_clock::now() - begin, group->deadline() / 2);
      EXPECT_THAT(text, HasSubstr("code 6, remote process exited"));
      EXPECT_THAT(text, HasSubstr("connection closed by remote peer"));
    } else {
      EXPECT_NE(text, "");
    }
    set_nccl_fault(NcclFault::kNone);
    world.barrier();
  });
  EXPECT_EQ(living_nccl_communicators(), 0);
}

// Another thread gives up while the transfer is under way, on a group whose other process waits for it.
TEST(NcclFaults, AnAbortEndsATransfer) {
  run_over_nccl(2, [](Communicator& world) {
    const auto group = world.split(0, 0, "replica");
    set_nccl_fault(NcclFault::kNeverStarts);
    const auto begin = std::chrono::steady_clock::now();
    std::thread other([&] {
      std::this_thread::sleep_for(milliseconds(100));
      group->abort("no more data");
    });
    const std::string text = failure_of(*group, 1000);
    other.join();
    EXPECT_LT(std::chrono::steady_clock::now() - begin, group->deadline() / 2);
    EXPECT_THAT(text, HasSubstr("aborted axis replica: no more data"));
    set_nccl_fault(NcclFault::kNone);
    world.barrier();
  });
  EXPECT_EQ(living_nccl_communicators(), 0);
}

TEST(NcclFaults, APeerThatNeverJoinsMeetsTheDeadline) {
  run_world(3, [](Communicator& host) {
    host.set_deadline(milliseconds(300));
    set_nccl_fault(host.process() == 2 ? NcclFault::kNeverJoins : NcclFault::kNone);
    try {
      make_nccl_group(host, 0);
      ADD_FAILURE() << "connected";
    } catch (const PeerFailed& failure) {
      EXPECT_THAT(failure.what(), HasSubstr("connecting on axis world"));
      EXPECT_THAT(failure.what(), HasSubstr("ncclCommInitRankConfig did not end within 300 ms"));
    }
    set_nccl_fault(NcclFault::kNone);
  });
  EXPECT_EQ(living_nccl_communicators(), 0);
}

// A test of nothing but the stand-in's kindness would pass if transfers were over at once.
TEST(NcclFaults, CallsWereInProgressAndCommunicatorsEndedInPeace) {
  const auto before = nccl_counts();
  run_over_nccl(2, [](Communicator& world) {
    for (int i = 0; i < 4; ++i) EXPECT_EQ(failure_of(world, 100), "");
  });
  const auto after = nccl_counts();
  EXPECT_GT(after.in_progress - before.in_progress, 4);
  EXPECT_GT(after.unfinished - before.unfinished, 2 * 4 * 2);
  EXPECT_EQ(after.destroyed - before.destroyed, 2);
  EXPECT_EQ(after.aborted, before.aborted);
}

// ---- calls that are enqueued: all spans lie in the memory of the group's device

/// A group, its device and a row of numbers there, the same on all processes.
class EnqueuedCalls {
 public:
  explicit EnqueuedCalls(Communicator& world) : device_(open_device()) {
    world.set_device(device_.get());
    group_ = world.split(0, 0, "replica");
    world.set_device(nullptr);
    numbers_ = Buffer<float>(1000, device_.get());
    fill(1.0F, numbers_.line());
  }

  Communicator& group() { return *group_; }
  Device& device() { return *device_; }
  void all_reduce() { group_->all_reduce(numbers_.span(), Reduction::kSum, {Purpose::kDense}); }
  void scale(float factor) { lowband::scale(factor, numbers_.line()); }
  /// Waits.
  std::vector<float> numbers() const {
    const OnHost<float> all(numbers_.line());
    return {all.view().data, all.view().data + numbers_.size()};
  }
  std::string failure() {
    try {
      group_->throw_if_broken();
    } catch (const PeerFailed& failure) {
      return failure.what();
    }
    return "";
  }

 private:
  std::unique_ptr<Device> device_;
  std::unique_ptr<Communicator> group_;
  Buffer<float> numbers_;
};

// Each takes its turn between the device's own work, before and behind.
TEST(NcclEnqueued, TakeTheirTurnsWithTheDevice) {
  for (const Determinism level : {Determinism::kExact, Determinism::kFast}) {
    run_over_nccl(3, [&](Communicator& world) {
      EnqueuedCalls calls(world);
      calls.group().set_determinism(level);
      world.barrier();
      const long before = cuda_on_host::host_waits();
      for (int i = 0; i < 5; ++i) {
        calls.scale(2);
        calls.all_reduce();
      }
      world.barrier();
      EXPECT_EQ(cuda_on_host::host_waits(), before);
      world.barrier();
      EXPECT_EQ(calls.numbers(), std::vector<float>(1000, 6 * 6 * 6 * 6 * 6));
      EXPECT_EQ(calls.failure(), "");
      const TransferTotals sum = world.ledger().total_sum("replica", Purpose::kDense);
      EXPECT_EQ(sum.calls, 5);
      EXPECT_EQ(sum.payload_bytes, 5 * 4000);
    });
    EXPECT_EQ(living_nccl_communicators(), 0);
  }
}

// The host waits for a device that waits for a transfer.
TEST(NcclEnqueued, ATransferThatNeverEndsMeetsTheDeadline) {
  const long aborted = nccl_counts().aborted;
  run_over_nccl(3, [&](Communicator& world) {
    EnqueuedCalls calls(world);
    calls.group().set_deadline(milliseconds(300));
    set_nccl_fault(world.process() == 1 ? NcclFault::kNeverStarts : NcclFault::kNone);
    const auto begin = std::chrono::steady_clock::now();
    calls.all_reduce();
    EXPECT_EQ(calls.failure(), "") << "it waited";
    calls.device().synchronize();
    EXPECT_LT(std::chrono::steady_clock::now() - begin, milliseconds(5000));
    EXPECT_GE(std::chrono::steady_clock::now() - begin, milliseconds(300));
    const std::string text = calls.failure();
    EXPECT_THAT(text, HasSubstr("all_reduce(sum, f32, 1000 elements, dense) on axis replica"));
    EXPECT_THAT(text, HasSubstr("the transfer did not end within 300 ms, although every process had come"));
    try {
      calls.all_reduce();
      ADD_FAILURE() << "a broken group must stay broken";
    } catch (const PeerFailed& failure) {
      EXPECT_EQ(failure.what(), text);
    }
    set_nccl_fault(NcclFault::kNone);
    world.barrier();
    EXPECT_EQ(failure_of(world, 10), "");  // other groups go on
  });
  EXPECT_EQ(nccl_counts().aborted, aborted + 3);
  EXPECT_EQ(living_nccl_communicators(), 0);
}

TEST(NcclEnqueued, AnAsynchronousErrorBreaksTheGroup) {
  run_over_nccl(2, [](Communicator& world) {
    EnqueuedCalls calls(world);
    calls.group().set_deadline(milliseconds(2000));
    calls.group().set_determinism(Determinism::kFast);  // one call of NCCL for each of ours
    calls.all_reduce();
    calls.device().synchronize();
    if (world.process() == 1) set_nccl_fault(NcclFault::kRemoteError);
    const auto begin = std::chrono::steady_clock::now();
    calls.all_reduce();
    calls.device().synchronize();
    if (world.process() == 1) {
      EXPECT_LT(std::chrono::steady_clock::now() - begin, milliseconds(1000));
      EXPECT_THAT(calls.failure(), HasSubstr("code 6, remote process exited"));
    } else {
      EXPECT_NE(calls.failure(), "");
    }
    set_nccl_fault(NcclFault::kNone);
    world.barrier();
  });
  EXPECT_EQ(living_nccl_communicators(), 0);
}

TEST(NcclEnqueued, AnAbortEndsATransfer) {
  run_over_nccl(2, [](Communicator& world) {
    EnqueuedCalls calls(world);
    set_nccl_fault(NcclFault::kNeverStarts);
    const auto begin = std::chrono::steady_clock::now();
    calls.all_reduce();
    calls.group().abort("no more data");
    calls.device().synchronize();
    EXPECT_LT(std::chrono::steady_clock::now() - begin, calls.group().deadline() / 2);
    EXPECT_THAT(calls.failure(), HasSubstr("aborted axis replica: no more data"));
    set_nccl_fault(NcclFault::kNone);
    world.barrier();
  });
  EXPECT_EQ(living_nccl_communicators(), 0);
}

// The deadline is that of the transfer, not of what the device does before it.
TEST(NcclEnqueued, TheDeadlineBeginsWithTheTurn) {
  run_over_nccl(2, [](Communicator& world) {
    EnqueuedCalls calls(world);
    calls.group().set_deadline(milliseconds(150));
    const auto free_at = std::chrono::steady_clock::now() + milliseconds(500);
    cuda_on_host::enqueue_until(blas_of(&calls.device()).stream().handle(),
                                [free_at] { return std::chrono::steady_clock::now() > free_at; });
    calls.all_reduce();
    EXPECT_EQ(calls.numbers(), std::vector<float>(1000, 2));
    EXPECT_EQ(calls.failure(), "");
  });
}

// ---- an optimizer

using NamedKind = std::pair<const char*, OptimizerKind>;
class StepsOverNccl : public testing::TestWithParam<NamedKind> {};

// Over `local` bytes go through the host and back, and the processes wait; bits are the same.
TEST_P(StepsOverNccl, AreEnqueued) {
  OptimizerOptions options;
  options.kind = GetParam().second;
  const auto weights_after = [&](Communicator& world, bool enqueued) {
    test::SmallTraining training(world, true, options);
    training.draw_gradients(0);
    training.step(0).get();
    training.draw_gradients(1, 1);
    world.barrier();
    const long before = cuda_on_host::host_waits();
    PendingReport report = training.step(1);
    world.barrier();
    EXPECT_EQ(cuda_on_host::host_waits() == before, enqueued);
    world.barrier();
    EXPECT_EQ(report.get().skipped_matrices + report.get().skipped_other, 1);
    return training.weights();
  };
  std::vector<float> expected;
  run_world(2, [&](Communicator& world) {
    const std::vector<float> found = weights_after(world, false);
    if (world.process() == 0) expected = found;
  });
  run_over_nccl(2, [&](Communicator& world) { EXPECT_EQ(weights_after(world, true), expected); });
}

INSTANTIATE_TEST_SUITE_P(All, StepsOverNccl,
                         testing::Values(NamedKind{"adamw", OptimizerKind::kAdamW},
                                         NamedKind{"lion", OptimizerKind::kLion},
                                         NamedKind{"sgd", OptimizerKind::kSgd},
                                         NamedKind{"muon", OptimizerKind::kMuon},
                                         NamedKind{"dion", OptimizerKind::kDion},
                                         NamedKind{"power_sgd", OptimizerKind::kPowerSgd}),
                         [](const auto& test) { return std::string(test.param.first); });

class OverNccl : public testing::TestWithParam<OptimizerKind> {};

// `run` checks that replicas hold the same bits. Both groups add in the documented order, so bits are equal
// between them too.
TEST_P(OverNccl, TrainsAsOverTheHost) {
  test::RunPlan plan{.mesh = {.replica = 2, .shard = 2},
                     .parameters = test::assorted_parameters(),
                     .options = {},
                     .gradient = test::noisy_gradient,
                     .shares = 4,
                     .steps = 2,
                     .on_device = true};
  plan.options.kind = GetParam();
  plan.parameters.resize(5);
  const std::vector<test::Snapshot> host = test::run<float>(plan);
  plan.world = [](Communicator& group) { return make_nccl_group(group, 0); };
  const std::vector<test::Snapshot> nccl = test::run<float>(plan);
  ASSERT_EQ(nccl.size(), host.size());
  for (std::size_t step = 0; step < host.size(); ++step) {
    EXPECT_EQ(nccl[step].factor_bytes, host[step].factor_bytes);
    EXPECT_EQ(nccl[step].factor_bytes, nccl[step].planned_factor_bytes);
    EXPECT_EQ(nccl[step].dense_bytes, host[step].dense_bytes);
    EXPECT_EQ(nccl[step].dense_bytes, nccl[step].planned_dense_bytes);
    EXPECT_EQ(nccl[step].update_bytes, host[step].update_bytes);
    EXPECT_EQ(nccl[step].calls, host[step].calls);
    for (const auto& [name, weight] : host[step].weights)
      EXPECT_EQ(nccl[step].weights.at(name).a, weight.a) << name << ", step " << step;
  }
  EXPECT_EQ(living_nccl_communicators(), 0);
}

INSTANTIATE_TEST_SUITE_P(All, OverNccl, testing::Values(OptimizerKind::kDion, OptimizerKind::kAdamW),
                         [](const auto& test) {
                           return std::string(test.param == OptimizerKind::kDion ? "dion" : "adamw");
                         });

}  // namespace
}  // namespace lowband
