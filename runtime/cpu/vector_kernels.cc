#include "runtime/vector_kernels.h"

#include "runtime/cpu.h"
#include "runtime/cpu/kernels/runnable.h"
#include "runtime/cpu/kernels/tables.h"

namespace lowband {

// Fastest first.
template <class Real>
std::vector<NamedVectorKernels<Real>> runnable_vector_kernels() {
  const CpuInfo info = cpu_info();
  using namespace kernel_tables;
  return runnable<Real, NamedVectorKernels, VectorKernels>(
      {{"avx512", info.avx512, avx512::float_kernels, avx512::double_kernels},
       {"avx2", info.avx2, avx2::float_kernels, avx2::double_kernels},
       {"baseline", true, baseline::float_kernels, baseline::double_kernels}});
}

template <class Real>
const VectorKernels<Real>& vector_kernels() {
  static const VectorKernels<Real>* const fastest = runnable_vector_kernels<Real>().front().kernels;
  return *fastest;
}

template std::vector<NamedVectorKernels<float>> runnable_vector_kernels<float>();
template std::vector<NamedVectorKernels<double>> runnable_vector_kernels<double>();
template const VectorKernels<float>& vector_kernels<float>();
template const VectorKernels<double>& vector_kernels<double>();

}  // namespace lowband
