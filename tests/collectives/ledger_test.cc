#include "collectives/ledger.h"

#include "collectives/nccl/nccl_status.h"
#include "collectives/tree_reduction.h"
#include "runtime/error.h"

#include <chrono>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

namespace lowband {
namespace {

TEST(WireBytesModel, IsTheTrafficOfARing) {
  EXPECT_EQ(wire_bytes_model(Operation::kAllReduce, 1200, 4), 1800);  // 2 * 3/4 * 1200
  EXPECT_EQ(wire_bytes_model(Operation::kReduceScatter, 1200, 4), 900);
  EXPECT_EQ(wire_bytes_model(Operation::kAllGather, 1200, 3), 800);
  EXPECT_EQ(wire_bytes_model(Operation::kAllToAll, 1200, 4), 225);  // 3/4 of the quarter it holds
  EXPECT_EQ(wire_bytes_model(Operation::kBroadcast, 1200, 2), 600);
  EXPECT_EQ(wire_bytes_model(Operation::kBarrier, 0, 7), 0);
  for (const Operation operation : {Operation::kAllReduce, Operation::kReduceScatter, Operation::kAllGather,
                                    Operation::kAllToAll, Operation::kBroadcast, Operation::kBarrier}) {
    EXPECT_EQ(wire_bytes_model(operation, 1200, 1), 0) << operation_name(operation);
  }
  EXPECT_THROW(wire_bytes_model(Operation::kAllReduce, -1, 2), InvalidArgument);
  EXPECT_THROW(wire_bytes_model(Operation::kAllReduce, 1, 0), InvalidArgument);
}

TEST(Ledger, KeepsAxesPurposesAndOperationsApart) {
  Ledger ledger;
  const auto record = [&](std::string_view axis, Purpose purpose, Operation operation, Index bytes) {
    ledger.record({.axis = axis,
                   .purpose = purpose,
                   .operation = operation,
                   .payload_bytes = bytes,
                   .modelled_wire_bytes = 0.5 * static_cast<double>(bytes),
                   .transport_bytes = bytes / 2,
                   .seconds = 0.25},
                  {}, 4);
  };
  record("replica", Purpose::kFactor, Operation::kAllReduce, 10);
  record("replica", Purpose::kFactor, Operation::kAllReduce, 100);
  record("replica", Purpose::kFactor, Operation::kAllGather, 1'000);
  record("replica", Purpose::kDense, Operation::kAllReduce, 10'000);
  record("shard", Purpose::kFactor, Operation::kAllReduce, 100'000);
  EXPECT_EQ(ledger.step().size(), 4U);
  EXPECT_EQ(ledger.step().at({"replica", Purpose::kFactor, Operation::kAllReduce}).payload_bytes, 110);
  const TransferTotals factors = ledger.step_sum("replica", Purpose::kFactor);
  EXPECT_EQ(factors.calls, 3);
  EXPECT_EQ(factors.payload_bytes, 1'110);
  EXPECT_EQ(factors.transport_bytes, 555);
  EXPECT_EQ(factors.modelled_wire_bytes, 555);
  EXPECT_EQ(factors.seconds, 0.75);
  EXPECT_EQ(ledger.step_sum("", Purpose::kFactor).payload_bytes, 101'110);
  EXPECT_EQ(ledger.step_sum().payload_bytes, 111'110);
}

TEST(Ledger, SplitsATransferByThePurposesOfItsShares) {
  Ledger ledger;
  const std::vector<PayloadShare> shares{
      {"wq", 5}, {"norm", 3, Purpose::kDense}, {"drift", 2, Purpose::kPeriodic}};
  ledger.record({.axis = "replica",
                 .purpose = Purpose::kFactor,
                 .operation = Operation::kAllReduce,
                 .payload_bytes = 11 * 4,
                 .modelled_wire_bytes = 88,
                 .transport_bytes = 59,
                 .seconds = 11},
                shares, 4);
  const auto expect = [&](Purpose purpose, const TransferTotals& expected) {
    const TransferTotals found = ledger.step_sum("replica", purpose);
    EXPECT_EQ(found.calls, expected.calls) << purpose_name(purpose);
    EXPECT_EQ(found.payload_bytes, expected.payload_bytes) << purpose_name(purpose);
    EXPECT_NEAR(found.modelled_wire_bytes, expected.modelled_wire_bytes, 1e-12) << purpose_name(purpose);
    EXPECT_EQ(found.transport_bytes, expected.transport_bytes) << purpose_name(purpose);
    EXPECT_NEAR(found.seconds, expected.seconds, 1e-12) << purpose_name(purpose);
  };
  expect(Purpose::kDense, {0, 12, 24, 16, 3});    // 59 * 3/11 = 16.1
  expect(Purpose::kPeriodic, {0, 8, 16, 11, 2});  // 59 * 2/11 = 10.7
  expect(Purpose::kFactor, {1, 24, 48, 32, 6});   // the rest
  EXPECT_EQ(ledger.step_sum().transport_bytes, 59);
}

TEST(Ledger, IsWrittenAndReadByThreads) {
  constexpr Index kTransfers = 2000;
  Ledger ledger;
  const std::vector<PayloadShare> shares{{"wq", 1}};
  const auto work = [&](std::string_view axis) {
    for (Index i = 0; i < kTransfers; ++i) {
      ledger.record(
          {.axis = axis, .purpose = Purpose::kFactor, .operation = Operation::kAllReduce, .payload_bytes = 4},
          shares, 4);
      if (i % 100 == 0) {
        EXPECT_LE(ledger.step_parameters().size(), 2U);
      }
    }
  };
  std::thread other(work, "replica");
  work("tensor");
  other.join();
  EXPECT_EQ(ledger.step_sum().payload_bytes, 2 * 4 * kTransfers);
  EXPECT_EQ(ledger.step_parameters().at({"replica", Purpose::kFactor, "wq"}), 4 * kTransfers);
  EXPECT_EQ(ledger.total().at({"tensor", Purpose::kFactor, Operation::kAllReduce}).calls, kTransfers);
}

TEST(TreeReduction, AddsRangesOfPowersOfTwoFirst) {
  // Next to 2^24 a float counts in twos: one after the other, the single ones would all be lost.
  constexpr float kLarge = 1 << 24;
  const std::vector<float> parts{kLarge, 1, 1, 1, 2};
  std::vector<const std::byte*> addresses;
  for (const float& part : parts) addresses.push_back(reinterpret_cast<const std::byte*>(&part));
  float sum = 0;
  reduce_tree(addresses, reinterpret_cast<std::byte*>(&sum), 1, DType::kF32, DType::kF32, Reduction::kSum);
  EXPECT_EQ(sum, kLarge + 4);  // ((2^24 + 1) + (1 + 1)) + 2
}

TEST(NcclStatus, SaysEitherTheVersionOrTheReason) {
  const NcclStatus status = nccl_status();
  EXPECT_EQ(status.built_in, !status.version.empty());
  EXPECT_EQ(status.built_in, status.reason.empty());
}

TEST(Ledger, KnowsHowLongEachThreadIsInside) {
  using Milliseconds = std::chrono::milliseconds;
  Ledger ledger;
  const auto self = std::this_thread::get_id();
  EXPECT_EQ(ledger.seconds_inside(self), 0);
  double first = 0;
  {
    const Ledger::Presence presence(ledger);
    std::this_thread::sleep_for(Milliseconds(20));
    first = ledger.seconds_inside(self);  // the running one counts
    EXPECT_GE(first, 0.02);
    std::thread([&] {
      EXPECT_EQ(ledger.seconds_inside(std::this_thread::get_id()), 0);
      EXPECT_GE(ledger.seconds_inside(self), first);
    }).join();
  }
  const double ended = ledger.seconds_inside(self);
  std::this_thread::sleep_for(Milliseconds(5));
  EXPECT_GE(ended, first);
  EXPECT_EQ(ledger.seconds_inside(self), ended);
  {
    const Ledger::Presence again(ledger);
    std::this_thread::sleep_for(Milliseconds(20));
  }
  EXPECT_GE(ledger.seconds_inside(self), ended + 0.02);
}

}  // namespace
}  // namespace lowband
