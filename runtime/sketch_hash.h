#pragma once

#include "runtime/elementwise_math.h"
#include "runtime/types.h"

#include <cstdint>

namespace lowband {

// Where a gradient sketch (optimizers/gradient_sketch.h) puts an element, for the host and the device.

/// splitmix64's finaliser: every input bit reaches every output bit.
LB_HOST_DEVICE inline std::uint64_t mix_bits(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31);
}

/// Columns [segment kBuckets, (segment + 1) kBuckets) of one row: column c goes to bucket (offset + c) mod
/// kBuckets.
struct SketchSegment {
  std::uint32_t key;  // of the signs
  Index offset;

  LB_HOST_DEVICE SketchSegment(std::uint64_t parameter, Index row, Index segment, Index buckets) {
    const std::uint64_t row_key = mix_bits(parameter + static_cast<std::uint64_t>(row));
    const std::uint64_t bits = mix_bits(row_key + static_cast<std::uint64_t>(segment));
    key = static_cast<std::uint32_t>(bits);
    offset = static_cast<Index>(bits >> 32) % buckets;
  }
};

/// 1 or -1 from the key of a segment and the column; 32-bit arithmetic, because processors multiply it in
/// vectors. The rounds are those of murmur3's finaliser.
LB_HOST_DEVICE inline float sketch_sign(std::uint32_t key, std::uint32_t col) {
  std::uint32_t x = col * 0x9e3779b1U ^ key;
  x = (x ^ (x >> 16)) * 0x85ebca6bU;
  x = (x ^ (x >> 13)) * 0xc2b2ae35U;
  return (x ^ (x >> 16)) & 1U ? 1.0F : -1.0F;
}

}  // namespace lowband
