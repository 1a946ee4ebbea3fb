// The loops of runtime/vector_kernels.h. Compiled once per instruction set; LB_KERNEL_SET names the table.

#include "runtime/cpu/kernels/lanes.h"
#include "runtime/cpu/kernels/tables.h"

namespace lowband {
namespace {

template <class Real>
void add(Real* x, const Real* y, Index n) {
  for_packs(n, [=](Index i, auto lanes)
                   LB_INLINE_LAMBDA { store(x + i, load(x + i, lanes) + load(y + i, lanes), lanes); });
}

template <class Real>
void axpy(Real alpha, const Real* x, Real* y, Index n) {
  const auto a = broadcast(alpha);
  for_packs(n, [=](Index i, auto lanes)
                   LB_INLINE_LAMBDA { store(y + i, fma(a, load(x + i, lanes), load(y + i, lanes)), lanes); });
}

template <class Real>
double accumulate(Real alpha, const Real* x, Real beta, Real* y, Index n) {
  const auto a = broadcast(alpha), b = broadcast(beta);
  Lanes<double> squares = broadcast(0.0);
  for_packs(n, [&](Index i, auto lanes) LB_INLINE_LAMBDA {
    const Lanes<Real> value = fma(b, load(y + i, lanes), a * load(x + i, lanes));
    store(y + i, value, lanes);
    const Lanes<double> wide = widen(keep(value, lanes, broadcast(Real{0})));
    squares = fma(wide, wide, squares);
  });
  return sum(squares);
}

template <class Real>
void scale(Real alpha, Real* x, Index n) {
  const auto a = broadcast(alpha);
  for_packs(n, [=](Index i, auto lanes) LB_INLINE_LAMBDA { store(x + i, a * load(x + i, lanes), lanes); });
}

template <class Real>
double sum_of_squares(const Real* x, Index n) {
  Lanes<double> squares = broadcast(0.0);
  for_packs(n, [&](Index i, auto lanes) LB_INLINE_LAMBDA {
    const Lanes<double> value = widen(load(x + i, lanes));
    squares = fma(value, value, squares);
  });
  return sum(squares);
}

template <class Real>
bool all_finite(const Real* x, Index n) {
  // x - x is 0 for a finite x, else NaN, and NaN survives every addition.
  Lanes<Real> poison = broadcast(Real{0});
  for_packs(n, [&](Index i, auto lanes) LB_INLINE_LAMBDA {
    const Lanes<Real> value = load(x + i, lanes);
    poison = poison + (value - value);
  });
  return sum(poison) == 0;
}

template <class Real>
void round_to_bf16(const Real* x, BFloat16* y, Index n) {
  for_packs(n, [=](Index i, auto lanes) LB_INLINE_LAMBDA {
    store_halves(y + i, upper_halves(narrow(load(x + i, lanes))), lanes);
  });
}

template <class Real>
void widen_bf16(const BFloat16* x, Real* y, Index n) {
  for_packs(n, [=](Index i, auto lanes) LB_INLINE_LAMBDA {
    const Lanes<float> value = from_upper_halves(load_halves(x + i, lanes));
    if constexpr (sizeof(Real) == sizeof(float)) {
      store(y + i, value, lanes);
    } else {
      store(y + i, widen(value), lanes);
    }
  });
}

// s = 1 / sqrt(mean(x^2) + epsilon),  y = gain x s
template <class Real>
Real rms_norm(const Real* x, const Real* gain, Real epsilon, Real* y, Index n) {
  Lanes<Real> squares = broadcast(Real{0});
  for_packs(n, [&](Index i, auto lanes) LB_INLINE_LAMBDA {
    const Lanes<Real> value = load(x + i, lanes);
    squares = fma(value, value, squares);
  });
  const Real s = Real{1} / scalar_sqrt(sum(squares) / static_cast<Real>(n) + epsilon);
  const auto s_lanes = broadcast(s);
  for_packs(n, [=](Index i, auto lanes) LB_INLINE_LAMBDA {
    store(y + i, load(gain + i, lanes) * (load(x + i, lanes) * s_lanes), lanes);
  });
  return s;
}

// With z = x s:  d_gain += d_y z,  d_x += s (gain d_y - z mean(gain d_y z))
template <class Real>
void rms_norm_backward(const Real* x, const Real* gain, Real s, const Real* d_y, Real* d_gain, Real* d_x,
                       Index n) {
  const auto s_lanes = broadcast(s);
  Lanes<Real> projection = broadcast(Real{0});
  for_packs(n, [&](Index i, auto lanes) LB_INLINE_LAMBDA {
    const Lanes<Real> z = load(x + i, lanes) * s_lanes;
    const Lanes<Real> d_y_z = load(d_y + i, lanes) * z;
    store(d_gain + i, load(d_gain + i, lanes) + d_y_z, lanes);
    projection = fma(load(gain + i, lanes), d_y_z, projection);
  });
  const auto mean = broadcast(sum(projection) / static_cast<Real>(n));
  for_packs(n, [=](Index i, auto lanes) LB_INLINE_LAMBDA {
    const Lanes<Real> z = load(x + i, lanes) * s_lanes;
    const Lanes<Real> inner = negative_fma(z, mean, load(gain + i, lanes) * load(d_y + i, lanes));
    store(d_x + i, fma(s_lanes, inner, load(d_x + i, lanes)), lanes);
  });
}

template <class Real>
LB_INLINE Lanes<Real> sigmoid(const Lanes<Real>& x) {
  const auto one = broadcast(Real{1});
  return one / (one + exp(-x));
}

template <class Real>
void swiglu(const Real* g, const Real* u, Real* h, Index n) {
  for_packs(n, [=](Index i, auto lanes) LB_INLINE_LAMBDA {
    const Lanes<Real> gate = load(g + i, lanes);
    store(h + i, gate * sigmoid(gate) * load(u + i, lanes), lanes);
  });
}

// With sigma = sigmoid(g) and silu = g sigma:  d silu / dg = sigma + silu (1 - sigma)
template <class Real>
void swiglu_backward(const Real* g, const Real* u, const Real* d_h, Real* d_g, Real* d_u, Index n) {
  const auto one = broadcast(Real{1});
  for_packs(n, [=](Index i, auto lanes) LB_INLINE_LAMBDA {
    const Lanes<Real> gate = load(g + i, lanes), d = load(d_h + i, lanes);
    const Lanes<Real> sigma = sigmoid(gate);
    const Lanes<Real> silu = gate * sigma;
    const Lanes<Real> slope = fma(silu, one - sigma, sigma);
    store(d_g + i, d * load(u + i, lanes) * slope, lanes);
    store(d_u + i, d * silu, lanes);
  });
}

template <class Real, bool kBack>
void rotate(Real* x, const Real* cosine, const Real* sine, Index heads, Index half) {
  for (Index head = 0; head < heads; ++head, x += 2 * half) {
    for_packs(half, [=](Index j, auto lanes) LB_INLINE_LAMBDA {
      const Lanes<Real> a = load(x + j, lanes), b = load(x + half + j, lanes);
      const Lanes<Real> c = load(cosine + j, lanes);
      const Lanes<Real> s = kBack ? -load(sine + j, lanes) : load(sine + j, lanes);
      store(x + j, negative_fma(b, s, a * c), lanes);
      store(x + half + j, fma(a, s, b * c), lanes);
    });
  }
}

template <class Real>
LB_INLINE Real row_maximum(const Real* x, Index n) {
  const auto floor = broadcast(-static_cast<Real>(__builtin_inf()));
  Lanes<Real> largest = floor;
  for_packs(n, [&](Index i, auto lanes)
                   LB_INLINE_LAMBDA { largest = at_least(keep(load(x + i, lanes), lanes, floor), largest); });
  return maximum(largest);
}

template <class Real>
void exp_row(Real* x, Index n, Real* row_max, Real* row_sum) {
  const Real largest = row_maximum(x, n);
  const auto shift = broadcast(largest), zero = broadcast(Real{0});
  Lanes<Real> total = zero;
  for_packs(n, [&](Index i, auto lanes) LB_INLINE_LAMBDA {
    const Lanes<Real> e = exp(load(x + i, lanes) - shift);
    store(x + i, e, lanes);
    total = total + keep(e, lanes, zero);
  });
  *row_max = largest;
  *row_sum = sum(total);
}

template <class Real>
LB_INLINE void zero_range(Real* x, Index begin, Index end) {
  for (Index i = begin; i < end; ++i) x[i] = 0;
}

template <class Real>
void softmax(Real* x, Index visible, Index n, Real factor, Real* statistics) {
  const Real largest = row_maximum(x, visible) * factor;
  const auto minus_largest = broadcast(-largest), factors = broadcast(factor), zero = broadcast(Real{0});
  Lanes<Real> total = zero;
  for_packs(visible, [&](Index i, auto lanes) LB_INLINE_LAMBDA {
    const Lanes<Real> e = exp(fma(load(x + i, lanes), factors, minus_largest));
    store(x + i, e, lanes);
    total = total + keep(e, lanes, zero);
  });
  const Real inverse = Real{1} / sum(total);
  scale(inverse, x, visible);
  zero_range(x, visible, n);
  statistics[0] = largest;
  statistics[1] = inverse;
}

template <class Real>
void softmax_again(Real* x, Index visible, Index n, Real factor, const Real* statistics) {
  const auto minus_largest = broadcast(-statistics[0]), inverse = broadcast(statistics[1]);
  const auto factors = broadcast(factor);
  for_packs(visible, [=](Index i, auto lanes) LB_INLINE_LAMBDA {
    store(x + i, inverse * exp(fma(load(x + i, lanes), factors, minus_largest)), lanes);
  });
  zero_range(x, visible, n);
}

template <class Real>
void softmax_backward(const Real* p, Real* d, Index visible, Index n, Real factor) {
  Lanes<Real> projection = broadcast(Real{0});
  for_packs(visible, [&](Index i, auto lanes) LB_INLINE_LAMBDA {
    projection = fma(load(p + i, lanes), load(d + i, lanes), projection);
  });
  const auto mean = broadcast(sum(projection)), factors = broadcast(factor);
  for_packs(visible, [=](Index i, auto lanes) LB_INLINE_LAMBDA {
    store(d + i, factors * load(p + i, lanes) * (load(d + i, lanes) - mean), lanes);
  });
  zero_range(d, visible, n);
}

template <class Real>
void adamw_update(Real* w, Real* m, Real* v, const Real* g, Index n, Real beta1, Real beta2, Real step_size,
                  Real inv_sqrt_correction2, Real epsilon, Real decay, Real gradient_scale) {
  const auto b1 = broadcast(beta1), one_minus_b1 = broadcast(Real{1} - beta1);
  const auto b2 = broadcast(beta2), one_minus_b2 = broadcast(Real{1} - beta2);
  const auto correction = broadcast(inv_sqrt_correction2), eps = broadcast(epsilon);
  const auto minus_step = broadcast(-step_size), decays = broadcast(decay);
  const auto gradient_scales = broadcast(gradient_scale);
  for_packs(n, [=](Index i, auto lanes) LB_INLINE_LAMBDA {
    const Lanes<Real> gradient = gradient_scales * load(g + i, lanes);
    const Lanes<Real> mean = fma(b1, load(m + i, lanes), one_minus_b1 * gradient);
    const Lanes<Real> square = fma(b2, load(v + i, lanes), one_minus_b2 * gradient * gradient);
    const Lanes<Real> denominator = fma(sqrt(square), correction, eps);
    store(m + i, mean, lanes);
    store(v + i, square, lanes);
    store(w + i, fma(minus_step, mean / denominator, decays * load(w + i, lanes)), lanes);
  });
}

template <class Real>
constexpr VectorKernels<Real> kTable = {
    .add = add<Real>,
    .axpy = axpy<Real>,
    .accumulate = accumulate<Real>,
    .scale = scale<Real>,
    .sum_of_squares = sum_of_squares<Real>,
    .all_finite = all_finite<Real>,
    .round_to_bf16 = round_to_bf16<Real>,
    .widen_bf16 = widen_bf16<Real>,
    .rms_norm = rms_norm<Real>,
    .rms_norm_backward = rms_norm_backward<Real>,
    .swiglu = swiglu<Real>,
    .swiglu_backward = swiglu_backward<Real>,
    .rotate = rotate<Real, false>,
    .rotate_back = rotate<Real, true>,
    .exp_row = exp_row<Real>,
    .softmax = softmax<Real>,
    .softmax_again = softmax_again<Real>,
    .softmax_backward = softmax_backward<Real>,
    .adamw_update = adamw_update<Real>,
};

}  // namespace

const VectorKernels<float>* const kernel_tables::LB_KERNEL_SET::float_kernels = &kTable<float>;
const VectorKernels<double>* const kernel_tables::LB_KERNEL_SET::double_kernels = &kTable<double>;

}  // namespace lowband
