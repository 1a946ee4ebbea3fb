#include "launcher/bench/bench_picture.h"

#include "runtime/types.h"
#include "tests/trainer/scratch_directory.h"

#include <cstdlib>

#include <gmock/gmock.h>

namespace lowband {
namespace {

using testing::HasSubstr;

BenchReport small_report() {
  BenchReport report;
  report.set_model("smoke");
  report.set_break_even_rank(40.73);
  const auto add = [&](const std::string& profile, const std::string& wire, double factor_rank) {
    ExchangeLine& line = *report.add_lines();
    line.set_profile(profile);
    line.set_wire(wire);
    line.set_equivalent_factor_rank(factor_rank);
    line.set_payload_bytes(static_cast<Index>(factor_rank * 1000));
    line.mutable_time()->set_p50_us(factor_rank * 10);
  };
  add("uniform:64", "f32", 64);
  add("uniform:4", "f32", 4);
  add("structural", "f32", 59.5);
  add("uniform:4", "bf16", 4);
  report.mutable_dense_f32()->set_bytes(40730);
  report.mutable_dense_f32()->mutable_time()->set_p50_us(400);
  return report;
}

TEST(BenchCsv, IsSortedByWireAndRank) {
  EXPECT_EQ(bench_csv(small_report()),
            "wire,rank,seconds,payload_bytes,profile\n"
            "f32,4,4e-05,4000,uniform:4\n"
            "f32,59.5,0.000595,59500,structural\n"
            "f32,64,0.00064,64000,uniform:64\n"
            "bf16,4,4e-05,4000,uniform:4\n");
}

TEST(DrawBench, ShowsCurvesBaseLinesAndBreakEven) {
  if (std::system("command -v gnuplot >/dev/null") != 0) GTEST_SKIP() << "no gnuplot";
  const ScratchDirectory scratch;
  const auto stem = scratch.path() / "bench";
  draw_bench(small_report(), stem);
  const std::string svg = read_text(stem.string() + ".svg");
  for (const char* part : {"factors, f32", "factors, bf16", "dense all-reduce, f32", "break-even 40.7",
                           "structural", "payload in bytes", "seconds per synchronisation"})
    EXPECT_THAT(svg, HasSubstr(part));
  EXPECT_THAT(svg, testing::Not(HasSubstr("dense all-reduce, bf16")));
  EXPECT_GT(std::filesystem::file_size(stem.string() + ".png"), 10000u);
}

TEST(DrawBench, NeedsAnExchange) {
  EXPECT_THAT(thrown_message<InvalidArgument>([] { draw_bench(BenchReport(), "x"); }),
              HasSubstr("found no exchange"));
}

}  // namespace
}  // namespace lowband
