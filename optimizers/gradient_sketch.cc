#include "optimizers/gradient_sketch.h"

#include "runtime/device.h"
#include "runtime/error.h"
#include "runtime/numbers.h"
#include "runtime/random.h"
#include "runtime/sketch_hash.h"

#include <algorithm>
#include <numeric>

namespace lowband {
namespace {

/// buckets[j] += sign * values[j]
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define LB_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define LB_VECTOR_CLONES
#endif
LB_VECTOR_CLONES void add_signed(const float* values, Index count, std::uint32_t key, std::uint32_t col,
                                 double* buckets) {
  for (Index j = 0; j < count; ++j)
    buckets[j] += static_cast<double>(sketch_sign(key, col + static_cast<std::uint32_t>(j)) * values[j]);
}
LB_VECTOR_CLONES void add_signed(const double* values, Index count, std::uint32_t key, std::uint32_t col,
                                 double* buckets) {
  for (Index j = 0; j < count; ++j)
    buckets[j] += static_cast<double>(sketch_sign(key, col + static_cast<std::uint32_t>(j))) * values[j];
}

}  // namespace

GradientSketch::GradientSketch(MatrixView<double> buckets, std::uint64_t seed, Index step)
    : buckets_(buckets), seed_(seed), step_(step) {
  LB_EXPECTS(buckets.elements() == kBuckets, "sketch: found ", buckets.elements(), " buckets, expected ",
             kBuckets);
  zero(buckets);
}

// Columns are cut into segments as long as the sketch. A segment of one row is added to consecutive buckets,
// from a random one on and around the end: within a segment no two elements meet, and two elements of
// different segments meet with probability 1 / kBuckets, which is all that the variance needs. Signs are
// random per element.
template <class Real>
void GradientSketch::add(std::string_view name, MatrixView<const Real> piece, Index row, Index col) {
  const std::uint64_t parameter = RandomStream(seed_, name, step_).bits(0);
  if (Device* const device = computing_device<Real>("sketch", piece, buckets_)) {
    if constexpr (kOnDevices<Real>) return device->add_to_sketch(parameter, piece, row, col, buckets_);
  }
  for (Index i = 0; i < piece.rows; ++i) {
    const Real* values = piece.row(i);
    Index j = 0;
    while (j < piece.cols) {
      const Index segment = (col + j) / kBuckets;
      const SketchSegment place(parameter, row + i, segment, kBuckets);
      const Index bucket = (place.offset + col + j) % kBuckets;
      const Index count = std::min({piece.cols - j, (segment + 1) * kBuckets - (col + j), kBuckets - bucket});
      add_signed(values + j, count, place.key, static_cast<std::uint32_t>(col + j), buckets_.data + bucket);
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
