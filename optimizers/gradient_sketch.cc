#include "optimizers/gradient_sketch.h"

#include "runtime/error.h"
#include "runtime/random.h"

#include <algorithm>
#include <numeric>

namespace lowband {
namespace {

/// splitmix64's finaliser: every input bit reaches every output bit.
std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

/// 1 or -1 from the low word of `key` and the column; 32-bit arithmetic, because processors multiply it in
/// vectors. The rounds are those of murmur3's finaliser.
inline float sign_of(std::uint32_t key, std::uint32_t col) {
  std::uint32_t x = col * 0x9e3779b1u ^ key;
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return (x ^ (x >> 16)) & 1u ? 1.0f : -1.0f;
}

/// buckets[j] += sign * values[j]
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define LB_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define LB_VECTOR_CLONES
#endif
LB_VECTOR_CLONES void add_signed(const float* values, Index count, std::uint32_t key, std::uint32_t col,
                                 double* buckets) {
  for (Index j = 0; j < count; ++j)
    buckets[j] += static_cast<double>(sign_of(key, col + static_cast<std::uint32_t>(j)) * values[j]);
}
LB_VECTOR_CLONES void add_signed(const double* values, Index count, std::uint32_t key, std::uint32_t col,
                                 double* buckets) {
  for (Index j = 0; j < count; ++j)
    buckets[j] += static_cast<double>(sign_of(key, col + static_cast<std::uint32_t>(j))) * values[j];
}

}  // namespace

GradientSketch::GradientSketch(std::span<double> buckets, std::uint64_t seed, Index step)
    : buckets_(buckets), seed_(seed), step_(step) {
  LB_EXPECTS(static_cast<Index>(buckets.size()) == kBuckets, "sketch: found ", buckets.size(),
             " buckets, expected ", kBuckets);
  std::ranges::fill(buckets, 0.0);
}

// Columns are cut into segments as long as the sketch. A segment of one row is added to consecutive buckets,
// from a random one on and around the end: within a segment no two elements meet, and two elements of
// different segments meet with probability 1 / kBuckets, which is all that the variance needs. Signs are
// random per element.
template <class Real>
void GradientSketch::add(std::string_view name, MatrixView<const Real> piece, Index row, Index col) {
  const std::uint64_t parameter = RandomStream(seed_, name, step_).bits(0);
  for (Index i = 0; i < piece.rows; ++i) {
    const std::uint64_t row_key = mix(parameter + static_cast<std::uint64_t>(row + i));
    const Real* values = piece.row(i);
    Index j = 0;
    while (j < piece.cols) {
      const Index segment = (col + j) / kBuckets;
      const std::uint64_t key = mix(row_key + static_cast<std::uint64_t>(segment));
      const Index offset = static_cast<Index>(key >> 32) % kBuckets;
      const Index bucket = (offset + col + j) % kBuckets;
      const Index count = std::min({piece.cols - j, (segment + 1) * kBuckets - (col + j), kBuckets - bucket});
      add_signed(values + j, count, static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(col + j),
                 buckets_.data() + bucket);
      j += count;
    }
  }
}

double estimated_sum_of_squares(std::span<const double> buckets) {
  return std::inner_product(buckets.begin(), buckets.end(), buckets.begin(), 0.0);
}

template void GradientSketch::add<float>(std::string_view, MatrixView<const float>, Index, Index);
template void GradientSketch::add<double>(std::string_view, MatrixView<const double>, Index, Index);

}  // namespace lowband
