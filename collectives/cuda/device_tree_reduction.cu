#include "collectives/cuda/device_tree_reduction.h"
#include "runtime/bfloat16.h"
#include "runtime/cuda/check.cuh"
#include "runtime/error.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace lowband {
namespace {

constexpr int kThreads = 256;
constexpr Index kMostBlocks = 16'384;
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

template <class Stored>
__device__ auto widened(Stored x) {
  if constexpr (std::is_same_v<Stored, BFloat16>) {
    return to_float(x);
  } else {
    return x;
  }
}

template <class Out, class T>
__device__ Out narrowed(T x) {
  if constexpr (std::is_same_v<Out, BFloat16>) {
    return to_bfloat16(x);
  } else {
    return x;
  }
}

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
void launch(const DeviceParts& parts, std::byte* out, Index elements, Reduction reduction,
            const CudaStream& stream) {
  const auto blocks =
      static_cast<unsigned>(std::clamp<Index>((elements + kThreads - 1) / kThreads, 1, kMostBlocks));
  auto* const result = reinterpret_cast<Out*>(out);
  if (reduction == Reduction::kSum) {
    reduce_tree_kernel<Stored, Out, Sum><<<blocks, kThreads, 0, stream.handle()>>>(parts, result, elements);
  } else {
    reduce_tree_kernel<Stored, Out, Max><<<blocks, kThreads, 0, stream.handle()>>>(parts, result, elements);
  }
  check_launch("reduce_tree");
}

}  // namespace

void device_reduce_tree(const DeviceParts& parts, std::byte* out, Index elements, DType dtype,
                        DType out_dtype, Reduction reduction, const CudaStream& stream) {
  LB_EXPECTS(out_dtype == dtype || (dtype == DType::kBF16 && out_dtype == DType::kF32),
             "device_reduce_tree: ", dtype_name(dtype), " to ", dtype_name(out_dtype),
             ", expected one dtype, or bf16 to f32");
  if (elements == 0) return;
  stream.make_current();
  switch (dtype) {
    case DType::kF32:
      return launch<float, float>(parts, out, elements, reduction, stream);
    case DType::kF64:
      return launch<double, double>(parts, out, elements, reduction, stream);
    case DType::kU8:
      return launch<std::uint8_t, std::uint8_t>(parts, out, elements, reduction, stream);
    case DType::kI64:
      return launch<std::int64_t, std::int64_t>(parts, out, elements, reduction, stream);
    case DType::kBF16:
      if (out_dtype == DType::kF32) return launch<BFloat16, float>(parts, out, elements, reduction, stream);
      return launch<BFloat16, BFloat16>(parts, out, elements, reduction, stream);
  }
}

}  // namespace lowband
