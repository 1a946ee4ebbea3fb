#include "trainer/config/schedule.h"

#include "runtime/error.h"

#include <gtest/gtest.h>

namespace lowband {
namespace {

using Schedule = RunConfig::Schedule;

Schedule schedule(Schedule::Kind kind, Index steps, Index warmup_steps, double final_fraction) {
  Schedule s;
  s.set_kind(kind);
  s.set_steps(steps);
  s.set_warmup_steps(warmup_steps);
  s.set_final_fraction(final_fraction);
  return s;
}

TEST(Cosine, WarmsUpToThePeakAndEndsAtTheFinalFraction) {
  const Schedule s = schedule(Schedule::COSINE, 110, 10, 0.25);
  EXPECT_EQ(learning_rate_factor(s, 0), 0.1);
  EXPECT_EQ(learning_rate_factor(s, 4), 0.5);
  EXPECT_EQ(learning_rate_factor(s, 9), 1.0);
  EXPECT_EQ(learning_rate_factor(s, 10), 1.0);
  EXPECT_NEAR(learning_rate_factor(s, 60), 0.25 + 0.75 * 0.5, 1e-15);
  // Four fifths of the way; cos(4 pi / 5) = -(1 + sqrt 5) / 4.
  EXPECT_NEAR(learning_rate_factor(s, 90), 0.25 + 0.75 * 0.5 * (1 - 0.80901699437494745), 1e-15);
  EXPECT_EQ(learning_rate_factor(s, 110), 0.25);
  EXPECT_EQ(learning_rate_factor(s, 1000), 0.25);
}

TEST(Cosine, StartsAtThePeakWithoutWarmUp) {
  EXPECT_EQ(learning_rate_factor(schedule(Schedule::COSINE, 8, 0, 0), 0), 1.0);
  EXPECT_NEAR(learning_rate_factor(schedule(Schedule::COSINE, 8, 0, 0), 4), 0.5, 1e-15);
}

TEST(ConstantLinear, HoldsThePeakAndThenFallsInAStraightLine) {
  Schedule s = schedule(Schedule::CONSTANT_LINEAR, 100, 5, 0.5);
  s.set_decay_fraction(0.2);
  EXPECT_EQ(linear_decay_steps(s), 20);
  EXPECT_EQ(learning_rate_factor(s, 0), 0.2);
  EXPECT_EQ(learning_rate_factor(s, 4), 1.0);
  EXPECT_EQ(learning_rate_factor(s, 5), 1.0);
  EXPECT_EQ(learning_rate_factor(s, 80), 1.0);
  EXPECT_DOUBLE_EQ(learning_rate_factor(s, 81), 0.975);
  EXPECT_DOUBLE_EQ(learning_rate_factor(s, 90), 0.75);
  EXPECT_DOUBLE_EQ(learning_rate_factor(s, 99), 0.525);
  EXPECT_EQ(learning_rate_factor(s, 100), 0.5);
}

TEST(ConstantLinear, TakesTheDecayInStepsToo) {
  Schedule s = schedule(Schedule::CONSTANT_LINEAR, 10, 0, 0);
  s.set_decay_steps(4);
  EXPECT_EQ(learning_rate_factor(s, 6), 1.0);
  EXPECT_DOUBLE_EQ(learning_rate_factor(s, 9), 0.25);
  s.set_decay_steps(0);
  EXPECT_EQ(learning_rate_factor(s, 9), 1.0);
}

TEST(Schedule, IsAllWarmUpWhenWarmUpFillsTheRun) {
  const Schedule s = schedule(Schedule::COSINE, 4, 4, 0);
  EXPECT_EQ(learning_rate_factor(s, 0), 0.25);
  EXPECT_EQ(learning_rate_factor(s, 3), 1.0);
  EXPECT_EQ(learning_rate_factor(s, 4), 0.0);
}

TEST(Schedule, RefusesANegativeStep) {
  EXPECT_THROW(learning_rate_factor(schedule(Schedule::COSINE, 4, 0, 0), -1), InvalidArgument);
}

}  // namespace
}  // namespace lowband
