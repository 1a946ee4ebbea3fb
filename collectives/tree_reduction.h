#pragma once

#include "collectives/call.h"
#include "runtime/types.h"

#include <cstddef>
#include <span>

namespace lowband {

/// out[e] <- reduction of parts[0][e] ... parts[n-1][e], formed as a fixed binary tree over the part numbers:
/// a range of n parts is (its first 2^k) op (the rest), 2^k the largest power of two below n. So five parts
/// are summed as ((0+1)+(2+3))+4, and the sum of 2^k equal parts is exact.
///
/// DType: summed in `dtype`, integers modulo 2^bits. Parts of bf16 are summed in float32; `out_dtype` says
/// whether that sum is wanted, kF32, or rounded once, kBF16. Otherwise it equals `dtype`. A maximum with a
/// NaN is that NaN.
/// `out` may be one of the parts when `out_dtype` is `dtype`, and may not overlap any of them otherwise. At
/// most 65536 parts.
void reduce_tree(std::span<const std::byte* const> parts, std::byte* out, Index elements, DType dtype,
                 DType out_dtype, Reduction reduction);

}  // namespace lowband
