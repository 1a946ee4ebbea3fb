#include "runtime/vector_kernels.h"

#include "runtime/cpu.h"
#include "runtime/cpu/kernels/tables.h"

#include <type_traits>

namespace lowband {

// Fastest first.
template <class Real>
std::vector<NamedVectorKernels<Real>> runnable_vector_kernels() {
  const CpuInfo info = cpu_info();
  std::vector<NamedVectorKernels<Real>> sets;
  const auto add = [&sets](std::string_view name, const auto* float_kernels, const auto* double_kernels) {
    if constexpr (std::is_same_v<Real, float>) {
      sets.push_back({name, float_kernels});
    } else {
      sets.push_back({name, double_kernels});
    }
  };
  using namespace kernel_tables;
  if (info.avx512) add("avx512", avx512::float_kernels, avx512::double_kernels);
  if (info.avx2) add("avx2", avx2::float_kernels, avx2::double_kernels);
  add("baseline", baseline::float_kernels, baseline::double_kernels);
  return sets;
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
