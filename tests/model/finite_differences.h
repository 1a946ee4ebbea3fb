#pragma once

#include "runtime/tensor.h"

#include <cmath>
#include <functional>
#include <span>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

namespace lowband::finite_differences {

/// sqrt(sum (a - b)^2 / sum b^2)
inline double relative_frobenius(std::span<const double> a, std::span<const double> b) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return std::sqrt(difference / norm);
}

/// Compares `gradient` with the differences of `loss` in every element of `x`, which is restored.
///
/// Fourth order in h = 1e-3: the error is h^4 f^(5) / 30 + 1.5 eps |loss| / h, both below 1e-11 here.
inline void expect_gradient(std::string_view name, std::span<double> x, std::span<const double> gradient,
                            const std::function<double()>& loss, double tolerance = 1e-7) {
  constexpr double h = 1e-3;
  std::vector<double> numeric;
  for (double& element : x) {
    const double center = element;
    const auto at = [&](double offset) {
      element = center + offset;
      return loss();
    };
    numeric.push_back((8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h));
    element = center;
  }
  ASSERT_EQ(numeric.size(), gradient.size());
  EXPECT_LE(relative_frobenius(gradient, numeric), tolerance) << name;
}

}  // namespace lowband::finite_differences
