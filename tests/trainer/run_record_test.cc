#include "trainer/run_record.h"

#include "tests/trainer/scratch_directory.h"

#include <cmath>

#include <gmock/gmock.h>

namespace lowband {
namespace {

using std::filesystem::path;
using testing::HasSubstr;

StepRecord step_record(Index step) {
  StepRecord record;
  record.set_step(step);
  record.set_loss(5.0 / static_cast<double>(step));
  record.set_tokens(Index{1} << 40);
  return record;
}

ValidationRecord validation_record(Index step) {
  ValidationRecord record;
  record.set_step(step);
  record.set_loss(2.5);
  return record;
}

RunStart start_record(Index completed_steps) {
  RunStart record;
  record.set_completed_steps(completed_steps);
  record.set_config_text("model { width: 64 }\n");
  return record;
}

// A run of `steps` steps with validation every fifth.
void write_run(const path& directory, Index steps) {
  RunRecorder recorder(directory);
  recorder.write(start_record(0));
  for (Index step = 1; step <= steps; ++step) {
    recorder.write(step_record(step));
    if (step % 5 == 0) recorder.write(validation_record(step));
  }
}

std::vector<Index> steps_of(const path& directory) {
  std::vector<Index> steps;
  for (const RunLine& line : read_run_lines(directory)) {
    if (line.has_step()) steps.push_back(line.step().step());
  }
  return steps;
}

TEST(RunRecorder, WritesALineOfJsonPerRecord) {
  const ScratchDirectory scratch;
  write_run(scratch.path() / "run", 5);
  const std::string text = read_text(scratch.path() / "run" / "run.jsonl");
  EXPECT_EQ(std::ranges::count(text, '\n'), 7);
  EXPECT_THAT(text, testing::StartsWith(R"({"start":{"completed_steps":0,)"));
  EXPECT_THAT(text, HasSubstr(R"({"step":{"step":2,"loss":2.5,)"));
  EXPECT_THAT(text, HasSubstr(R"("tokens":1099511627776,)"));  // a number, not a string
  EXPECT_THAT(text, HasSubstr(R"({"validation":{"step":5,"loss":2.5,)"));
  const auto lines = read_run_lines(scratch.path() / "run");
  EXPECT_EQ(lines.at(0).start().config_text(), "model { width: 64 }\n");
  EXPECT_EQ(lines.at(3).step().tokens(), Index{1} << 40);
}

TEST(RunRecorder, DiagnosticsAreALineOfTheirOwn) {
  const ScratchDirectory scratch;
  RunRecorder recorder(scratch.path());
  DiagnosticsRecord record;
  record.set_step(7);
  DiagnosticsRecord::Matrix& matrix = *record.add_matrices();
  matrix.set_name("q");
  matrix.set_drift(0.25);
  matrix.set_mass_leak(std::nan(""));
  recorder.write(record);
  const std::string text = read_text(scratch.path() / "run.jsonl");
  EXPECT_THAT(text, testing::StartsWith(R"({"diagnostics":{"step":7,"matrices":[{"name":"q",)"));
  EXPECT_THAT(text, HasSubstr(R"("drift":0.25,"mass_leak":null,)"));
  EXPECT_EQ(read_run_lines(scratch.path()).at(0).diagnostics().matrices(0).drift(), 0.25);
}

TransferSum transfer_sum(const char* axis, const char* purpose, Index figure) {
  TransferSum sum;
  sum.set_axis(axis);
  sum.set_purpose(purpose);
  sum.set_calls(figure);
  sum.set_payload_bytes((Index{1} << 50) + figure);
  sum.set_modelled_wire_bytes(0.1 * static_cast<double>(figure));
  sum.set_transport_bytes(3 * figure);
  sum.set_seconds(0.7 * static_cast<double>(figure));
  return sum;
}

TEST(TransferSums, AddUpByAxisAndPurpose) {
  const auto sums = merged({transfer_sum("replica", "factor", 1), transfer_sum("world", "control", 2)},
                           {transfer_sum("replica", "dense", 4), transfer_sum("replica", "factor", 8)});
  ASSERT_EQ(sums.size(), 3u);
  EXPECT_EQ(sums[0].purpose(), "dense");
  EXPECT_EQ(sums[1].purpose(), "factor");
  EXPECT_EQ(sums[1].calls(), 9);
  EXPECT_EQ(sums[1].payload_bytes(), (Index{1} << 51) + 9);
  EXPECT_EQ(sums[1].modelled_wire_bytes(), 0.1 + 0.8);
  EXPECT_EQ(sums[1].transport_bytes(), 27);
  EXPECT_EQ(sums[1].seconds(), 0.7 + 5.6);
  EXPECT_EQ(sums[2].axis(), "world");
}

TEST(TransferSums, PassThroughTheScalarsOfACheckpoint) {
  const std::vector<TransferSum> sums{transfer_sum("replica", "factor", 5),
                                      transfer_sum("within_replica", "control", 6)};
  std::map<std::string, double> scalars = scalars_of(sums);
  scalars["last_loss"] = 3;
  const auto read = transfer_sums_in(scalars);
  ASSERT_EQ(read.size(), 2u);
  for (std::size_t i = 0; i < 2; ++i) EXPECT_EQ(read[i].SerializeAsString(), sums[i].SerializeAsString());
}

TEST(RunRecorder, LossThatIsNotFiniteIsNullAndReadsAsMissing) {
  const ScratchDirectory scratch;
  {
    RunRecorder recorder(scratch.path());
    StepRecord record = step_record(1);
    record.set_loss(std::nan(""));
    recorder.write(record);
  }
  EXPECT_THAT(read_text(scratch.path() / "run.jsonl"), HasSubstr(R"("loss":null)"));
  EXPECT_FALSE(read_run_lines(scratch.path()).at(0).step().has_loss());
}

TEST(RunRecorder, ResumeKeepsTheRecordMonotone) {
  const ScratchDirectory scratch;
  write_run(scratch.path(), 12);
  {
    RunRecorder recorder(scratch.path(), 10);
    recorder.write(start_record(10));
    for (Index step = 11; step <= 14; ++step) recorder.write(step_record(step));
  }
  EXPECT_THAT(steps_of(scratch.path()), testing::ElementsAre(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14));
  const auto lines = read_run_lines(scratch.path());
  EXPECT_EQ(std::ranges::count_if(lines, &RunLine::has_validation), 2);
  EXPECT_EQ(std::ranges::count_if(lines, &RunLine::has_start), 2);
  // Resumed once more, further back: the second start goes as well.
  { RunRecorder recorder(scratch.path(), 4); }
  EXPECT_THAT(steps_of(scratch.path()), testing::ElementsAre(1, 2, 3, 4));
  EXPECT_EQ(read_run_lines(scratch.path()).size(), 5u);
}

TEST(RunRecorder, ResumeDropsALineCutShort) {
  const ScratchDirectory scratch;
  write_run(scratch.path(), 3);
  const path file = scratch.path() / "run.jsonl";
  std::filesystem::resize_file(file, std::filesystem::file_size(file) - 9);
  {
    RunRecorder recorder(scratch.path(), 3);
    recorder.write(step_record(4));
  }
  EXPECT_THAT(steps_of(scratch.path()), testing::ElementsAre(1, 2, 4));
}

TEST(RunRecorder, NewRunReplacesTheRecordAndItsSummary) {
  const ScratchDirectory scratch;
  write_run(scratch.path(), 3);
  { RunRecorder(scratch.path(), 3).write(RunSummary()); }
  EXPECT_TRUE(std::filesystem::exists(scratch.path() / "summary.json"));
  { RunRecorder recorder(scratch.path()); }
  EXPECT_TRUE(read_run_lines(scratch.path()).empty());
  EXPECT_FALSE(std::filesystem::exists(scratch.path() / "summary.json"));
}

TEST(RunRecorder, SummaryReturnsWhatWasWritten) {
  const ScratchDirectory scratch;
  RunSummary summary;
  summary.set_name("quickstart");
  summary.set_profile("structural");
  summary.set_final_validation_loss(2.375);
  summary.set_counted_factor_bytes(1234567890123);
  TransferSum& sum = *summary.add_transfers();
  sum.set_axis("replica");
  sum.set_purpose("factor");
  sum.set_payload_bytes(42);
  RunRecorder(scratch.path()).write(summary);
  EXPECT_EQ(read_run_summary(scratch.path()).SerializeAsString(), summary.SerializeAsString());
}

TEST(RunRecorder, TwoRunsDoNotWriteIntoOneFolder) {
  const ScratchDirectory scratch;
  {
    RunRecorder first(scratch.path());
    EXPECT_THAT(thrown_message<IoError>([&] { RunRecorder second(scratch.path()); }),
                testing::HasSubstr("found another run that is writing here"));
  }
  EXPECT_NO_THROW(RunRecorder(scratch.path()));
}

TEST(RunRecorder, NamesWhatCannotBeReadOrWritten) {
  const ScratchDirectory scratch;
  const path blocked = scratch.write("file", "in the way") / "run";
  EXPECT_THAT(thrown_message<IoError>([&] { RunRecorder recorder(blocked); }),
              HasSubstr("file/run: cannot create"));
  EXPECT_THAT(thrown_message<IoError>([&] { read_run_summary(scratch.path()); }),
              HasSubstr("summary.json: cannot open: No such file"));
  scratch.write("run.jsonl", "{\"step\":{\"step\":1}}\n{\"step\":{\"stop\":1}}\n");
  EXPECT_THAT(thrown_message<IoError>([&] { read_run_lines(scratch.path()); }),
              HasSubstr("run.jsonl: line 2: "));
}

TEST(TransferSums, AddOperationsOfOneAxisAndPurpose) {
  Ledger ledger;
  ledger.begin_step();
  ledger.record({"replica", Purpose::kFactor, Operation::kReduceScatter, 100, 50, 60, 0.25}, {}, 4);
  ledger.record({"replica", Purpose::kFactor, Operation::kAllGather, 11, 5, 6, 0.5}, {}, 4);
  ledger.record({"tensor", Purpose::kActivation, Operation::kAllReduce, 7, 7, 7, 0}, {}, 4);
  const auto sums = transfer_sums(ledger.step());
  ASSERT_EQ(sums.size(), 2u);
  EXPECT_EQ(sums[0].axis(), "replica");
  EXPECT_EQ(sums[0].purpose(), purpose_name(Purpose::kFactor));
  EXPECT_EQ(sums[0].calls(), 2);
  EXPECT_EQ(sums[0].payload_bytes(), 111);
  EXPECT_EQ(sums[0].modelled_wire_bytes(), 55);
  EXPECT_EQ(sums[0].transport_bytes(), 66);
  EXPECT_EQ(sums[0].seconds(), 0.75);
  EXPECT_EQ(sums[1].axis(), "tensor");
}

}  // namespace
}  // namespace lowband
