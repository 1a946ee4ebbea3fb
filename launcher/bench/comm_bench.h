#pragma once

#include "collectives/communicator.h"
#include "launcher/bench/bench.pb.h"
#include "launcher/bench/options.h"

#include <functional>

namespace lowband {

/// Where results go while they come in, on one process; members may be empty.
struct BenchSink {
  std::function<void(const BenchReport&)> begun;  // all but results
  std::function<void(const ExchangeLine&)> line;
  std::function<void(const AllReduceLine&)> dense;  // base lines, after the lines
  std::function<void(const AllReduceLine&)> size;
};

/// Measures the exchange of every profile and wire, each in turns with a plain all-reduce of as many bytes
/// and with dense all-reduces of the same matrices; then plain all-reduces of `options.sizes`.
///
/// Every process is a replica. One iteration is isolated: a barrier, then exchange_left and exchange_right,
/// with orthonormalisation; products with the gradient belong to it only with `with_products`. Its time is
/// the maximum over processes. Afterwards the same object runs on exact data, and on random data against
/// float64.
///
/// Collective: all processes of `world`, equal options. The report is equal on all of them.
/// Throws: AgreedFailure when an interface is missing.
BenchReport run_comm_bench(Communicator& world, const CommBenchOptions& options, const BenchSink& sink = {});

}  // namespace lowband
