#include "collectives/byte_budget.h"

#include "collectives/local/local_world.h"
#include "runtime/error.h"

#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;

using Shares = std::vector<PayloadShare>;

// A ledger and a budget, and transfers of single bytes that are checked and recorded.
struct Account {
  Ledger ledger;
  ByteBudget budget;
  void send(std::string_view axis, Purpose purpose, Index bytes, const Shares& shares = {},
            bool second_half = false) {
    const Transfer transfer{.axis = axis,
                            .purpose = purpose,
                            .operation = Operation::kAllReduce,
                            .payload_bytes = bytes,
                            .second_half = second_half};
    budget.check(ledger, transfer, shares, 1);
    ledger.record(transfer, shares, 1);
  }
};

TEST(ByteBudget, LimitsTheSumOfAStepAndNothingElse) {
  Account account;
  account.budget.allow("replica", Purpose::kFactor, 60);
  account.budget.allow("replica", Purpose::kFactor, 40);
  account.ledger.begin_step(7);
  account.send("replica", Purpose::kFactor, 30);
  account.send("replica", Purpose::kFactor, 70, {{"wq", 70}});
  EXPECT_THAT([&] { account.send("replica", Purpose::kFactor, 1); },
              ThrowsMessage<BudgetExceeded>(HasSubstr(
                  "step 7, axis replica, purpose factor: found 1 bytes asked with 100 spent, expected "
                  "at most 100 planned in a step; the transfer was not sent")));
  account.send("replica", Purpose::kDense, 1000);  // no line
  account.send("shard", Purpose::kFactor, 1000);
  account.send("replica", Purpose::kFactor, 0);
  account.send("replica", Purpose::kFactor, 100, {}, true);  // the second half has been paid for
  account.ledger.begin_step();
  account.send("replica", Purpose::kFactor, 100);
  EXPECT_THAT([&] { account.send("replica", Purpose::kFactor, 1); },
              ThrowsMessage<BudgetExceeded>(HasSubstr("step 8")));
}

// Of steps counted from 0, whose numbers in the ledger begin with 1.
TEST(ByteBudget, LimitsTheStepsOfAPhase) {
  Account account;
  account.budget.allow("replica", Purpose::kFactor, 5, "wq");
  account.budget.allow("replica", Purpose::kFactor, 30, "wq", {.period = 3, .offset = 1});
  account.budget.allow("replica", Purpose::kFactor, 200, "wk", StepPhase::only(2));
  const StepPhase third{.period = 3, .offset = 2, .and_first = true};
  StepPhase others = third;
  others.others = true;
  account.budget.allow("replica", Purpose::kFactor, 1000, "wk", third);
  account.budget.allow("replica", Purpose::kFactor, 4000, "wk", others);
  for (Index step = 0; step < 8; ++step) {
    account.ledger.begin_step(step + 1);
    const bool listed = step == 0 || step == 2 || step == 5;
    const Index wq = step % 3 == 1 ? 35 : 5, wk = (step == 2 ? 200 : 0) + (listed ? 1000 : 4000);
    account.send("replica", Purpose::kFactor, wq + wk, {{"wq", wq}, {"wk", wk}});
    EXPECT_THROW(account.send("replica", Purpose::kFactor, 1, {{"wq", 1}}), BudgetExceeded) << step;
    EXPECT_THROW(account.send("replica", Purpose::kFactor, 1), BudgetExceeded) << step;
  }
}

TEST(ByteBudget, LimitsEachParameterOnceOneIsNamed) {
  Account account;
  account.budget.allow("replica", Purpose::kFactor, 10, "wq");
  account.budget.allow("replica", Purpose::kFactor, 20, "wk");
  account.budget.allow("replica", Purpose::kFactor, 5);  // for anything
  account.ledger.begin_step();
  account.send("replica", Purpose::kFactor, 14, {{"wq", 4}, {"wk", 9}});
  // Two shares of one parameter are one request; a saving on wk does not pay for wq.
  EXPECT_THAT(
      [&] {
        account.send("replica", Purpose::kFactor, 7, {{"wq", 3}, {"wq", 4}});
      },
      ThrowsMessage<BudgetExceeded>(
          AllOf(HasSubstr("parameter wq: found 7 bytes asked with 4 spent, expected at most 10"))));
  EXPECT_THAT(
      [&] {
        account.send("replica", Purpose::kFactor, 1, {{"wv", 1}});
      },
      ThrowsMessage<BudgetExceeded>(HasSubstr("parameter wv: found 1 bytes asked with 0 spent")));
  account.send("replica", Purpose::kFactor, 6, {{"wq", 6}});
  EXPECT_EQ(account.ledger.step_sum("replica", Purpose::kFactor).payload_bytes, 20);
  account.send("replica", Purpose::kFactor, 15, {{"wk", 11}});
  EXPECT_THROW(account.send("replica", Purpose::kFactor, 1), BudgetExceeded);
}

TEST(ByteBudget, LooksAtTheOwnPurposeOfAShare) {
  Account account;
  account.budget.allow("replica", Purpose::kFactor, 10, "wq");
  account.budget.allow("replica", Purpose::kDense, 3, "norm");
  account.ledger.begin_step();
  EXPECT_THAT(
      [&] {
        account.send("replica", Purpose::kFactor, 14, {{"wq", 10}, {"norm", 4, Purpose::kDense}});
      },
      ThrowsMessage<BudgetExceeded>(HasSubstr("purpose dense, parameter norm: found 4 bytes asked")));
  EXPECT_TRUE(account.ledger.step().empty());
  account.send("replica", Purpose::kFactor, 13, {{"wq", 10}, {"norm", 3, Purpose::kDense}});
}

// At whichever step of the interval it is sent, the plan fits exactly; one more never does.
TEST(ByteBudget, AveragesPeriodicBytesOverTheRun) {
  constexpr Index kInterval = 5;
  for (Index phase = 0; phase < kInterval; ++phase) {
    Account account;
    account.budget.allow_every("replica", kInterval, 100);
    for (Index step = 0; step < 4 * kInterval; ++step) {
      account.ledger.begin_step();
      if (step % kInterval != phase) continue;
      account.send("replica", Purpose::kPeriodic, 60);
      account.send("replica", Purpose::kPeriodic, 40);
      EXPECT_THROW(account.send("replica", Purpose::kPeriodic, 1), BudgetExceeded);
    }
  }
}

TEST(ByteBudget, PeriodicBytesThatWereSavedMayComeLater) {
  Account account;
  account.budget.allow_every("replica", 10, 100);
  account.budget.allow_every("replica", 4, 1);
  account.send("replica", Purpose::kPeriodic, 30);  // before the first step
  for (int step = 0; step < 11; ++step) account.ledger.begin_step();
  account.send("shard", Purpose::kPeriodic, 1000);
  // 2 intervals of 10 and 3 of 4 have begun: 203.
  account.send("replica", Purpose::kPeriodic, 172);
  EXPECT_THAT(
      [&] { account.send("replica", Purpose::kPeriodic, 2); },
      ThrowsMessage<BudgetExceeded>(HasSubstr(
          "purpose periodic: found 2 bytes asked with 202 spent, expected at most 203 planned in 11 steps")));
  account.send("replica", Purpose::kPeriodic, 1);
}

TEST(ByteBudget, RefusesWhatIsNoBudget) {
  ByteBudget budget;
  EXPECT_THROW(budget.allow("replica", Purpose::kFactor, -1), InvalidArgument);
  EXPECT_THROW(budget.allow("replica", Purpose::kPeriodic, 1), InvalidArgument);
  EXPECT_THROW(budget.allow_every("replica", 0, 1), InvalidArgument);
  EXPECT_THROW(budget.allow_every("replica", 1, -1), InvalidArgument);
  EXPECT_TRUE(budget.empty());
}

TEST(ByteBudget, EndsARunWithItsOwnError) {
  const auto run = [] {
    run_world(4, [](Communicator& world) {
      // Two groups; a parameter that only the second holds is over its budget.
      const auto replica = world.split(world.process() / 2, 0, "replica");
      world.budget().allow("replica", Purpose::kFactor, 8, "wq");
      world.ledger().begin_step();
      std::vector<float> data(world.process() / 2 == 0 ? 2 : 3);
      const Shares shares{{"wq", static_cast<Index>(data.size())}};
      replica->all_reduce<float>(data, Reduction::kSum, {Purpose::kFactor, shares});
      for (;;) replica->barrier();
    });
  };
  EXPECT_THAT(run, ThrowsMessage<BudgetExceeded>(AllOf(HasSubstr("of 4] byte budget: step 1"),
                                                       HasSubstr("parameter wq: found 12 bytes"))));
}

}  // namespace
}  // namespace lowband
