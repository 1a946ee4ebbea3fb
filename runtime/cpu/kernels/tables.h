#pragma once

#include "runtime/vector_kernels.h"

/// One pair of tables per compilation of kernels.cc.
namespace lowband::kernel_tables {

#define LB_DECLARE_KERNEL_SET(set)                          \
  namespace set {                                           \
  extern const VectorKernels<float>* const float_kernels;   \
  extern const VectorKernels<double>* const double_kernels; \
  }
LB_DECLARE_KERNEL_SET(baseline)
LB_DECLARE_KERNEL_SET(avx2)
LB_DECLARE_KERNEL_SET(avx512)
#undef LB_DECLARE_KERNEL_SET

}  // namespace lowband::kernel_tables
