#pragma once

#include "launcher/bench/bench.pb.h"

#include <filesystem>
#include <string>

namespace lowband {

/// One row per exchange line: wire, equivalent rank, median time in seconds, payload bytes; sorted.
std::string bench_csv(const BenchReport& report);

/// Draws time and payload of the exchanges against rank, on logarithmic axes, with the dense base lines
/// across and the break-even rank upright. A profile stands at the uniform rank of equal B(r). Writes
/// STEM.csv, STEM.gp, STEM.png and STEM.svg.
///
/// Throws: InvalidArgument without exchange lines; as draw_with_gnuplot.
void draw_bench(const BenchReport& report, const std::filesystem::path& stem);

}  // namespace lowband
