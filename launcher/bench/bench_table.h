#pragma once

#include "launcher/bench/bench.pb.h"

#include <string>

namespace lowband {

// The report as text in the manner of nccl-tests: lines of comment begin with '#', others are results.

/// What is known before the first result.
std::string bench_header(const BenchReport& report);
/// Headings of the columns of exchanges and of plain all-reduces.
std::string exchange_headings();
std::string size_headings();
std::string exchange_row(const ExchangeLine& line);
/// A dense base line, in the columns of the exchanges.
std::string dense_row(const AllReduceLine& line);
std::string size_row(const AllReduceLine& line);
std::string bench_footer(const BenchReport& report);

}  // namespace lowband
