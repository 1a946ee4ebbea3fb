#pragma once

#include "runtime/tensor.h"

#include <cstdint>
#include <iterator>
#include <span>
#include <string_view>

namespace lowband {

/// A linear count sketch of a set of matrices, from which the sum of their squares can be estimated.
///
/// Sketches add: the sum of the sketches of all pieces and all replicas is the sketch of the sum, although no
/// process ever held it. Which bucket and sign an element gets depends on (seed, step, parameter name, global
/// row and column) alone, never on the layout.
///
/// E[sum of squared buckets] = ||G||^2 with a relative standard deviation of at most sqrt(2 / kBuckets) = 2.2
/// %, so 1.1 % for the norm, for every G. Errors are nearly normal when many elements matter; when a few
/// carry everything, the estimate is nearly always exact and now and then, when two of them meet, far off.
/// Reference: Charikar, Chen, Farach-Colton 2002; second moment: Thorup and Zhang 2004.
class GradientSketch {
 public:
  static constexpr Index kBuckets = 4096;

  /// Empties `buckets`. The hash changes with the step, so that estimation errors are independent over steps.
  /// Ownership: borrows kBuckets doubles in one row, which the caller may sum over processes.
  GradientSketch(MatrixView<double> buckets, std::uint64_t seed, Index step);
  GradientSketch(std::span<double> buckets, std::uint64_t seed, Index step)
      : GradientSketch(MatrixView<double>(buckets.data(), 1, std::ssize(buckets)), seed, step) {}

  /// Adds a piece of parameter `name` whose first element is global element (row, col). It lies where the
  /// buckets do.
  template <class Real>
  void add(std::string_view name, MatrixView<const Real> piece, Index row, Index col);

 private:
  MatrixView<double> buckets_;
  std::uint64_t seed_;
  Index step_;
};

/// The estimate from the buckets of a (summed) sketch.
double estimated_sum_of_squares(std::span<const double> buckets);

}  // namespace lowband
