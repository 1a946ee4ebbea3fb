#include "collectives/tree_reduction.h"

#include "runtime/error.h"
#include "runtime/vector_kernels.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <type_traits>
#include <vector>

namespace lowband {
namespace {

// Elements are reduced tile by tile, so that intermediate nodes of the tree stay in the first-level cache
// and every part is read from memory once: 256 elements are at most 2 KiB per node.
constexpr Index kTileElements = 256;
constexpr int kMaxTreeDepth = 16;
// A path from the root to a leaf keeps two operands per level.
constexpr Index kScratchElements = 2 * kMaxTreeDepth * kTileElements;

struct Sum {
  template <class T>
  static T apply(T a, T b) {
    if constexpr (std::is_integral_v<T>) {
      using Unsigned = std::make_unsigned_t<T>;
      return static_cast<T>(static_cast<Unsigned>(a) + static_cast<Unsigned>(b));
    } else {
      return a + b;
    }
  }
};

struct Max {
  template <class T>
  static T apply(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) {
      if (b != b) return b;
    }
    return a < b ? b : a;
  }
};

// Returns where the numbers [begin, begin + count) of `part` lie as T: in the part itself, or widened in
// `widened`.
template <class Stored, class T>
const T* leaf(const std::byte* part, Index begin, Index count, T* widened) {
  const Stored* const numbers = reinterpret_cast<const Stored*>(part) + begin;
  if constexpr (std::is_same_v<Stored, T>) {
    return numbers;
  } else {
    vector_kernels<T>().widen_bf16(numbers, widened, count);
    return widened;
  }
}

// Returns where the reduction of elements [begin, begin + count) of `parts` lies: in `destination`, or in
// place when there is only one part.
template <class Stored, class T, class Op>
const T* reduce_node(std::span<const std::byte* const> parts, Index begin, Index count, T* destination,
                     T* scratch) {
  if (parts.size() == 1) return leaf<Stored, T>(parts[0], begin, count, destination);
  const std::size_t half = std::bit_floor(parts.size() - 1);
  T* const left_scratch = scratch;
  T* const right_scratch = scratch + kTileElements;
  T* const deeper = scratch + 2 * kTileElements;
  const T* const left = reduce_node<Stored, T, Op>(parts.first(half), begin, count, left_scratch, deeper);
  const T* const right = reduce_node<Stored, T, Op>(parts.subspan(half), begin, count, right_scratch, deeper);
#pragma omp simd
  for (Index e = 0; e < count; ++e) destination[e] = Op::apply(left[e], right[e]);
  return destination;
}

template <class Stored, class T, class Out, class Op>
void reduce_tiles(std::span<const std::byte* const> parts, std::byte* out, Index elements) {
  std::array<T, kScratchElements> scratch;
  std::array<T, kTileElements> unrounded;
  Out* const result = reinterpret_cast<Out*>(out);
  for (Index begin = 0; begin < elements; begin += kTileElements) {
    const Index count = std::min(kTileElements, elements - begin);
    if constexpr (std::is_same_v<T, Out>) {
      const T* const tile = reduce_node<Stored, T, Op>(parts, begin, count, result + begin, scratch.data());
      if (tile != result + begin) std::copy_n(tile, count, result + begin);
    } else {
      const T* const tile = reduce_node<Stored, T, Op>(parts, begin, count, unrounded.data(), scratch.data());
      vector_kernels<T>().round_to_bf16(tile, result + begin, count);
    }
  }
}

template <class Stored, class T = Stored, class Out = T>
void reduce_elements(std::span<const std::byte* const> parts, std::byte* out, Index elements,
                     Reduction reduction) {
  switch (reduction) {
    case Reduction::kSum:
      return reduce_tiles<Stored, T, Out, Sum>(parts, out, elements);
    case Reduction::kMax:
      return reduce_tiles<Stored, T, Out, Max>(parts, out, elements);
  }
}

}  // namespace

void reduce_tree(std::span<const std::byte* const> parts, std::byte* out, Index elements, DType dtype,
                 DType out_dtype, Reduction reduction) {
  LB_EXPECTS(!parts.empty() && parts.size() <= (std::size_t{1} << kMaxTreeDepth),
             "reduce_tree: ", parts.size(), " parts, expected 1 to 65536");
  LB_EXPECTS(out_dtype == dtype || (dtype == DType::kBF16 && out_dtype == DType::kF32),
             "reduce_tree: ", dtype_name(dtype), " to ", dtype_name(out_dtype),
             ", expected one dtype, or bf16 to f32");
  switch (dtype) {
    case DType::kF32:
      return reduce_elements<float>(parts, out, elements, reduction);
    case DType::kF64:
      return reduce_elements<double>(parts, out, elements, reduction);
    case DType::kU8:
      return reduce_elements<std::uint8_t>(parts, out, elements, reduction);
    case DType::kI64:
      return reduce_elements<std::int64_t>(parts, out, elements, reduction);
    case DType::kBF16:
      if (out_dtype == DType::kF32) return reduce_elements<BFloat16, float>(parts, out, elements, reduction);
      return reduce_elements<BFloat16, float, BFloat16>(parts, out, elements, reduction);
  }
}

}  // namespace lowband
