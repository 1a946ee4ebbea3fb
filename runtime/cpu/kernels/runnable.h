#pragma once

#include <initializer_list>
#include <string_view>
#include <type_traits>
#include <vector>

namespace lowband {

/// Kernels compiled for one instruction set, and whether this processor has it.
template <template <class> class Kernels>
struct CompiledKernels {
  std::string_view name;
  bool runs;
  const Kernels<float>* float_kernels;
  const Kernels<double>* double_kernels;
};

/// Those of `compiled` that run here, for Real, in the same order. Named: {name, kernels}.
template <class Real, template <class> class Named, template <class> class Kernels>
std::vector<Named<Real>> runnable(std::initializer_list<CompiledKernels<Kernels>> compiled) {
  std::vector<Named<Real>> sets;
  for (const CompiledKernels<Kernels>& set : compiled) {
    if (!set.runs) continue;
    if constexpr (std::is_same_v<Real, float>) {
      sets.push_back({set.name, set.float_kernels});
    } else {
      sets.push_back({set.name, set.double_kernels});
    }
  }
  return sets;
}

}  // namespace lowband
