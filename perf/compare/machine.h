#pragma once

namespace lowband {

/// What one thread of this machine can do. Units: bytes and flops per second; best of several measurements.
struct Machine {
  // Plain loops over more memory than the last-level cache holds.
  double read = 0;        // sum of the elements of x
  double update = 0;      // x <- a x, read and written
  double accumulate = 0;  // y <- y + a x: the triad, in place
  double write = 0;       // x <- 0
  // Independent fused multiply-adds on registers.
  double float_flops = 0;
  double double_flops = 0;
};

/// Takes about a second. Throws: Error on a processor without AVX2 and FMA.
Machine measure_machine();

}  // namespace lowband
