#include "launcher/bench/comm_bench.h"

#include "collectives/local/local_world.h"
#include "launcher/bench/bench_table.h"
#include "tests/launcher/bench/corrupting_communicator.h"

#include <atomic>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#include <gmock/gmock.h>

namespace lowband {
namespace {

using testing::HasSubstr;

CommBenchOptions small(int processes, const std::vector<std::string>& more = {}) {
  std::vector<std::string> words{"--preset",   "smoke",    "--ranks", "1,5",          "--profile",
                                 "structural", "--warmup", "1",       "--iterations", "3"};
  words.insert(words.end(), more.begin(), more.end());
  return comm_bench_options(Arguments(words), processes);
}

/// The reports of all processes.
std::vector<BenchReport> reports(int processes, const std::vector<std::string>& more = {}) {
  std::vector<BenchReport> all(static_cast<std::size_t>(processes));
  run_world(processes, [&](Communicator& world) {
    all[static_cast<std::size_t>(world.process())] = run_comm_bench(world, small(processes, more));
  });
  return all;
}

class Processes : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Counts, Processes, testing::Values(1, 2, 3, 4));

TEST_P(Processes, BytesAreThoseOfTheProfilesAndNothingIsWrong) {
  const int n = GetParam();
  const CommBenchOptions options = small(n);
  const BenchReport report = reports(n, {"--sizes", "4:4K:32"}).front();
  ASSERT_EQ(report.lines_size(), 6);  // structural, uniform:1, uniform:5; f32 and bf16
  ASSERT_EQ(report.sizes_size(), 6);
  EXPECT_EQ(report.wrong(), 0);
  EXPECT_EQ(report.processes_size(), n);
  EXPECT_EQ(report.backend(), "local");
  for (int i = 0; i < report.lines_size(); ++i) {
    const ExchangeLine& line = report.lines(i);
    const RankProfile& profile = options.profiles[static_cast<std::size_t>(i / 2)];
    const Index element_bytes = i % 2 == 0 ? 4 : 2;
    SCOPED_TRACE(line.profile() + " " + line.wire());
    EXPECT_EQ(line.profile(), profile.name);
    EXPECT_EQ(line.wire(), i % 2 == 0 ? "f32" : "bf16");
    // sum of r (m + n), formed anew
    Index payload = 0;
    Index dense = 0;
    Index outcomes = 0;
    for (std::size_t l = 0; l < profile.matrices.size(); ++l) {
      payload += profile.factor_ranks[l] * (profile.matrices[l].rows + profile.matrices[l].cols);
      dense += profile.matrices[l].rows * profile.matrices[l].cols;
      outcomes += 1 + profile.factor_ranks[l];
    }
    EXPECT_EQ(line.payload_bytes(), payload * element_bytes);
    EXPECT_EQ(line.dense_bytes(), dense * element_bytes);
    EXPECT_DOUBLE_EQ(line.dense_over_payload(), static_cast<double>(dense) / static_cast<double>(payload));
    // Two rings of the payload, with which the outcomes ride.
    EXPECT_EQ(line.control_wire_bytes(), 2 * (n - 1) * outcomes * element_bytes);
    EXPECT_EQ(line.modelled_wire_bytes(), 2 * (n - 1) * line.payload_bytes() + line.control_wire_bytes());
    EXPECT_EQ(line.transport_bytes(), line.modelled_wire_bytes());
    EXPECT_EQ(line.transport_deviation_percent(), 0);
    ASSERT_TRUE(line.has_wrong());
    EXPECT_EQ(line.wrong(), 0);
    EXPECT_EQ(line.ring().wrong(), 0);
    EXPECT_EQ(line.ring().bytes(), line.payload_bytes());
    // bf16 has 2^-9 of relative rounding in what is sent and in what comes back, and P of a square of random
    // numbers (structural) has them multiplied by its condition; f32 has 2^-24.
    EXPECT_LT(line.relative_error(), i % 2 == 0 ? 2e-6 : 5e-2);
    EXPECT_GT(line.relative_error(), 0);
    EXPECT_EQ(line.time().iterations(), 3);
    EXPECT_GE(line.time().p99_us(), line.time().p50_us());
    EXPECT_GE(line.time().p50_us(), line.time().min_us());
    EXPECT_NEAR(line.busbw(), line.algbw() * 2 * (n - 1) / n, 1e-9 * line.algbw());
    EXPECT_NEAR(line.algbw() * line.dense_over_payload(), line.effective_bw(), 1e-9 * line.effective_bw());
    EXPECT_EQ(line.has_busbw_over_ring(), n > 1);
    EXPECT_EQ(line.has_speedup_over_dense_f32(), n > 1);
    EXPECT_FALSE(line.has_interface_bytes());
  }
  EXPECT_EQ(report.dense_f32().bytes(), report.lines(0).dense_bytes());
  EXPECT_EQ(report.dense_bf16().bytes(), report.lines(1).dense_bytes());
  // In each of 3 iterations of 6 lines; more than 3 base iterations were asked for.
  EXPECT_EQ(report.dense_f32().time().iterations(), 18);
  EXPECT_EQ(report.sizes(0).bytes(), 4);
  EXPECT_EQ(report.sizes(5).bytes(), 4096);
  EXPECT_EQ(report.sizes(5).dtype(), "bf16");
  // One ring each, however small.
  std::vector<AllReduceLine> all_reduces{report.dense_f32(), report.dense_bf16()};
  for (const ExchangeLine& line : report.lines()) all_reduces.push_back(line.ring());
  all_reduces.insert(all_reduces.end(), report.sizes().begin(), report.sizes().end());
  for (const AllReduceLine& line : all_reduces) {
    SCOPED_TRACE(cat(line.bytes(), " ", line.dtype()));
    EXPECT_EQ(line.modelled_wire_bytes(), 2 * (n - 1) * line.bytes());
    EXPECT_EQ(line.transport_bytes(), line.modelled_wire_bytes());
    EXPECT_EQ(line.transport_deviation_percent(), 0);
    EXPECT_FALSE(line.has_interface_bytes());
  }
}

TEST(CommBench, AllProcessesReportTheSame) {
  const auto all = reports(3);
  // But for the clock of the header and footer.
  for (const BenchReport& report : all) {
    ASSERT_EQ(report.lines_size(), all[0].lines_size());
    for (int i = 0; i < report.lines_size(); ++i)
      EXPECT_EQ(report.lines(i).SerializeAsString(), all[0].lines(i).SerializeAsString());
  }
}

TEST(CommBench, WithoutChecksAndBaseLinesItSaysSo) {
  const BenchReport report = reports(2, {"--check", "0", "--base-iterations", "0", "--wire", "f32"}).front();
  EXPECT_FALSE(report.has_dense_f32());
  EXPECT_FALSE(report.lines(0).has_wrong());
  EXPECT_FALSE(report.lines(0).has_speedup_over_dense_f32());
  EXPECT_TRUE(report.lines(0).has_busbw_over_ring());
  EXPECT_THAT(exchange_row(report.lines(0)), HasSubstr("N/A"));
  EXPECT_THAT(bench_footer(report), HasSubstr("not checked"));
}

TEST(CommBench, AtLeastTheTimeAskedForIsMeasured) {
  const BenchReport report =
      reports(2, {"--min-time", "0.05", "--check", "0", "--wire", "f32", "--base-iterations", "1"}).front();
  for (const ExchangeLine& line : report.lines()) {
    EXPECT_GT(line.time().iterations(), 3);
    EXPECT_EQ(line.ring().time().iterations(), line.time().iterations());
  }
  EXPECT_EQ(report.dense_f32().time().iterations(), report.lines_size());
}

TEST(CommBench, ProductsBelongToTheTimeWhenAskedFor) {
  const BenchReport with = reports(2, {"--with-products"}).front();
  EXPECT_EQ(with.wrong(), 0);
  EXPECT_GT(with.lines(0).phases().products_us(), 0);
  EXPECT_EQ(reports(2).front().lines(0).phases().products_us(), 0);
}

TEST(CommBench, LoopbackOfSharedProcessesHasNoDeviation) {
  const BenchReport report = reports(2, {"--interface", "lo", "--wire", "f32", "--sizes", "4K:4K"}).front();
  EXPECT_TRUE(report.lines(0).has_interface_bytes());
  EXPECT_FALSE(report.lines(0).has_interface_deviation_percent());
  for (const AllReduceLine& line :
       {report.lines(0).ring(), report.dense_f32(), report.dense_bf16(), report.sizes(0)}) {
    EXPECT_TRUE(line.has_interface_bytes());
    EXPECT_FALSE(line.has_interface_deviation_percent());
  }
}

TEST(CommBench, AMissingInterfaceStopsAllProcesses) {
  std::atomic<int> refused = 0;
  run_world(2, [&](Communicator& world) {
    try {
      run_comm_bench(world, small(2, {"--interface", "nowhere7"}));
    } catch (const InvalidArgument&) {
      ++refused;
    }
    world.barrier();
  });
  EXPECT_EQ(refused, 2);
}

// A transport that delivers one wrong value is seen, whichever operation and element type it strikes.
TEST(CommBench, AWrongValueFromTheTransportIsCounted) {
  const auto wrong_with = [](Operation corrupted, const std::string& wire) {
    BenchReport report;
    std::mutex mutex;
    run_world(3, [&](Communicator& inner) {
      CorruptingCommunicator world(inner, corrupted);
      const BenchReport own = run_comm_bench(world, small(3, {"--wire", wire}));
      const std::lock_guard lock(mutex);
      report = own;
    });
    return report;
  };
  for (const std::string wire : {"f32", "bf16"}) {
    SCOPED_TRACE(wire);
    // Broadcasts carry neither factors nor dense tensors.
    EXPECT_EQ(wrong_with(Operation::kBroadcast, wire).wrong(), 0);

    const BenchReport all_reduce = wrong_with(Operation::kAllReduce, wire);
    EXPECT_GT(all_reduce.lines(0).ring().wrong(), 0);
    EXPECT_GT(all_reduce.dense_f32().wrong(), 0);
    EXPECT_GT(all_reduce.dense_bf16().wrong(), 0);
    EXPECT_GT(all_reduce.wrong(), 0);
    EXPECT_THAT(bench_footer(all_reduce), HasSubstr("FAILED"));

    for (const Operation operation : {Operation::kReduceScatter, Operation::kAllGather}) {
      const BenchReport exchange = wrong_with(operation, wire);
      for (const ExchangeLine& line : exchange.lines()) EXPECT_GT(line.wrong(), 0) << line.profile();
      EXPECT_EQ(exchange.dense_f32().wrong(), 0);
    }
  }
}

TEST(BenchTable, EveryRowHasTheColumnsOfItsHeadings) {
  const BenchReport report = reports(2, {"--sizes", "8:8"}).front();
  const auto words = [](const std::string& text) {
    std::istringstream stream(text);
    std::vector<std::string> all;
    for (std::string word; stream >> word;) all.push_back(word);
    return all;
  };
  const auto second_line = [](const std::string& text) { return text.substr(text.find('\n') + 1); };
  const std::string headings = second_line(exchange_headings());
  // Without '#'; "x f32", "x bf16" and "if d" are two words each.
  const std::size_t columns = words(headings.substr(0, headings.find('\n'))).size() - 1 - 3;
  EXPECT_EQ(words(exchange_row(report.lines(2))).size(), columns);
  EXPECT_EQ(words(dense_row(report.dense_f32())).size(), columns + 1);  // "dense all-reduce"
  EXPECT_EQ(words(size_row(report.sizes(0))).size(), 17u);
  EXPECT_THAT(bench_header(report), HasSubstr("every process is a replica"));
  EXPECT_THAT(bench_header(report), HasSubstr("without the products"));
}

}  // namespace
}  // namespace lowband
