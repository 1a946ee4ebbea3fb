#include "runtime/vector_kernels.h"

#include "runtime/cpu.h"
#include "runtime/elementwise_math.h"
#include "runtime/random.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>

#include <gtest/gtest.h>

// The gradients of rms_norm, rotate and softmax are held against finite differences in
// tests/model/layers_test.cc.

namespace lowband {
namespace {

// Every remainder modulo 16 lanes, with none, one and several full packs before it.
std::vector<Index> lengths() {
  std::vector<Index> n(70);
  std::iota(n.begin(), n.end(), 1);
  return n;
}

template <class Real>
class VectorKernelsTest : public testing::Test {
 protected:
  static constexpr double kEps = std::numeric_limits<Real>::epsilon();

  // Normal numbers that differ at every index and name.
  static std::vector<Real> draw(std::string_view name, Index n, double deviation = 1.0) {
    const RandomStream stream(7, name);
    std::vector<Real> values(static_cast<std::size_t>(n));
    for (Index i = 0; i < n; ++i)
      values[static_cast<std::size_t>(i)] = static_cast<Real>(deviation * stream.normal(i));
    return values;
  }

  // Runs every kernel on n elements and returns all results.
  static std::vector<Real> everything(const VectorKernels<Real>& k, Index n) {
    std::vector<Real> log;
    const auto keep = [&log](const std::vector<Real>& v) { log.insert(log.end(), v.begin(), v.end()); };
    const auto a = draw("a", n, 3.0), b = draw("b", n, 3.0), c = draw("c", n, 3.0);
    auto x = a, y = b, z = c;
    k.add(x.data(), b.data(), n), keep(x);
    k.axpy(Real(0.3), a.data(), y.data(), n), keep(y);
    k.scale(Real(1.7), z.data(), n), keep(z);
    log.push_back(static_cast<Real>(k.sum_of_squares(a.data(), n)));
    log.push_back(static_cast<Real>(k.accumulate(Real(0.3), a.data(), Real(0.7), y.data(), n))), keep(y);
    log.push_back(k.all_finite(a.data(), n) ? 1 : 0);
    const Real s = k.rms_norm(a.data(), b.data(), Real(1e-5), x.data(), n);
    log.push_back(s), keep(x);
    x = c, y = c;
    k.rms_norm_backward(a.data(), b.data(), s, c.data(), x.data(), y.data(), n), keep(x), keep(y);
    k.swiglu(a.data(), b.data(), x.data(), n), keep(x);
    k.swiglu_backward(a.data(), b.data(), c.data(), x.data(), y.data(), n), keep(x), keep(y);
    if (n % 2 == 0) {
      x = a;
      k.rotate(x.data(), b.data(), c.data(), 1, n / 2), keep(x);
      k.rotate_back(x.data(), b.data(), c.data(), 1, n / 2), keep(x);
    }
    Real statistics[2];
    x = a;
    k.exp_row(x.data(), n, &statistics[0], &statistics[1]), keep(x), keep({statistics[0], statistics[1]});
    x = a, y = a, z = c;
    const Index visible = std::max<Index>(1, n - 3);
    k.softmax(x.data(), visible, n, Real(0.7), statistics), keep(x), keep({statistics[0], statistics[1]});
    k.softmax_again(y.data(), visible, n, Real(0.7), statistics), keep(y);
    k.softmax_backward(x.data(), z.data(), visible, n, Real(0.7)), keep(z);
    x = a, y = b, z = c;
    for (Real& v : z) v *= v;
    k.adamw_update(x.data(), y.data(), z.data(), b.data(), n, Real(0.9), Real(0.95), Real(0.01), Real(3),
                   Real(1e-8), Real(0.999), Real(0.5));
    keep(x), keep(y), keep(z);
    return log;
  }

  template <class Expected>
  static void expect_near(const std::vector<Real>& actual, Expected expected, double tolerance,
                          const char* what) {
    for (std::size_t i = 0; i < actual.size(); ++i)
      EXPECT_NEAR(static_cast<double>(actual[i]), expected(i), tolerance) << what << " at " << i;
  }
};
using Reals = testing::Types<float, double>;
TYPED_TEST_SUITE(VectorKernelsTest, Reals);

TYPED_TEST(VectorKernelsTest, EveryInstructionSetGivesTheSameBits) {
  const auto sets = runnable_vector_kernels<TypeParam>();
  ASSERT_EQ(sets.front().name, vector_kernel_name());
  ASSERT_EQ(sets.back().name, "baseline");
  for (const Index n : lengths()) {
    const auto expected = this->everything(*sets.back().kernels, n);
    for (const auto& set : sets) {
      const auto actual = this->everything(*set.kernels, n);
      ASSERT_EQ(actual.size(), expected.size());
      EXPECT_EQ(std::memcmp(actual.data(), expected.data(), actual.size() * sizeof(TypeParam)), 0)
          << set.name << " against baseline, n = " << n;
    }
  }
}

TYPED_TEST(VectorKernelsTest, ExpIsAccurateOverTheWholeRange) {
  const auto& k = vector_kernels<TypeParam>();
  const double low = std::is_same_v<TypeParam, float> ? -86.9 : -707.0;
  std::vector<TypeParam> x;
  for (int i = 0; i <= 20000; ++i) x.push_back(static_cast<TypeParam>(low * i / 20000));
  auto e = x;
  TypeParam maximum, sum;
  k.exp_row(e.data(), static_cast<Index>(e.size()), &maximum, &sum);
  EXPECT_EQ(maximum, 0);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double exact = std::exp(static_cast<double>(x[i]));
    ASSERT_NEAR(static_cast<double>(e[i]) / exact, 1.0, 2 * this->kEps) << "x = " << x[i];
  }
}

TYPED_TEST(VectorKernelsTest, ExpRowKeepsNaNAndAcceptsOneElement) {
  const auto& k = vector_kernels<TypeParam>();
  TypeParam x[3] = {TypeParam(-5), std::numeric_limits<TypeParam>::quiet_NaN(), TypeParam(-7)};
  TypeParam maximum, sum;
  k.exp_row(x, 3, &maximum, &sum);
  EXPECT_TRUE(std::isnan(x[1]));
  EXPECT_TRUE(std::isnan(sum));
  TypeParam one = TypeParam(-123.5);
  k.exp_row(&one, 1, &maximum, &sum);
  EXPECT_EQ(one, 1);
  EXPECT_EQ(maximum, TypeParam(-123.5));
  EXPECT_EQ(sum, 1);
}

TYPED_TEST(VectorKernelsTest, SumsAndFiniteness) {
  const auto& k = vector_kernels<TypeParam>();
  for (const Index n : lengths()) {
    const auto x = this->draw("x", n);
    double expected = 0;
    for (const TypeParam v : x) expected += static_cast<double>(v) * static_cast<double>(v);
    EXPECT_NEAR(k.sum_of_squares(x.data(), n), expected, 1e-14 * expected);
    EXPECT_TRUE(k.all_finite(x.data(), n));
    for (const double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
      auto y = x;
      y.back() = static_cast<TypeParam>(bad);
      EXPECT_FALSE(k.all_finite(y.data(), n)) << bad << " at the end of " << n;
      EXPECT_TRUE(k.all_finite(y.data(), n - 1));
    }
  }
}

TYPED_TEST(VectorKernelsTest, AddAxpyScaleTouchExactlyTheirElements) {
  const auto& k = vector_kernels<TypeParam>();
  for (const Index n : lengths()) {
    const auto x = this->draw("x", n + 1), y = this->draw("y", n + 1);
    auto sum = x, combined = y, scaled = x;
    k.add(sum.data(), y.data(), n);
    k.axpy(TypeParam(3), x.data(), combined.data(), n);
    k.scale(TypeParam(3), scaled.data(), n);
    const auto end = static_cast<std::size_t>(n);
    for (std::size_t i = 0; i < end; ++i) {
      EXPECT_EQ(sum[i], x[i] + y[i]);
      EXPECT_EQ(combined[i], std::fma(TypeParam(3), x[i], y[i]));
      EXPECT_EQ(scaled[i], TypeParam(3) * x[i]);
    }
    EXPECT_EQ(sum[end], x[end]);
    EXPECT_EQ(combined[end], y[end]);
    EXPECT_EQ(scaled[end], x[end]);
  }
}

TYPED_TEST(VectorKernelsTest, SwigluMatchesItsFormula) {
  const auto& k = vector_kernels<TypeParam>();
  for (const Index n : {1, 16, 37}) {
    const auto g = this->draw("g", n, 4.0), u = this->draw("u", n), d_h = this->draw("d_h", n);
    std::vector<TypeParam> h(g.size()), d_g(g.size()), d_u(g.size());
    k.swiglu(g.data(), u.data(), h.data(), n);
    k.swiglu_backward(g.data(), u.data(), d_h.data(), d_g.data(), d_u.data(), n);
    const auto sigma = [&](std::size_t i) { return 1 / (1 + std::exp(-static_cast<double>(g[i]))); };
    const auto slope = [&](std::size_t i) { return sigma(i) * (1 + double{g[i]} * (1 - sigma(i))); };
    const double tolerance = 40 * this->kEps;
    this->expect_near(
        h, [&](auto i) { return double{g[i]} * sigma(i) * double{u[i]}; }, tolerance, "h");
    this->expect_near(
        d_g, [&](auto i) { return double{d_h[i]} * double{u[i]} * slope(i); }, tolerance, "d_g");
    this->expect_near(
        d_u, [&](auto i) { return double{d_h[i]} * double{g[i]} * sigma(i); }, tolerance, "d_u");
  }
}

TYPED_TEST(VectorKernelsTest, SoftmaxIsCausalNormalisedAndRepeatable) {
  const auto& k = vector_kernels<TypeParam>();
  for (const Index n : lengths()) {
    for (const Index visible : {Index{1}, (n + 1) / 2, n}) {
      const auto x = this->draw("x", n, 5.0);
      const auto exponential = [&](std::size_t i) {
        return static_cast<Index>(i) < visible ? std::exp(0.5 * double{x[i]}) : 0.0;
      };
      double sum = 0;
      for (std::size_t i = 0; i < x.size(); ++i) sum += exponential(i);
      auto p = x, again = x;
      TypeParam statistics[2];
      k.softmax(p.data(), visible, n, TypeParam(0.5), statistics);
      k.softmax_again(again.data(), visible, n, TypeParam(0.5), statistics);
      this->expect_near(
          p, [&](auto i) { return exponential(i) / sum; }, 20 * this->kEps, "p");
      EXPECT_EQ(p, again);
    }
  }
}

TYPED_TEST(VectorKernelsTest, AdamwMatchesItsFormula) {
  const auto& k = vector_kernels<TypeParam>();
  const Index n = 53;
  const auto w0 = this->draw("w", n), m0 = this->draw("m", n), g = this->draw("g", n);
  auto v0 = this->draw("v", n);
  for (TypeParam& v : v0) v = v * v + TypeParam(0.01);
  auto w = w0, m = m0, v = v0;
  k.adamw_update(w.data(), m.data(), v.data(), g.data(), n, TypeParam(0.9), TypeParam(0.95), TypeParam(0.02),
                 TypeParam(1.5), TypeParam(1e-3), TypeParam(0.99), TypeParam(0.25));
  const auto mean = [&](auto i) { return 0.9 * double{m0[i]} + 0.1 * 0.25 * double{g[i]}; };
  const auto square = [&](auto i) { return 0.95 * double{v0[i]} + 0.05 * std::pow(0.25 * double{g[i]}, 2); };
  const auto weight = [&](auto i) {
    return 0.99 * double{w0[i]} - 0.02 * mean(i) / (std::sqrt(square(i)) * 1.5 + 1e-3);
  };
  const double tolerance = 10 * this->kEps;
  this->expect_near(m, mean, tolerance, "m");
  this->expect_near(v, square, tolerance, "v");
  this->expect_near(w, weight, tolerance, "w");
}

// What the device runs for each weight: the same numbers, to the bit.
TYPED_TEST(VectorKernelsTest, AdamWHasTheBitsOfItsScalarForm) {
  const AdamWStep<TypeParam> step{.beta1 = TypeParam(0.9),
                                  .beta2 = TypeParam(0.95),
                                  .step_size = TypeParam(0.02),
                                  .inv_sqrt_correction2 = TypeParam(1.5),
                                  .epsilon = TypeParam(1e-8),
                                  .decay = TypeParam(0.99),
                                  .gradient_scale = TypeParam(0.3)};
  const Index n = 1003;
  auto w = this->draw("w", n), m = this->draw("m", n), v = this->draw("v", n);
  const auto g = this->draw("g", n);
  for (TypeParam& x : v) x *= x;
  auto scalar_w = w, scalar_m = m, scalar_v = v;
  vector_kernels<TypeParam>().adamw_update(w.data(), m.data(), v.data(), g.data(), n, step.beta1, step.beta2,
                                           step.step_size, step.inv_sqrt_correction2, step.epsilon,
                                           step.decay, step.gradient_scale);
  for (std::size_t i = 0; i < g.size(); ++i) step(g[i], scalar_m[i], scalar_v[i], scalar_w[i]);
  EXPECT_EQ(scalar_m, m);
  EXPECT_EQ(scalar_v, v);
  EXPECT_EQ(scalar_w, w);
}

}  // namespace
}  // namespace lowband
