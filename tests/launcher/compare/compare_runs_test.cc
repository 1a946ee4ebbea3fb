#include "launcher/compare/compare_runs.h"

#include "tests/launcher/compare/finished_run.h"

#include <vector>

#include <gmock/gmock.h>

namespace lowband {
namespace {

using std::filesystem::path;
using testing::HasSubstr;

TEST(CompareRuns, SetsEveryRunAgainstTheFirst) {
  const ScratchDirectory scratch;
  const std::vector<path> folders{finished_run(scratch, "uniform", "uniform:24", 2.2, 1890000),
                                  finished_run(scratch, "structural", "structural", 2.1, 1889055)};
  const Comparison comparison = compare_runs(folders);
  ASSERT_EQ(comparison.runs_size(), 2);
  EXPECT_EQ(comparison.runs(0).ratio_to_first(), 1.0);
  EXPECT_DOUBLE_EQ(comparison.runs(1).ratio_to_first(), 1889055.0 / 1890000.0);
  EXPECT_DOUBLE_EQ(comparison.runs(1).ratio_to_dense(), 0.1889055);
  EXPECT_EQ(
      comparison_table(comparison),
      "run         optimizer  profile     steps  final val. loss  best (step)  tokens/s  factors planned  "
      "factors counted  / dense  / first run  exposed\n"
      "uniform     DION       uniform:24     60           2.3000  2.2500 (40)     5.12k        1890000 B  "
      "      1890000 B   0.1890       1.0000     none\n"
      "structural  DION       structural     60           2.2000  2.1500 (40)     5.12k        1889055 B  "
      "      1889055 B   0.1889       0.9995     none\n"
      "Loss in nats per token. Factors: their payload of one step on the replica axis. Exposed: the part of "
      "the optimizer's communication time for which training waited.\n"
      "\n"
      "run         optimizer  ms / step  in the optimizer    factors     dense  together / first run      "
      "state  peak memory\n"
      "uniform     DION          400.00             62.50  1890000 B  110000 B                1.0000  "
      "7000000 B       250 MB\n"
      "structural  DION          400.00             62.50  1889055 B  110000 B                0.9995  "
      "7000000 B       250 MB\n"
      "Means over the steps. Factors, dense: payload of one replica on the replica axis. State: of the "
      "optimizer, peak memory: resident, both on the process that has most.\n");
}

TEST(CompareRuns, SaysHowARunExchangedAndHowMuchItWaited) {
  const ScratchDirectory scratch;
  RunSummary summary;
  summary.set_optimizer("POWERSGD");
  summary.set_exchange("AUTO");
  summary.set_wire_dtype("bf16");
  summary.set_exchange_seconds(8);
  summary.set_exposed_seconds(1);
  summary.set_exposed_fraction(0.125);
  RunRecorder(scratch.path()).write(summary);
  const std::vector<path> folders{scratch.path()};
  const Comparison comparison = compare_runs(folders);
  EXPECT_EQ(comparison.runs(0).exchange_seconds(), 8);
  EXPECT_EQ(comparison.runs(0).exposed_seconds(), 1);
  EXPECT_THAT(comparison_table(comparison), HasSubstr("POWERSGD AUTO bf16"));
  EXPECT_THAT(comparison_table(comparison), HasSubstr("  12.5 %\n"));
}

TEST(CompareRuns, RunsWithoutValidationOrFactorsSaySo) {
  const ScratchDirectory scratch;
  RunRecorder(scratch.path()).write(RunSummary());
  const std::vector<path> folders{scratch.path()};
  const Comparison comparison = compare_runs(folders);
  EXPECT_EQ(comparison.runs(0).ratio_to_first(), 0);
  EXPECT_FALSE(comparison.runs(0).has_final_validation_loss());
  EXPECT_THAT(comparison_table(comparison), HasSubstr("none"));
}

TEST(CompareRuns, NamesTheRunThatHasNotEnded) {
  const ScratchDirectory scratch;
  const std::vector<path> folders{scratch.path() / "absent"};
  EXPECT_THAT(thrown_message<IoError>([&] { compare_runs(folders); }),
              HasSubstr("absent/summary.json: cannot open"));
  EXPECT_THAT(thrown_message<InvalidArgument>([] { compare_runs({}); }), HasSubstr("found no run folder"));
}

}  // namespace
}  // namespace lowband
