#include "collectives/agreement.h"

#include "collectives/local/local_world.h"

#include <array>
#include <atomic>

#include <gtest/gtest.h>

namespace lowband {
namespace {

TEST(Agreement, NobodyGoesOnAloneAndTheMessageNamesTheProcess) {
  std::atomic<int> thrown = 0;
  run_world(4, [&](Communicator& world) {
    try {
      agree(world, [&] { LB_EXPECTS(world.process() != 2, "data.train: found nothing, expected a file"); });
    } catch (const AgreedFailure& failure) {
      EXPECT_STREQ(failure.what(), "[process 2 of 4] data.train: found nothing, expected a file");
      ++thrown;
    }
    world.barrier();  // the group still works
  });
  EXPECT_EQ(thrown, 4);
}

TEST(Agreement, AFailureOfAllIsToldOnceAndWithoutAProcess) {
  run_world(3, [](Communicator& world) {
    try {
      agree(world, [&] { throw IoError(cat("message ", world.process() == 0 ? "zero" : "another")); });
      ADD_FAILURE() << "must throw";
    } catch (const AgreedFailure& failure) {
      EXPECT_STREQ(failure.what(), "message zero");
    }
  });
}

TEST(Agreement, SuccessCostsOneControlMessageAndReturns) {
  run_world(3, [](Communicator& world) {
    bool ran = false;
    agree(world, [&] { ran = true; });
    EXPECT_TRUE(ran);
    EXPECT_EQ(world.ledger().total_sum("world", Purpose::kControl).calls, 1);
  });
}

}  // namespace
}  // namespace lowband
