#include "collectives/cuda/device_tree_reduction.h"
#include "runtime/cuda/elements.cuh"
#include "runtime/error.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace lowband {
namespace {

constexpr int kMaxTreeDepth = 16;  // 65536 processes, as on the host

struct Sum {
  template <class T>
  static __device__ T apply(T a, T b) {
    if constexpr (std::is_integral_v<T>) {
      using Unsigned = std::make_unsigned_t<T>;  // modulo 2^bits
      return static_cast<T>(static_cast<Unsigned>(a) + static_cast<Unsigned>(b));
    } else {
      return a + b;
    }
  }
};

struct Max {
  template <class T>
  static __device__ T apply(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) {
      if (b != b) return b;
    }
    return a < b ? b : a;
  }
};

// Parts come in the order of processes, and wait on a stack of sums of 2^k parts until another such sum is
// there to be added: as the carries of a binary counter. What is left in the end is added from the shortest
// to the longest, which is the tree of tree_reduction.h.
template <class Stored, class Out, class Op>
__global__ void reduce_tree_kernel(DeviceParts parts, Out* out, Index elements) {
  using T = decltype(widened(Stored{}));
  const auto* const own = reinterpret_cast<const Stored*>(parts.own);
  const auto* const others = reinterpret_cast<const Stored*>(parts.others);
  for (Index e = Index{blockIdx.x} * blockDim.x + threadIdx.x; e < elements;
       e += Index{gridDim.x} * blockDim.x) {
    T sums[kMaxTreeDepth + 1];
    int depth = 0;
    for (int p = 0; p < parts.processes; ++p) {
      const int back = (parts.process - p + parts.processes) % parts.processes;
      T sum = widened(back == 0 ? own[e] : others[(back - 1) * elements + e]);
      for (int carry = p; carry % 2 == 1; carry /= 2) sum = Op::apply(sums[--depth], sum);
      sums[depth++] = sum;
    }
    T result = sums[--depth];
    while (depth > 0) result = Op::apply(sums[--depth], result);
    out[e] = narrowed<Out>(result);
  }
}

template <class Stored, class Out>
void reduce(const DeviceParts& parts, std::byte* out, Index elements, Reduction reduction,
            const CudaStream& stream) {
  const auto kernel = reduction == Reduction::kSum ? reduce_tree_kernel<Stored, Out, Sum>
                                                   : reduce_tree_kernel<Stored, Out, Max>;
  launch("reduce_tree", stream, {blocks_for(elements), kElementThreads}, kernel, parts,
         reinterpret_cast<Out*>(out), elements);
}

}  // namespace

void device_reduce_tree(const DeviceParts& parts, std::byte* out, Index elements, DType dtype,
                        DType out_dtype, Reduction reduction, const CudaStream& stream) {
  LB_EXPECTS(out_dtype == dtype || (dtype == DType::kBF16 && out_dtype == DType::kF32),
             "device_reduce_tree: ", dtype_name(dtype), " to ", dtype_name(out_dtype),
             ", expected one dtype, or bf16 to f32");
  if (elements == 0) return;
  switch (dtype) {
    case DType::kF32:
      return reduce<float, float>(parts, out, elements, reduction, stream);
    case DType::kF64:
      return reduce<double, double>(parts, out, elements, reduction, stream);
    case DType::kU8:
      return reduce<std::uint8_t, std::uint8_t>(parts, out, elements, reduction, stream);
    case DType::kI64:
      return reduce<std::int64_t, std::int64_t>(parts, out, elements, reduction, stream);
    case DType::kBF16:
      if (out_dtype == DType::kF32) return reduce<BFloat16, float>(parts, out, elements, reduction, stream);
      return reduce<BFloat16, BFloat16>(parts, out, elements, reduction, stream);
  }
}

}  // namespace lowband
