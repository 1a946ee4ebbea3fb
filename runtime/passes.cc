#include "runtime/passes.h"

#include "runtime/copy.h"
#include "runtime/device.h"
#include "runtime/linalg.h"
#include "runtime/vector_kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace lowband {
namespace {

template <class First, class... Rest>
void expect_equal_shapes(const char* function, const First& first, const Rest&... rest) {
  const auto expect_same = [&](const auto& other) {
    LB_EXPECTS(other.rows == first.rows && other.cols == first.cols, function, ": found matrices (",
               first.rows, ", ", first.cols, ") and (", other.rows, ", ", other.cols,
               "), expected equal shapes");
  };
  (expect_same(rest), ...);
}

template <class Real>
void expect_one_for_each(const char* function, std::size_t numbers, Index expected) {
  LB_EXPECTS(static_cast<Index>(numbers) == expected, function, ": found ", numbers, " numbers, expected ",
             expected);
}

/// Calls sum(numbers of the device) and brings these to `sums`, of the host.
template <class Sum>
void sum_on(Device* device, std::span<double> sums, Sum sum) {
  Buffer<double> there(std::ssize(sums), device);
  sum(there.data());
  copy<double>(there.line(), MatrixView<double>(sums.data(), 1, std::ssize(sums)));
}

Index place(std::span<const Index> places, Index k) { return places[static_cast<std::size_t>(k)]; }

template <class Real>
void expect_slices(const char* function, bool of_rows, std::span<const Index> places,
                   MatrixView<const Real> x, MatrixView<const Real> u) {
  const Index count = std::ssize(places), slices = of_rows ? x.rows : x.cols;
  LB_EXPECTS((of_rows ? u.rows : u.cols) == count && (of_rows ? u.cols == x.cols : u.rows == x.rows),
             function, ": found ", count, of_rows ? " rows" : " columns", " of (", x.rows, ", ", x.cols,
             ") and U (", u.rows, ", ", u.cols, ")");
  for (const Index k : places)
    LB_EXPECTS(k >= 0 && k < slices, function, ": found slice ", k, ", expected one of ", slices);
}

/// Calls visit(rows' first elements..., count) for as few stretches of elements as the strides allow.
template <class Visit, class First, class... Rest>
void for_each_stretch(Visit visit, const First& first, const Rest&... rest) {
  if (first.elements() == 0) return;
  if (first.contiguous() && (rest.contiguous() && ...))
    return visit(first.data, rest.data..., first.elements());
  for (Index i = 0; i < first.rows; ++i) visit(first.row(i), rest.row(i)..., first.cols);
}

/// Every element and its square are finite. Counting in integers as wide as the elements is what compilers
/// make a vector loop of: 1.7 ms for 12.6 million floats instead of 11 with a bool.
template <class Real>
bool usable(MatrixView<const Real> x) {
  using Flags = std::conditional_t<sizeof(Real) == 4, std::int32_t, std::int64_t>;
  const Real limit = std::sqrt(std::numeric_limits<Real>::max());
  Flags unusable = 0;
  for_each_stretch(
      [&](const Real* elements, Index n) {
        for (Index k = 0; k < n; ++k) unusable |= !(std::abs(elements[k]) <= limit);
      },
      x);
  return unusable == 0;
}

/// In one pass when all is well: terms that add up to a number of type Real are such numbers.
template <class Real>
double usable_sum_of_squares(MatrixView<const Real> x) {
  const double squares = sum_of_squares<Real>(x);
  const bool all_well = squares <= static_cast<double>(std::numeric_limits<Real>::max()) || usable<Real>(x);
  return all_well ? squares : std::numeric_limits<double>::quiet_NaN();
}

template <class Real>
void add_squares(const Real* x, double* sums, Index n) {
  for (Index j = 0; j < n; ++j) sums[j] += static_cast<double>(x[j]) * static_cast<double>(x[j]);
}

/// Few columns are added several rows at a time, so that vector registers fill.
template <class Real>
void add_squares_of_columns(MatrixView<const Real> x, double* sums) {
  constexpr Index kWidth = 64;
  const Index rows_at_once = x.cols == 0 ? 1 : std::max<Index>(1, kWidth / x.cols);
  if (rows_at_once == 1 || !x.contiguous()) {
    for (Index i = 0; i < x.rows; ++i) add_squares(x.row(i), sums, x.cols);
    return;
  }
  double wide[kWidth] = {};
  const Index width = rows_at_once * x.cols;
  for (Index begin = 0; begin < x.elements(); begin += width)
    add_squares(x.data + begin, wide, std::min(width, x.elements() - begin));
  for (Index l = 0; l < width; ++l) sums[l % x.cols] += wide[l];
}

template <class Step, class Real>
void update_one_moment(const Step& step, MatrixView<const Real> g, MatrixView<Real> m, MatrixView<Real> w) {
  for_each_stretch(
      [&](const Real* gradient, Real* moment, Real* weight, Index n) {
        for (Index k = 0; k < n; ++k) step(gradient[k], moment[k], weight[k]);
      },
      g, m, w);
}

}  // namespace

template <class Real>
void fill(Real value, MatrixView<Real> x) {
  if (Device* const device = computing_device<Real>("fill", x)) {
    if constexpr (kOnDevices<Real>) return device->fill(value, x);
  }
  for_each_stretch([=](Real* elements, Index n) { std::fill_n(elements, n, value); }, x);
}

template <class Real>
void add(Real alpha, MatrixView<const Real> x, Real beta, MatrixView<Real> y) {
  expect_equal_shapes("add", x, y);
  if (Device* const device = computing_device<Real>("add", x, y)) {
    if constexpr (kOnDevices<Real>) return device->add(alpha, x, beta, y);
  }
  const VectorKernels<Real>& kernels = vector_kernels<Real>();
  for_each_stretch(
      [&](const Real* from, Real* to, Index n) {
        if (beta == Real{0}) {
          for (Index k = 0; k < n; ++k) to[k] = alpha * from[k];
        } else if (beta == Real{1}) {
          kernels.axpy(alpha, from, to, n);
        } else {
          kernels.accumulate(alpha, from, beta, to, n);
        }
      },
      x, y);
}

template <class Real>
void add(const Scalar& alpha, MatrixView<const Real> x, Real beta, MatrixView<Real> y) {
  expect_equal_shapes("add", x, y);
  if (Device* const device = computing_device<Real>("add", x, y, alpha.number)) {
    if constexpr (kOnDevices<Real>) return device->add(alpha, x, beta, y);
  }
  add<Real>(alpha.value<Real>(), x, beta, y);
}

template <class Real>
void scale(Real alpha, MatrixView<Real> x) {
  if (Device* const device = computing_device<Real>("scale", x)) {
    if constexpr (kOnDevices<Real>) return device->add(alpha, x, 0, x);
  }
  for_each_stretch([=](Real* elements, Index n) { vector_kernels<Real>().scale(alpha, elements, n); }, x);
}

template <class Real>
void scale_rows(std::span<const Real> factors, MatrixView<Real> x) {
  expect_one_for_each<Real>("scale_rows", factors.size(), x.rows);
  if (Device* const device = computing_device<Real>("scale_rows", x)) {
    if constexpr (kOnDevices<Real>) return device->scale_rows(factors, x);
  }
  for (Index i = 0; i < x.rows; ++i)
    vector_kernels<Real>().scale(factors[static_cast<std::size_t>(i)], x.row(i), x.cols);
}

template <class Real>
void scale_columns(std::span<const Real> factors, MatrixView<Real> x) {
  expect_one_for_each<Real>("scale_columns", factors.size(), x.cols);
  if (Device* const device = computing_device<Real>("scale_columns", x)) {
    if constexpr (kOnDevices<Real>) return device->scale_columns(factors, x);
  }
  for (Index i = 0; i < x.rows; ++i) {
    for (Index j = 0; j < x.cols; ++j) x(i, j) *= factors[static_cast<std::size_t>(j)];
  }
}

template <class Real>
void round_to_bf16(MatrixView<const Real> x, MatrixView<BFloat16> y) {
  expect_equal_shapes("round_to_bf16", x, y);
  if (Device* const device = computing_device<Real>("round_to_bf16", x, y)) {
    if constexpr (kOnDevices<Real>) return device->round(x, y);
  }
  for_each_stretch(vector_kernels<Real>().round_to_bf16, x, y);
}

template <class Real>
void widen_bf16(MatrixView<const BFloat16> x, MatrixView<Real> y) {
  expect_equal_shapes("widen_bf16", x, y);
  if (Device* const device = computing_device<Real>("widen_bf16", x, y)) {
    if constexpr (kOnDevices<Real>) return device->widen(x, y);
  }
  for_each_stretch(vector_kernels<Real>().widen_bf16, x, y);
}

template <class Real>
void update(const AdamWStep<Real>& step, MatrixView<const Real> g, MatrixView<Real> m, MatrixView<Real> v,
            MatrixView<Real> w) {
  expect_equal_shapes("update", g, m, v, w);
  if (Device* const device = computing_device<Real>("update", g, m, v, w)) {
    if constexpr (kOnDevices<Real>) return device->update(step, g, m, v, w);
  }
  for_each_stretch(
      [&](const Real* gradient, Real* first, Real* second, Real* weight, Index n) {
        adamw_update<Real>(weight, first, second, gradient, n, step.beta1, step.beta2, step.step_size,
                           step.inv_sqrt_correction2, step.epsilon, step.decay, step.gradient_scale);
      },
      g, m, v, w);
}

template <class Real>
void update(const AdamDirection<Real>& step, MatrixView<const Real> g, MatrixView<Real> m1,
            MatrixView<Real> m2, MatrixView<Real> n) {
  expect_equal_shapes("update", g, m1, m2, n);
  if (Device* const device = computing_device<Real>("update", g, m1, m2, n)) {
    if constexpr (kOnDevices<Real>) return device->update(step, g, m1, m2, n);
  }
  for_each_stretch(
      [&](const Real* gradient, Real* first, Real* second, Real* direction, Index count) {
        for (Index k = 0; k < count; ++k) step(gradient[k], first[k], second[k], direction[k]);
      },
      g, m1, m2, n);
}

template <class Real>
void update(const LionStep<Real>& step, MatrixView<const Real> g, MatrixView<Real> m, MatrixView<Real> w) {
  expect_equal_shapes("update", g, m, w);
  if (Device* const device = computing_device<Real>("update", g, m, w)) {
    if constexpr (kOnDevices<Real>) return device->update(step, Scalar{}, g, m, w);
  }
  update_one_moment(step, g, m, w);
}

template <class Real>
void update(const SgdStep<Real>& step, MatrixView<const Real> g, MatrixView<Real> v, MatrixView<Real> w) {
  expect_equal_shapes("update", g, v, w);
  if (Device* const device = computing_device<Real>("update", g, v, w)) {
    if constexpr (kOnDevices<Real>) return device->update(step, Scalar{}, g, v, w);
  }
  update_one_moment(step, g, v, w);
}

template <class Real>
void update(const AdamWRule<Real>& rule, const Scalar& gradient_scale, MatrixView<Real> t,
            MatrixView<const Real> g, MatrixView<Real> m, MatrixView<Real> v, MatrixView<Real> w) {
  expect_equal_shapes("update", g, m, v, w);
  if (Device* const device = computing_device<Real>("update", g, m, v, w, t, gradient_scale.number)) {
    if constexpr (kOnDevices<Real>) return device->update(rule, gradient_scale, t, g, m, v, w);
  }
  *t.data += 1;
  update<Real>(rule.step(static_cast<double>(*t.data), gradient_scale.value<Real>()), g, m, v, w);
}

template <class Real>
void update(const LionStep<Real>& step, const Scalar& gradient_scale, MatrixView<const Real> g,
            MatrixView<Real> m, MatrixView<Real> w) {
  expect_equal_shapes("update", g, m, w);
  if (Device* const device = computing_device<Real>("update", g, m, w, gradient_scale.number)) {
    if constexpr (kOnDevices<Real>) return device->update(step, gradient_scale, g, m, w);
  }
  LionStep<Real> scaled = step;
  scaled.gradient_scale = gradient_scale.value<Real>();
  update<Real>(scaled, g, m, w);
}

template <class Real>
void update(const SgdStep<Real>& step, const Scalar& gradient_scale, MatrixView<const Real> g,
            MatrixView<Real> v, MatrixView<Real> w) {
  expect_equal_shapes("update", g, v, w);
  if (Device* const device = computing_device<Real>("update", g, v, w, gradient_scale.number)) {
    if constexpr (kOnDevices<Real>) return device->update(step, gradient_scale, g, v, w);
  }
  SgdStep<Real> scaled = step;
  scaled.gradient_scale = gradient_scale.value<Real>();
  update<Real>(scaled, g, v, w);
}

template <class Real>
void take_slices(bool of_rows, std::span<const Index> places, MatrixView<const Real> x, MatrixView<Real> u) {
  expect_slices("take_slices", of_rows, places, x, MatrixView<const Real>(u));
  if (Device* const device = computing_device<Real>("take_slices", x, u)) {
    if constexpr (kOnDevices<Real>) return device->take_slices(of_rows, places, x, u);
  }
  for (Index i = 0; i < u.rows; ++i) {
    for (Index j = 0; j < u.cols; ++j)
      u(i, j) = x(of_rows ? place(places, i) : i, of_rows ? j : place(places, j));
  }
}

template <class Real>
void add_to_slices(Real alpha, MatrixView<const Real> u, bool of_rows, std::span<const Index> places,
                   MatrixView<Real> x) {
  expect_slices("add_to_slices", of_rows, places, MatrixView<const Real>(x), u);
  if (Device* const device = computing_device<Real>("add_to_slices", u, x)) {
    if constexpr (kOnDevices<Real>) return device->add_to_slices(alpha, u, of_rows, places, x);
  }
  for (Index i = 0; i < u.rows; ++i) {
    if (of_rows) {
      vector_kernels<Real>().axpy(alpha, u.row(i), x.row(place(places, i)), u.cols);
      continue;
    }
    for (Index j = 0; j < u.cols; ++j) {
      Real& element = x(i, place(places, j));
      element = std::fma(alpha, u(i, j), element);
    }
  }
}

template <class Real>
double inner_product(MatrixView<const Real> x, MatrixView<const Real> y) {
  expect_equal_shapes("inner_product", x, y);
  if (Device* const device = computing_device<Real>("inner_product", x, y)) {
    double sum = 0;
    if constexpr (kOnDevices<Real>)
      sum_on(device, {&sum, 1}, [&](double* there) { device->inner_product(x, y, there); });
    return sum;
  }
  double sum = 0;
  for_each_stretch(
      [&](const Real* a, const Real* b, Index n) {
        for (Index k = 0; k < n; ++k) sum += static_cast<double>(a[k]) * static_cast<double>(b[k]);
      },
      x, y);
  return sum;
}

template <class Real>
void sums_of_magnitudes(bool of_rows, MatrixView<const Real> x, std::span<double> sums) {
  expect_one_for_each<Real>("sums_of_magnitudes", sums.size(), of_rows ? x.rows : x.cols);
  if (Device* const device = computing_device<Real>("sums_of_magnitudes", x)) {
    if constexpr (kOnDevices<Real>)
      return sum_on(device, sums, [&](double* there) { device->sums_of_magnitudes(of_rows, x, there); });
  }
  std::ranges::fill(sums, 0.0);
  for (Index i = 0; i < x.rows; ++i) {
    for (Index j = 0; j < x.cols; ++j)
      sums[static_cast<std::size_t>(of_rows ? i : j)] += std::abs(static_cast<double>(x(i, j)));
  }
}

template <class Real>
void usable_sums_of_squares(std::span<const MatrixView<const Real>> matrices, MatrixView<double> sums) {
  expect_one_for_each<Real>("usable_sums_of_squares", matrices.size(), sums.elements());
  if (matrices.empty()) return;
  for (const MatrixView<const Real>& matrix : matrices)
    computing_device<Real>("usable_sums_of_squares", matrices.front(), matrix, sums);
  if (Device* const device = sums.device) {
    if constexpr (kOnDevices<Real>) return device->sums_of_squares(matrices, true, sums.data);
  }
  for (std::size_t k = 0; k < matrices.size(); ++k) sums.data[k] = usable_sum_of_squares<Real>(matrices[k]);
}

template <class Real>
void usable_sums_of_squares(std::span<const MatrixView<const Real>> matrices, std::span<double> sums) {
  Buffer<double> found(std::ssize(sums), matrices.empty() ? nullptr : matrices.front().device);
  usable_sums_of_squares<Real>(matrices, found.line());
  copy<double>(found.line(), MatrixView<double>(sums.data(), 1, std::ssize(sums)));
}

template <class Real>
void sums_of_squares_of_rows(MatrixView<const Real> x, std::span<double> sums) {
  expect_one_for_each<Real>("sums_of_squares_of_rows", sums.size(), x.rows);
  if (Device* const device = computing_device<Real>("sums_of_squares_of_rows", x)) {
    if constexpr (kOnDevices<Real>)
      return sum_on(device, sums, [&](double* there) { device->sums_of_squares_of_rows(x, there); });
  }
  for (Index i = 0; i < x.rows; ++i)
    sums[static_cast<std::size_t>(i)] = vector_kernels<Real>().sum_of_squares(x.row(i), x.cols);
}

template <class Real>
void sums_of_squares_of_columns(std::span<const MatrixView<const Real>> matrices, MatrixView<double> sums) {
  Index columns = 0;
  for (const MatrixView<const Real>& matrix : matrices) {
    computing_device<Real>("sums_of_squares_of_columns", matrices.front(), matrix, sums);
    columns += matrix.cols;
  }
  expect_one_for_each<Real>("sums_of_squares_of_columns", static_cast<std::size_t>(sums.elements()), columns);
  if (matrices.empty()) return;
  if (Device* const device = sums.device) {
    if constexpr (kOnDevices<Real>) return device->sums_of_squares_of_columns(matrices, sums.data);
  }
  std::ranges::fill(sums.flat(), 0.0);
  double* of_matrix = sums.data;
  for (const MatrixView<const Real>& matrix : matrices) {
    add_squares_of_columns(matrix, of_matrix);
    of_matrix += matrix.cols;
  }
}

template <class Real>
void sums_of_squares_of_columns(std::span<const MatrixView<const Real>> matrices, std::span<double> sums) {
  Buffer<double> found(std::ssize(sums), matrices.empty() ? nullptr : matrices.front().device);
  sums_of_squares_of_columns<Real>(matrices, found.line());
  copy<double>(found.line(), MatrixView<double>(sums.data(), 1, std::ssize(sums)));
}

template <class Real>
double sum_of_squares(MatrixView<const Real> a) {
  if (Device* const device = computing_device<Real>("sum_of_squares", a)) {
    double sum = 0;
    if constexpr (kOnDevices<Real>)
      sum_on(device, {&sum, 1}, [&](double* there) { device->sums_of_squares({&a, 1}, false, there); });
    return sum;
  }
  const VectorKernels<Real>& kernels = vector_kernels<Real>();
  if (a.contiguous()) return kernels.sum_of_squares(a.data, a.elements());
  double sum = 0;
  for (Index i = 0; i < a.rows; ++i) sum += kernels.sum_of_squares(a.row(i), a.cols);
  return sum;
}

template <class Real>
void sum_of_squares(MatrixView<const Real> x, MatrixView<double> sum) {
  if (Device* const device = computing_device<Real>("sum_of_squares", x, sum)) {
    if constexpr (kOnDevices<Real>) return device->sums_of_squares({&x, 1}, false, sum.data);
  }
  *sum.data = sum_of_squares<Real>(x);
}

#define LB_INSTANTIATE(Real)                                                                                 \
  template void fill<Real>(Real, MatrixView<Real>);                                                          \
  template void add<Real>(Real, MatrixView<const Real>, Real, MatrixView<Real>);                             \
  template void add<Real>(const Scalar&, MatrixView<const Real>, Real, MatrixView<Real>);                    \
  template void update<Real>(const AdamWRule<Real>&, const Scalar&, MatrixView<Real>,                        \
                             MatrixView<const Real>, MatrixView<Real>, MatrixView<Real>, MatrixView<Real>);  \
  template void update<Real>(const LionStep<Real>&, const Scalar&, MatrixView<const Real>, MatrixView<Real>, \
                             MatrixView<Real>);                                                              \
  template void update<Real>(const SgdStep<Real>&, const Scalar&, MatrixView<const Real>, MatrixView<Real>,  \
                             MatrixView<Real>);                                                              \
  template void sum_of_squares<Real>(MatrixView<const Real>, MatrixView<double>);                            \
  template void usable_sums_of_squares<Real>(std::span<const MatrixView<const Real>>, MatrixView<double>);   \
  template void sums_of_squares_of_columns<Real>(std::span<const MatrixView<const Real>>,                    \
                                                 MatrixView<double>);                                        \
  template void scale<Real>(Real, MatrixView<Real>);                                                         \
  template void scale_rows<Real>(std::span<const Real>, MatrixView<Real>);                                   \
  template void scale_columns<Real>(std::span<const Real>, MatrixView<Real>);                                \
  template void round_to_bf16<Real>(MatrixView<const Real>, MatrixView<BFloat16>);                           \
  template void widen_bf16<Real>(MatrixView<const BFloat16>, MatrixView<Real>);                              \
  template void update<Real>(const AdamWStep<Real>&, MatrixView<const Real>, MatrixView<Real>,               \
                             MatrixView<Real>, MatrixView<Real>);                                            \
  template void update<Real>(const AdamDirection<Real>&, MatrixView<const Real>, MatrixView<Real>,           \
                             MatrixView<Real>, MatrixView<Real>);                                            \
  template void take_slices<Real>(bool, std::span<const Index>, MatrixView<const Real>, MatrixView<Real>);   \
  template void add_to_slices<Real>(Real, MatrixView<const Real>, bool, std::span<const Index>,              \
                                    MatrixView<Real>);                                                       \
  template double inner_product<Real>(MatrixView<const Real>, MatrixView<const Real>);                       \
  template void sums_of_magnitudes<Real>(bool, MatrixView<const Real>, std::span<double>);                   \
  template void update<Real>(const LionStep<Real>&, MatrixView<const Real>, MatrixView<Real>,                \
                             MatrixView<Real>);                                                              \
  template void update<Real>(const SgdStep<Real>&, MatrixView<const Real>, MatrixView<Real>,                 \
                             MatrixView<Real>);                                                              \
  template double sum_of_squares<Real>(MatrixView<const Real>);                                              \
  template void usable_sums_of_squares<Real>(std::span<const MatrixView<const Real>>, std::span<double>);    \
  template void sums_of_squares_of_rows<Real>(MatrixView<const Real>, std::span<double>);                    \
  template void sums_of_squares_of_columns<Real>(std::span<const MatrixView<const Real>>, std::span<double>);
LB_INSTANTIATE(float)
LB_INSTANTIATE(double)
#undef LB_INSTANTIATE

}  // namespace lowband
