#include "runtime/cpu.h"

#include <gtest/gtest.h>

int main(int argc, char** argv) {
  lowband::ensure_fast_blas_kernels(argv);
  testing::InitGoogleTest(&argc, argv);
  lowband::set_compute_threads(1);  // worlds of threads stand for processes; see docs/numerics.md
  return RUN_ALL_TESTS();
}
