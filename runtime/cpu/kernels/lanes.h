#pragma once

// Sixteen numbers computed alike, in as many registers as the instruction set of this compilation needs.
// Included only by kernels.cc, which is compiled once per instruction set: everything is in an unnamed
// namespace and always inlined, so that no AVX-512 copy of a function can be linked into code that older
// processors run.

#include "runtime/bfloat16.h"
#include "runtime/types.h"

#include <cstddef>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define LB_INLINE inline __attribute__((always_inline))
#define LB_INLINE_LAMBDA __attribute__((always_inline))

namespace lowband {
namespace {

constexpr Index kLanes = 16;
#if defined(__AVX512F__)
constexpr std::size_t kNativeBytes = 64;
#elif defined(__AVX2__)
constexpr std::size_t kNativeBytes = 32;
#else
constexpr std::size_t kNativeBytes = 16;
#endif

template <class Real>
struct NativeVector;
template <>
struct NativeVector<float> {
  typedef float Type __attribute__((vector_size(kNativeBytes)));
  typedef std::int32_t Bits __attribute__((vector_size(kNativeBytes)));
};
template <>
struct NativeVector<double> {
  typedef double Type __attribute__((vector_size(kNativeBytes)));
  typedef std::int64_t Bits __attribute__((vector_size(kNativeBytes)));
};
using NativeFloat = NativeVector<float>::Type;
using NativeDouble = NativeVector<double>::Type;

template <class Real>
struct Lanes {
  using Native = typename NativeVector<Real>::Type;
  using Bits = typename NativeVector<Real>::Bits;
  static constexpr std::size_t kParts = sizeof(Real) * kLanes / kNativeBytes;
  Native part[kParts];
};

LB_INLINE NativeFloat native_fma(NativeFloat a, NativeFloat b, NativeFloat c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  for (int l = 0; l < 4; ++l) c[l] = __builtin_fmaf(a[l], b[l], c[l]);
  return c;
#endif
}
LB_INLINE NativeDouble native_fma(NativeDouble a, NativeDouble b, NativeDouble c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(a, b, c);
#else
  for (int l = 0; l < 2; ++l) c[l] = __builtin_fma(a[l], b[l], c[l]);
  return c;
#endif
}
LB_INLINE NativeFloat native_sqrt(NativeFloat a) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xFFFF, a);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(a);
#else
  for (int l = 0; l < 4; ++l) a[l] = __builtin_sqrtf(a[l]);
  return a;
#endif
}
LB_INLINE NativeDouble native_sqrt(NativeDouble a) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_pd(0xFF, a);
#elif defined(__AVX2__)
  return _mm256_sqrt_pd(a);
#else
  for (int l = 0; l < 2; ++l) a[l] = __builtin_sqrt(a[l]);
  return a;
#endif
}
LB_INLINE float scalar_sqrt(float x) { return __builtin_sqrtf(x); }
LB_INLINE double scalar_sqrt(double x) { return __builtin_sqrt(x); }

// body(0) ... body(kCount - 1) with constant arguments: the compiler keeps an array in registers only when
// every index is a constant before it first looks.
template <std::size_t kCount, class Body>
LB_INLINE void unrolled(Body body) {
  [&]<std::size_t... kIndex>(std::index_sequence<kIndex...>) LB_INLINE_LAMBDA {
    (body(std::integral_constant<std::size_t, kIndex>{}), ...);
  }
  (std::make_index_sequence<kCount>{});
}
template <class Real, class Body>
LB_INLINE void for_parts(Body body) {
  unrolled<Lanes<Real>::kParts>(body);
}

// result.part[p] = f(a.part[p], others.part[p]...)
template <class Real, class F, class... Others>
LB_INLINE Lanes<Real> each(F f, const Lanes<Real>& a, const Others&... others) {
  Lanes<Real> result;
  for_parts<Real>([&](auto p) LB_INLINE_LAMBDA { result.part[p] = f(a.part[p], others.part[p]...); });
  return result;
}
template <class Real>
LB_INLINE Lanes<Real> operator+(const Lanes<Real>& a, const Lanes<Real>& b) {
  return each([](auto x, auto y) LB_INLINE_LAMBDA { return x + y; }, a, b);
}
template <class Real>
LB_INLINE Lanes<Real> operator-(const Lanes<Real>& a, const Lanes<Real>& b) {
  return each([](auto x, auto y) LB_INLINE_LAMBDA { return x - y; }, a, b);
}
template <class Real>
LB_INLINE Lanes<Real> operator*(const Lanes<Real>& a, const Lanes<Real>& b) {
  return each([](auto x, auto y) LB_INLINE_LAMBDA { return x * y; }, a, b);
}
template <class Real>
LB_INLINE Lanes<Real> operator/(const Lanes<Real>& a, const Lanes<Real>& b) {
  return each([](auto x, auto y) LB_INLINE_LAMBDA { return x / y; }, a, b);
}
template <class Real>
LB_INLINE Lanes<Real> operator-(const Lanes<Real>& a) {
  return each([](auto x) LB_INLINE_LAMBDA { return -x; }, a);
}
/// a b + c, rounded once.
template <class Real>
LB_INLINE Lanes<Real> fma(const Lanes<Real>& a, const Lanes<Real>& b, const Lanes<Real>& c) {
  return each([](auto x, auto y, auto z) LB_INLINE_LAMBDA { return native_fma(x, y, z); }, a, b, c);
}
/// c - a b, rounded once.
template <class Real>
LB_INLINE Lanes<Real> negative_fma(const Lanes<Real>& a, const Lanes<Real>& b, const Lanes<Real>& c) {
  return fma(-a, b, c);
}
template <class Real>
LB_INLINE Lanes<Real> sqrt(const Lanes<Real>& a) {
  return each([](auto x) LB_INLINE_LAMBDA { return native_sqrt(x); }, a);
}
// A NaN in `x` stays, because its comparison is false.
template <class Real>
LB_INLINE Lanes<Real> at_least(const Lanes<Real>& x, const Lanes<Real>& low) {
  return each([](auto v, auto l) LB_INLINE_LAMBDA { return v < l ? l : v; }, x, low);
}
template <class Real>
LB_INLINE Lanes<Real> at_most(const Lanes<Real>& x, const Lanes<Real>& high) {
  return each([](auto v, auto h) LB_INLINE_LAMBDA { return v > h ? h : v; }, x, high);
}

template <class Real>
LB_INLINE Lanes<Real> broadcast(Real value) {
  Lanes<Real> result;
  for_parts<Real>([&](auto p) LB_INLINE_LAMBDA { result.part[p] = value - typename Lanes<Real>::Native{}; });
  return result;
}

/// Which of the 16 lanes an access to memory touches: all, or the first `count`.
struct AllLanes {};
struct FirstLanes {
  Index count;
};

template <class Real>
LB_INLINE Lanes<Real> load(const Real* from, AllLanes) {
  Lanes<Real> result;
  for_parts<Real>([&](auto p) LB_INLINE_LAMBDA {
    __builtin_memcpy(&result.part[p], from + p * kNativeBytes / sizeof(Real), kNativeBytes);
  });
  return result;
}
template <class Real>
LB_INLINE void store(Real* to, const Lanes<Real>& value, AllLanes) {
  for_parts<Real>([&](auto p) LB_INLINE_LAMBDA {
    __builtin_memcpy(to + p * kNativeBytes / sizeof(Real), &value.part[p], kNativeBytes);
  });
}
/// Lanes beyond `lanes` are 0.
template <class Real>
LB_INLINE Lanes<Real> load(const Real* from, FirstLanes lanes) {
  Lanes<Real> result;
#if defined(__AVX512F__)
  const auto mask = static_cast<std::uint16_t>((1U << lanes.count) - 1U);
  if constexpr (sizeof(Real) == 4) {
    result.part[0] = _mm512_maskz_loadu_ps(mask, from);
  } else {
    result.part[0] = _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), from);
    result.part[1] = _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask >> 8), from + 8);
  }
#else
  Real padded[kLanes] = {};
  for (Index l = 0; l < lanes.count; ++l) padded[l] = from[l];
  __builtin_memcpy(&result, padded, sizeof result);
#endif
  return result;
}
template <class Real>
LB_INLINE void store(Real* to, const Lanes<Real>& value, FirstLanes lanes) {
#if defined(__AVX512F__)
  const auto mask = static_cast<std::uint16_t>((1U << lanes.count) - 1U);
  if constexpr (sizeof(Real) == 4) {
    _mm512_mask_storeu_ps(to, mask, value.part[0]);
  } else {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask), value.part[0]);
    _mm512_mask_storeu_pd(to + 8, static_cast<__mmask8>(mask >> 8), value.part[1]);
  }
#else
  Real padded[kLanes];
  __builtin_memcpy(padded, &value, sizeof value);
  for (Index l = 0; l < lanes.count; ++l) to[l] = padded[l];
#endif
}

/// `value` in the lanes that `lanes` names, `other` in the rest.
template <class Real>
LB_INLINE Lanes<Real> keep(const Lanes<Real>& value, AllLanes, const Lanes<Real>&) {
  return value;
}
template <class Real>
LB_INLINE Lanes<Real> keep(const Lanes<Real>& value, FirstLanes lanes, const Lanes<Real>& other) {
  // Read at an offset, it starts with `count` ones.
  static constexpr Real kOnesThenZeros[2 * kLanes] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  const Lanes<Real> chosen = load(kOnesThenZeros + kLanes - lanes.count, AllLanes{});
  return each([](auto c, auto v, auto o) LB_INLINE_LAMBDA { return c != 0 ? v : o; }, chosen, value, other);
}

LB_INLINE Lanes<double> widen(const Lanes<double>& value) { return value; }
LB_INLINE Lanes<double> widen(const Lanes<float>& value) {
  Lanes<double> result;
  for_parts<float>([&](auto p) LB_INLINE_LAMBDA {
    const NativeFloat& part = value.part[p];
#if defined(__AVX512F__)
    result.part[2 * p] =
        _mm512_maskz_cvtps_pd(0xFF, __builtin_shufflevector(part, part, 0, 1, 2, 3, 4, 5, 6, 7));
    result.part[2 * p + 1] =
        _mm512_maskz_cvtps_pd(0xFF, __builtin_shufflevector(part, part, 8, 9, 10, 11, 12, 13, 14, 15));
#elif defined(__AVX2__)
    result.part[2 * p] = _mm256_cvtps_pd(_mm256_castps256_ps128(part));
    result.part[2 * p + 1] = _mm256_cvtps_pd(_mm256_extractf128_ps(part, 1));
#else
    result.part[2 * p] = __builtin_convertvector(__builtin_shufflevector(part, part, 0, 1), NativeDouble);
    result.part[2 * p + 1] = __builtin_convertvector(__builtin_shufflevector(part, part, 2, 3), NativeDouble);
#endif
  });
  return result;
}

LB_INLINE Lanes<float> narrow(const Lanes<float>& value) { return value; }
LB_INLINE Lanes<float> narrow(const Lanes<double>& value) {
  double wide[kLanes];
  float rounded[kLanes];
  __builtin_memcpy(wide, &value, sizeof wide);
  for (Index l = 0; l < kLanes; ++l) rounded[l] = static_cast<float>(wide[l]);
  Lanes<float> result;
  __builtin_memcpy(&result, rounded, sizeof result);
  return result;
}

// The upper halves of floats, and these extended to words.
typedef std::uint32_t NativeWords __attribute__((vector_size(kNativeBytes)));
typedef std::uint16_t NativeHalves __attribute__((vector_size(kNativeBytes / 2)));
struct HalfLanes {
  NativeHalves part[Lanes<float>::kParts];
};

/// As `to_bfloat16`, in every lane.
LB_INLINE HalfLanes upper_halves(const Lanes<float>& value) {
  HalfLanes result;
  for (std::size_t p = 0; p < Lanes<float>::kParts; ++p) {
    const auto bits = reinterpret_cast<NativeWords>(value.part[p]);
    const auto is_nan = (bits & 0x7fff'ffffU) > 0x7f80'0000U;
    const NativeWords rounded = bits + 0x7fffU + (bits >> 16U & 1U);
    result.part[p] = __builtin_convertvector((is_nan ? bits | 0x0040'0000U : rounded) >> 16U, NativeHalves);
  }
  return result;
}
LB_INLINE Lanes<float> from_upper_halves(const HalfLanes& halves) {
  Lanes<float> result;
  for (std::size_t p = 0; p < Lanes<float>::kParts; ++p)
    result.part[p] =
        reinterpret_cast<NativeFloat>(__builtin_convertvector(halves.part[p], NativeWords) << 16U);
  return result;
}
LB_INLINE HalfLanes load_halves(const BFloat16* from, AllLanes) {
  HalfLanes result;
  __builtin_memcpy(&result, from, sizeof result);
  return result;
}
LB_INLINE HalfLanes load_halves(const BFloat16* from, FirstLanes lanes) {
  HalfLanes result = {};
  __builtin_memcpy(&result, from, static_cast<std::size_t>(lanes.count) * sizeof(BFloat16));
  return result;
}
LB_INLINE void store_halves(BFloat16* to, const HalfLanes& halves, AllLanes) {
  __builtin_memcpy(to, &halves, sizeof halves);
}
LB_INLINE void store_halves(BFloat16* to, const HalfLanes& halves, FirstLanes lanes) {
  __builtin_memcpy(to, &halves, static_cast<std::size_t>(lanes.count) * sizeof(BFloat16));
}

/// body(i, lanes) for the packs that cover 0 .. n-1.
template <class Body>
LB_INLINE void for_packs(Index n, Body body) {
  Index i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, AllLanes{});
  if (i < n) body(i, FirstLanes{n - i});
}

// Folds 16 lanes pairwise: l with l + 8, then l + 4, l + 2, l + 1.
template <class Real, class F>
LB_INLINE Real fold(const Lanes<Real>& lanes, F f) {
  Real value[kLanes];
  __builtin_memcpy(value, &lanes, sizeof value);
  for (Index width = kLanes / 2; width > 0; width /= 2) {
    for (Index l = 0; l < width; ++l) value[l] = f(value[l], value[l + width]);
  }
  return value[0];
}
// The same additions on registers.
template <class Real>
LB_INLINE Real sum(const Lanes<Real>& lanes) {
#if defined(__AVX2__)
  if constexpr (sizeof(Real) == 4) {
#if defined(__AVX512F__)
    const NativeFloat& all = lanes.part[0];
    const __m256 eight = __builtin_shufflevector(all, all, 0, 1, 2, 3, 4, 5, 6, 7) +
                         __builtin_shufflevector(all, all, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    const __m256 eight = lanes.part[0] + lanes.part[1];
#endif
    const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
    const __m128 two = four + _mm_movehl_ps(four, four);
    return two[0] + two[1];
  } else {
#if defined(__AVX512F__)
    const NativeDouble eight = lanes.part[0] + lanes.part[1];
    const __m256d four =
        __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#else
    const __m256d four = (lanes.part[0] + lanes.part[2]) + (lanes.part[1] + lanes.part[3]);
#endif
    const __m128d two = _mm256_castpd256_pd128(four) + _mm256_extractf128_pd(four, 1);
    return two[0] + two[1];
  }
#else
  return fold(lanes, [](Real a, Real b) LB_INLINE_LAMBDA { return a + b; });
#endif
}
template <class Real>
LB_INLINE Real maximum(const Lanes<Real>& lanes) {
  return fold(lanes, [](Real a, Real b) LB_INLINE_LAMBDA { return a < b ? b : a; });
}

// exp(x) = 2^k exp(r), k = round(x / ln 2), |r| <= ln(2) / 2.
//
// k comes from adding 1.5 * 2^(mantissa bits): the low bits of the sum are k, and shifted left they are what
// must be added to the exponent field. ln 2 is subtracted in two parts, the high one with trailing zeros.
template <class Real>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  // Arguments are clamped here, so that the result is a normal number: k in -126 .. 127.
  static constexpr float kLow = -87.0F, kHigh = 88.0F;
  static constexpr float kRoundToInteger = 0x1.8p23F;
  static constexpr float kLn2High = 0x1.62e400p-1F, kLn2Low = 0x1.7f7d1cp-20F;
  static constexpr int kMantissaBits = 23;
  // Minimax in relative error, 3.1e-9 on the interval, by Lawson's iteration with c0 = c1 = 1 fixed.
  static constexpr float kPolynomial[] = {
      0x1.6a23d0p-10F, 0x1.123a20p-7F, 0x1.5558f2p-5F, 0x1.555492p-3F, 0x1.fffffcp-2F, 1.0F, 1.0F};
};
template <>
struct ExpConstants<double> {
  static constexpr double kLow = -708.0, kHigh = 709.0;
  static constexpr double kRoundToInteger = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr int kMantissaBits = 52;
  // Taylor: the first term left out, r^14 / 14!, is 4e-18.
  static constexpr double kPolynomial[] = {1.0 / 6227020800.0,
                                           1.0 / 479001600.0,
                                           1.0 / 39916800.0,
                                           1.0 / 3628800.0,
                                           1.0 / 362880.0,
                                           1.0 / 40320.0,
                                           1.0 / 5040.0,
                                           1.0 / 720.0,
                                           1.0 / 120.0,
                                           1.0 / 24.0,
                                           1.0 / 6.0,
                                           0.5,
                                           1.0,
                                           1.0};
};

template <class Real>
LB_INLINE Lanes<Real> exp(const Lanes<Real>& argument) {
  using C = ExpConstants<Real>;
  using Bits = typename Lanes<Real>::Bits;
  using Native = typename Lanes<Real>::Native;
  const Lanes<Real> x = at_most(at_least(argument, broadcast(C::kLow)), broadcast(C::kHigh));
  const Lanes<Real> shifter = broadcast(C::kRoundToInteger);
  const Lanes<Real> shifted = fma(x, broadcast(static_cast<Real>(1.44269504088896340736)), shifter);
  const Lanes<Real> k = shifted - shifter;
  Lanes<Real> r = fma(k, broadcast(-C::kLn2High), x);
  r = fma(k, broadcast(-C::kLn2Low), r);
  Lanes<Real> polynomial = broadcast(C::kPolynomial[0]);
  for (std::size_t i = 1; i < sizeof(C::kPolynomial) / sizeof(Real); ++i)
    polynomial = fma(polynomial, r, broadcast(C::kPolynomial[i]));
  return each(
      [](Native p, Native s) LB_INLINE_LAMBDA {
        return reinterpret_cast<Native>(reinterpret_cast<Bits>(p) +
                                        (reinterpret_cast<Bits>(s) << C::kMantissaBits));
      },
      polynomial, shifted);
}

}  // namespace
}  // namespace lowband
