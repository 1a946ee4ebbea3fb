#include "launcher/bench/bench_picture.h"

#include "launcher/picture/gnuplot.h"
#include "runtime/error.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace lowband {
namespace {

std::vector<ExchangeLine> sorted_lines(const BenchReport& report, const std::string& wire) {
  std::vector<ExchangeLine> lines;
  std::ranges::copy_if(report.lines(), std::back_inserter(lines),
                       [&](const ExchangeLine& line) { return line.wire() == wire; });
  std::ranges::stable_sort(lines, {}, &ExchangeLine::equivalent_factor_rank);
  return lines;
}

struct Series {
  const char* wire;
  const char* colour;
  const AllReduceLine* dense;  // null when it was not measured
};

/// The curves of one panel: `column` of the csv for the exchanges, a line across for each dense all-reduce.
template <class Across>
std::string plot(const BenchReport& report, const std::vector<Series>& series, int column, Across across) {
  std::string curves;
  for (const Series& s : series) {
    if (!sorted_lines(report, s.wire).empty())
      curves += cat("  csv using (strcol(1) eq '", s.wire, "' ? $2 : NaN):", column,
                    " with linespoints linewidth 2 pointtype 7 pointsize 0.8 linecolor rgb '", s.colour,
                    "' title 'factors, ", s.wire, "', \\\n");
    // Uniform ranks can be read from the axis.
    if (!sorted_lines(report, s.wire).empty())
      curves +=
          cat("  csv using (strcol(1) eq '", s.wire,
              "' && strstrt(strcol(5), 'uniform') != 1 ? $2 : NaN):", column,
              ":5 with labels noenhanced right offset -1,0.5 textcolor rgb '", s.colour, "' notitle, \\\n");
    if (s.dense != nullptr)
      curves += cat("  ", across(*s.dense), " with lines linewidth 2 dashtype 2 linecolor rgb '", s.colour,
                    "' title 'dense all-reduce, ", s.wire, "', \\\n");
  }
  return cat("plot \\\n", curves, "  NaN notitle\n");
}

std::string instructions(const BenchReport& report, const std::string& stem) {
  double low = report.break_even_rank();
  double high = report.break_even_rank();
  for (const ExchangeLine& line : report.lines()) {
    low = std::min(low, line.equivalent_factor_rank());
    high = std::max(high, line.equivalent_factor_rank());
  }
  const std::vector<Series> series{
      {"f32", "#1f5fa8", report.has_dense_f32() ? &report.dense_f32() : nullptr},
      {"bf16", "#d9652b", report.has_dense_bf16() ? &report.dense_bf16() : nullptr}};
  const std::string title =
      cat("Exchange of ", report.model(), "'s factors, ", report.processes_size(), " processes, ",
          report.backend(), report.link().empty() ? "" : ", " + report.link());
  const std::string panels = cat(
      "set multiplot layout 2,1 title ", gnuplot_text(title), " noenhanced font 'sans,14'\n",
      "set ylabel 'seconds per synchronisation'\n",
      plot(report, series, 3, [](const AllReduceLine& dense) { return dense.time().p50_us() / 1e6; }),
      "set xlabel 'factor rank (profiles: the uniform rank of equal B(r))'\n",
      "set ylabel 'payload in bytes'\n",
      plot(report, series, 4, [](const AllReduceLine& dense) { return static_cast<double>(dense.bytes()); }),
      "unset multiplot\nunset xlabel\n");
  return cat(
      "# gnuplot: draws ", stem, ".png and ", stem, ".svg from ", stem, ".csv\n",
      "csv = ", gnuplot_text(stem + ".csv"),
      "\nset datafile separator comma\nset logscale xy\nset key outside right top noenhanced spacing 1.3\n",
      "set grid linecolor rgb '#dddddd'\nset border 3 linecolor rgb '#444444'\nset tics nomirror\n",
      "set format y '%.1s%c'\nset samples 2\n", "set xrange [", low / 1.5, ":", high * 1.5, "]\n",
      "set arrow 1 from ", report.break_even_rank(), ", graph 0 to ", report.break_even_rank(),
      ", graph 1 nohead dashtype 3 linecolor rgb '#444444'\n", "set label 1 ",
      gnuplot_text(cat("break-even ", std::round(report.break_even_rank() * 10) / 10)), " at ",
      report.break_even_rank(), ", graph 0.05 right offset -0.5,0\n",
      "set terminal pngcairo size 1200, 900 font 'sans,12'\nset output ", gnuplot_text(stem + ".png"), "\n",
      panels, "set terminal svg size 1200, 900 dynamic font 'sans,12' background '#ffffff'\nset output ",
      gnuplot_text(stem + ".svg"), "\n", panels);
}

}  // namespace

std::string bench_csv(const BenchReport& report) {
  std::string text = "wire,rank,seconds,payload_bytes,profile\n";
  for (const std::string wire : {"f32", "bf16"}) {
    for (const ExchangeLine& line : sorted_lines(report, wire))
      text += cat(wire, ",", line.equivalent_factor_rank(), ",", line.time().p50_us() / 1e6, ",",
                  line.payload_bytes(), ",", line.profile(), "\n");
  }
  return text;
}

void draw_bench(const BenchReport& report, const std::filesystem::path& stem) {
  LB_EXPECTS(report.lines_size() > 0, "picture: found no exchange, expected one or more");
  draw_with_gnuplot(stem, bench_csv(report), instructions(report, stem.filename().string()));
}

}  // namespace lowband
