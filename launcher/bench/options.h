#pragma once

#include "launcher/arguments.h"
#include "sharding/rank_profile.h"
#include "trainer/config/run_config.h"

#include <chrono>
#include <string>
#include <vector>

namespace lowband {

/// Element type of what is sent.
enum class BenchWire : std::uint8_t { kF32, kBF16 };
std::string_view wire_name(BenchWire wire);

/// What `lowband bench comm` is to measure.
struct CommBenchOptions {
  std::string model;                  // preset or configuration file; empty when only `sizes` are measured
  std::vector<RankProfile> profiles;  // of the same matrices
  std::vector<BenchWire> wires;
  std::vector<Index> sizes;  // bytes of plain all-reduces, ascending
  Index warmup = 5;
  Index iterations = 20;
  Index base_iterations = 5;  // dense all-reduces per line; 0: no base lines
  Index checks = 1;           // runs on exact data after the timed ones; 0: none
  double min_time_seconds = 0;
  bool with_products = false;
  bool on_device = false;  // what is exchanged lies in the memory of CUDA devices
  std::string link;
  std::string interface;
  std::chrono::milliseconds deadline{60'000};  // of every collective
  int threads = 0;                             // of the configuration; 0: not said
  bool json_to_output = false;
  std::string json_file;  // empty: none
  std::string picture;    // stem; empty: none
};

/// Takes all arguments of `lowband bench comm`.
///
/// Throws: InvalidArgument naming the argument, IoError for a configuration that cannot be read.
CommBenchOptions comm_bench_options(Arguments arguments, int processes);

/// "8:64M:4" -> 8, 32, 128, ... up to 64 MiB: BEGIN:END[:FACTOR] in bytes, with K, M, G for powers of 1024;
/// FACTOR 2 without it. Throws: InvalidArgument naming --sizes.
std::vector<Index> parse_sizes(const std::string& text);

}  // namespace lowband
