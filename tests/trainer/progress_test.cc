#include "trainer/progress.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>

#include <gmock/gmock.h>

namespace lowband {
namespace {

using std::chrono::seconds;

const ProgressState kState{120, 300, 2.4121, 5123, 1.89e6, 52.3};

TEST(FormatProgress, SaysEverythingOnAWideLine) {
  EXPECT_EQ(
      format_progress(kState, 100),
      "step 120/300 [############..................] loss 2.412 | 5.12k tok/s | 1.89 MB/step | 0:52 left");
}

TEST(FormatProgress, SaysLastHowMuchOfAStepWaitsForTheExchange) {
  ProgressState state = kState;
  state.exposed_fraction = 0.0666;
  EXPECT_THAT(format_progress(state, 110), testing::EndsWith("0:52 left | 7 % exposed"));
  EXPECT_THAT(format_progress(state, 75), testing::EndsWith("0:52 left"));
}

TEST(FormatProgress, ShrinksTheBarThenLeavesFieldsOut) {
  EXPECT_EQ(format_progress(kState, 79),
            "step 120/300 [####........] loss 2.412 | 5.12k tok/s | 1.89 MB/step | 0:52 left");
  EXPECT_EQ(format_progress(kState, 70), "step 120/300 loss 2.412 | 5.12k tok/s | 1.89 MB/step | 0:52 left");
  EXPECT_EQ(format_progress(kState, 40), "step 120/300 loss 2.412 | 5.12k tok/s");
  EXPECT_EQ(format_progress(kState, 6), "step 1");
}

TEST(FormatProgress, NeverExceedsTheWidth) {
  for (int columns = 0; columns < 140; ++columns) {
    EXPECT_LE(std::ssize(format_progress(kState, columns)), columns);
  }
}

TEST(FormatProgress, BarIsEmptyAtTheStartAndFullAtTheEnd) {
  ProgressState state = kState;
  state.step = 0;
  EXPECT_THAT(format_progress(state, 100), testing::HasSubstr("[..............................]"));
  state.step = 300;
  EXPECT_THAT(format_progress(state, 100), testing::HasSubstr("[##############################]"));
}

TEST(FormatQuantity, KeepsThreeDigits) {
  EXPECT_EQ(format_quantity(0), "0");
  EXPECT_EQ(format_quantity(512), "512");
  EXPECT_EQ(format_quantity(0.25), "0.25");
  EXPECT_EQ(format_quantity(999.6), "1.00k");
  EXPECT_EQ(format_quantity(12345), "12.3k");
  EXPECT_EQ(format_quantity(123456), "123k");
  EXPECT_EQ(format_quantity(1.89e6), "1.89M");
  EXPECT_EQ(format_quantity(1.89e6, "B"), "1.89 MB");
  EXPECT_EQ(format_quantity(20, "B"), "20 B");
  EXPECT_EQ(format_quantity(9.996e9), "10.0G");
}

TEST(FormatDuration, GrowsToHours) {
  EXPECT_EQ(format_duration(0.4), "0:00");
  EXPECT_EQ(format_duration(59.6), "1:00");
  EXPECT_EQ(format_duration(725), "12:05");
  EXPECT_EQ(format_duration(11220), "3:07:00");
}

TEST(TerminalColumns, FollowTheVariableOfTheLauncher) {
  ::setenv("LOWBAND_TERMINAL_COLUMNS", "93", 1);
  EXPECT_EQ(terminal_columns(), 93);
  ::setenv("LOWBAND_TERMINAL_COLUMNS", "0", 1);
  EXPECT_EQ(terminal_columns(), 0);
  ::unsetenv("LOWBAND_TERMINAL_COLUMNS");
}

TEST(Progress, WritesOverOneLineOnATerminal) {
  std::ostringstream out;
  const Progress::Clock::time_point start{};
  Progress progress(out, 70, 0, 4, seconds(10), start);
  progress.update(1, 5.5, 1000, 0.5, 4000, {}, start + seconds(1));
  progress.update(2, 5.0, 1000, 0.5, 4000, {}, start + seconds(2));
  progress.say("validation 2.5");
  progress.update(3, 4.5, 1000, 0.5, 4000, {}, start + seconds(3));
  progress.finish();
  const std::string text = out.str();
  EXPECT_EQ(std::ranges::count(text, '\n'), 2);
  EXPECT_THAT(text, testing::HasSubstr("\rvalidation 2.5\n"));
  EXPECT_THAT(text, testing::HasSubstr("\rstep 2/4 "));
  EXPECT_THAT(text, testing::HasSubstr("loss 4.500 | 2.00k tok/s | 4.00 kB/step | 0:01 left"));
}

// Steps of 1 s and 3 s that wait 0.5 s and 0: means of weight 0.95 and 1, 0.475 / 3.95 = 12 %.
TEST(Progress, AveragesExposedCommunicationLikeTheRate) {
  std::ostringstream out;
  const Progress::Clock::time_point start{};
  Progress progress(out, 120, 0, 4, seconds(10), start);
  progress.update(1, 5.5, 1000, 1, 4000, 0.5, start + seconds(1));
  EXPECT_THAT(out.str(), testing::HasSubstr("| 50 % exposed"));
  progress.update(2, 5.0, 1000, 3, 4000, 0.0, start + seconds(4));
  EXPECT_THAT(out.str(), testing::HasSubstr("| 12 % exposed"));
}

TEST(Progress, WritesALineEveryIntervalElsewhere) {
  std::ostringstream out;
  const Progress::Clock::time_point start{};
  Progress progress(out, 0, 100, 200, seconds(10), start);
  for (Index step = 101; step <= 200; ++step)
    progress.update(step, 1, 10, 1, 1, {}, start + seconds(step - 100));
  progress.finish();
  const std::string text = out.str();
  EXPECT_THAT(text, testing::Not(testing::HasSubstr("\r")));
  // The first step, then one every ten seconds after it, and the last step, which is 9 s after step 191.
  EXPECT_EQ(std::ranges::count(text, '\n'), 11);
  EXPECT_THAT(text, testing::HasSubstr("step 200/200 [##############################] loss 1.000"));
  EXPECT_THAT(text,
              testing::HasSubstr(
                  "step 151/200 [######################........] loss 1.000 | 10 tok/s | 1 B/step | 0:49"));
}

}  // namespace
}  // namespace lowband
