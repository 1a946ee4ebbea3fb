#pragma once

#include "runtime/types.h"

#include <string>

namespace lowband {

/// What this processor can do and which kernels the libraries actually run on it.
struct CpuInfo {
  std::string model;
  bool avx2 = false;    // with FMA
  bool avx512 = false;  // F, BW, DQ, VL
  int cores = 1;        // that this process may run on
};
CpuInfo cpu_info();

/// The kernel set the linked BLAS selected ("Haswell", "SkylakeX", "Prescott", ...), or "unknown" for a BLAS
/// that does not say.
std::string blas_core_name();

/// Instruction set of lowband's own vector kernels: "avx512", "avx2" or "baseline".
std::string vector_kernel_name();

/// GEMM libraries behind `gemm<float>` and `gemm<double>`, with versions.
std::string gemm_library_name();

/// OpenBLAS falls back to SSE3 kernels on processors it does not know, a factor of five. The choice is made
/// in the library's constructor, so this sets OPENBLAS_CORETYPE and executes the program again, once.
///
/// Call it first in main. Returns when the kernels are right, when the user set OPENBLAS_CORETYPE, or when a
/// second execution could not cure it.
void ensure_fast_blas_kernels(char** argv);

/// Most memory that was resident at once in this program so far, as the system counts it.
Index peak_memory_bytes();

/// Sets the number of compute threads of this thread's later calls, for every library underneath.
/// Throws: InvalidArgument outside 1 .. most_compute_threads().
void set_compute_threads(int threads);
int compute_threads();
/// 1 in a build without OpenMP, otherwise OpenMP's own limit.
int most_compute_threads();

}  // namespace lowband
