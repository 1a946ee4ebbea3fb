#include "runtime/numbers.h"

#include "runtime/copy.h"
#include "runtime/passes.h"

#include <algorithm>
#include <cmath>

namespace lowband {
namespace {

// The one place of numbers, of whatever type.
template <class First, class... Rest>
Device* place_of(const char* function, const First& first, const Rest&... rest) {
  return computing_device<float>(function, first, rest...);
}

}  // namespace

void zero(MatrixView<double> x) {
  if (x.elements() == 0) return;
  if (x.device != nullptr) return x.device->zero(x.data, x.elements() * static_cast<Index>(sizeof(double)));
  std::ranges::fill(x.flat(), 0.0);
}

void find_nan(MatrixView<const double> x, MatrixView<std::uint8_t> flags) {
  if (Device* const device = place_of("find_nan", x, flags)) return device->find_nan(x, flags.data);
  for (Index k = 0; k < x.cols; ++k) flags(0, k) = std::isnan(x(0, k));
}

template <class Real>
void find_equal(Real value, MatrixView<const Real> x, MatrixView<const std::uint8_t> flag,
                MatrixView<std::uint8_t> found) {
  if (Device* const device = computing_device<Real>("find_equal", x, flag, found)) {
    if constexpr (kOnDevices<Real>) return device->find_equal(value, x.data, flag.data, found.data);
  }
  *found.data = *flag.data != 0 || *x.data == value;
}

void add_unflagged(MatrixView<const Index> places, MatrixView<const double> x,
                   MatrixView<const std::uint8_t> flags, double divisor, MatrixView<double> sum) {
  if (Device* const device = place_of("add_unflagged", places, x, flags, sum))
    return device->add_unflagged(places, x.data, flags.data, divisor, sum.data);
  double found = 0;
  for (const Index p : places.flat()) {
    if (flags(0, p) == 0) found += x(0, p);
  }
  *sum.data += found / divisor;
}

void add_squares(MatrixView<const double> x, MatrixView<double> sum) {
  if (Device* const device = place_of("add_squares", x, sum)) return device->add_squares(x, sum.data);
  for (const double number : x.flat()) *sum.data += number * number;
}

void square_roots(MatrixView<double> x) {
  if (Device* const device = place_of("square_roots", x)) return device->square_roots(x);
  for (double& number : x.flat()) number = std::sqrt(number);
}

void clip(double limit, MatrixView<const double> squares, double last_divisor,
          MatrixView<double> norm_and_scale) {
  if (Device* const device = place_of("clip", squares, norm_and_scale))
    return device->clip(limit, squares.data, last_divisor, norm_and_scale.data);
  const double norm = std::sqrt(squares(0, 0) + squares(0, 1) + squares(0, 2) / last_divisor);
  norm_and_scale(0, 0) = norm;
  norm_and_scale(0, 1) = norm > limit ? limit / norm : 1;
}

template <class Real>
void divide_by_norm(MatrixView<const double> square, double safety, double epsilon, MatrixView<Real> x) {
  if (Device* const device = computing_device<Real>("divide_by_norm", square, x)) {
    if constexpr (kOnDevices<Real>) return device->divide_by_norm(square.data, safety, epsilon, x);
  }
  scale<Real>(static_cast<Real>(1 / (safety * std::sqrt(*square.data) + epsilon)), x);
}

template <class Real>
void divide_columns(MatrixView<const double> norms, Real epsilon, MatrixView<Real> x) {
  LB_EXPECTS(norms.elements() == x.cols, "divide_columns: found ", norms.elements(), " norms, expected ",
             x.cols);
  if (Device* const device = computing_device<Real>("divide_columns", norms, x)) {
    if constexpr (kOnDevices<Real>) return device->divide_columns(norms.data, epsilon, x);
  }
  std::vector<Real> quotients;
  for (const double norm : norms.flat()) quotients.push_back(Real{1} / (static_cast<Real>(norm) + epsilon));
  scale_columns<Real>(quotients, x);
}

bool is_set(MatrixView<const std::uint8_t> flag) { return *OnHost<std::uint8_t>(flag).view().data != 0; }

template <class Real>
Real on_host(const Scalar& scalar) {
  const OnHost<double> number(scalar.number);
  return Scalar{number.view(), scalar.divisor}.value<Real>();
}

#define LB_INSTANTIATE(Real)                                                                      \
  template void find_equal<Real>(Real, MatrixView<const Real>, MatrixView<const std::uint8_t>,    \
                                 MatrixView<std::uint8_t>);                                       \
  template void divide_by_norm<Real>(MatrixView<const double>, double, double, MatrixView<Real>); \
  template void divide_columns<Real>(MatrixView<const double>, Real, MatrixView<Real>);           \
  template Real on_host<Real>(const Scalar&);
LB_INSTANTIATE(float)
LB_INSTANTIATE(double)
#undef LB_INSTANTIATE

}  // namespace lowband
