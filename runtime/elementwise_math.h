#pragma once

#include <cmath>

// Empty for a host compiler. nvcc compiles the same functions for the device.
#ifdef __CUDACC__
#define LB_HOST_DEVICE __host__ __device__
#else
#define LB_HOST_DEVICE
#endif

namespace lowband {

/// silu(g) u = g sigmoid(g) u, and its slopes in g and u. The host's loops (runtime/vector_kernels.h) have an
/// exponential of their own.
template <class Real>
struct Swiglu {
  Real value, slope_g, slope_u;

  LB_HOST_DEVICE Swiglu(Real g, Real u) {
    using std::exp;
    const Real sigma = Real{1} / (Real{1} + exp(-g));
    slope_u = g * sigma;
    value = slope_u * u;
    slope_g = u * (sigma + slope_u * (Real{1} - sigma));
  }
};

// What an elementwise optimizer does to one weight, written once for the host and for the device, where the
// order of the rounded operations is part of it: both give the same bits. A fused multiply-add is written
// `fma`; nothing else may be fused. Real: float, double. g' = gradient_scale g throughout.

/// m <- b1 m + (1 - b1) g' ;  v <- b2 v + (1 - b2) g'^2 ;
/// w <- decay w - step_size m / (sqrt(v) inv_sqrt_correction2 + epsilon)
///
/// step_size = eta / (1 - b1^t), inv_sqrt_correction2 = 1 / sqrt(1 - b2^t), decay = 1 - eta (weight decay).
/// Reference: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.
template <class Real>
struct AdamWStep {
  Real beta1, beta2, step_size, inv_sqrt_correction2, epsilon, decay, gradient_scale;

  LB_HOST_DEVICE void operator()(Real gradient, Real& m, Real& v, Real& w) const {
    using std::fma, std::sqrt;
    const Real g = gradient_scale * gradient;
    m = fma(beta1, m, (Real{1} - beta1) * g);
    v = fma(beta2, v, (Real{1} - beta2) * g * g);
    w = fma(-step_size, m / fma(sqrt(v), inv_sqrt_correction2, epsilon), decay * w);
  }
};

/// AdamW's numbers in its update t = 1, 2, ...
template <class Real>
struct AdamWRule {
  double beta1, beta2, epsilon, decay, learning_rate;

  LB_HOST_DEVICE AdamWStep<Real> step(double t, Real gradient_scale) const {
    using std::pow, std::sqrt;
    return {static_cast<Real>(beta1),
            static_cast<Real>(beta2),
            static_cast<Real>(learning_rate / (1 - pow(beta1, t))),
            static_cast<Real>(1 / sqrt(1 - pow(beta2, t))),
            static_cast<Real>(epsilon),
            static_cast<Real>(decay),
            gradient_scale};
  }
};

/// m1 <- b1 m1 + (1 - b1) g' ;  m2 <- b2 m2 + (1 - b2) g'^2 ;  n <- correction m1 / (sqrt(m2) + epsilon)
///
/// Adam's direction, without a weight. correction = sqrt(1 - b2^t) / (1 - b1^t).
/// Reference: GaLore (arXiv 2403.03507), algorithm 2.
template <class Real>
struct AdamDirection {
  Real beta1, new1, beta2, new2, correction, epsilon, gradient_scale;

  LB_HOST_DEVICE void operator()(Real gradient, Real& m1, Real& m2, Real& n) const {
    using std::sqrt;
    const Real g = gradient_scale * gradient;
    m1 = beta1 * m1 + new1 * g;
    m2 = beta2 * m2 + new2 * g * g;
    n = correction * m1 / (sqrt(m2) + epsilon);
  }
};

/// w <- decay w - eta sign(b1 m + (1 - b1) g') ;  m <- b2 m + (1 - b2) g'.  new1 = 1 - b1, new2 = 1 - b2.
/// Reference: Chen et al., "Symbolic discovery of optimization algorithms", arXiv 2302.06675, algorithm 2.
template <class Real>
struct LionStep {
  Real beta1, new1, beta2, new2, eta, decay, gradient_scale;

  LB_HOST_DEVICE void operator()(Real gradient, Real& m, Real& w) const {
    const Real g = gradient_scale * gradient;
    const Real u = beta1 * m + new1 * g;
    m = beta2 * m + new2 * g;
    w = decay * w - (u > 0 ? eta : u < 0 ? -eta : Real{0});
  }
};

/// v <- mu v + g' ;  w <- decay w - eta (own g' + across v).  own, across: 0, 1, with Nesterov 1, mu.
template <class Real>
struct SgdStep {
  Real mu, own, across, eta, decay, gradient_scale;

  LB_HOST_DEVICE void operator()(Real gradient, Real& v, Real& w) const {
    const Real g = gradient_scale * gradient;
    v = mu * v + g;
    w = decay * w - eta * (own * g + across * v);
  }
};

}  // namespace lowband
