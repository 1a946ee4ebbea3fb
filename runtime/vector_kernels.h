#pragma once

#include "runtime/bfloat16.h"
#include "runtime/types.h"

#include <string_view>
#include <vector>

namespace lowband {

/// Loops over contiguous arrays, vectorised. Real: float, double. Single-threaded; callers split rows.
///
/// Determinism: the same bits on AVX-512, AVX2 and baseline. Every a*b+c is one explicit FMA or two rounded
/// operations, sums run in 16 lanes (element i in lane i mod 16) that are then added pairwise (lane l to lane
/// l + 8, + 4, + 2, + 1), and exp is one polynomial on every path.
/// Arrays may be unaligned; they may not overlap unless they are the same array.
template <class Real>
struct VectorKernels {
  /// x <- x + y
  void (*add)(Real* x, const Real* y, Index n);
  /// y <- alpha x + y
  void (*axpy)(Real alpha, const Real* x, Real* y, Index n);
  /// y <- beta y + alpha x, alpha x rounded first; returns the sum of the new y^2 in double.
  double (*accumulate)(Real alpha, const Real* x, Real beta, Real* y, Index n);
  /// x <- alpha x
  void (*scale)(Real alpha, Real* x, Index n);
  /// Sum of x^2 in double.
  double (*sum_of_squares)(const Real* x, Index n);
  bool (*all_finite)(const Real* x, Index n);

  /// y <- x, rounded as by `to_bfloat16`; a double is rounded to float before.
  void (*round_to_bf16)(const Real* x, BFloat16* y, Index n);
  /// y <- x, exact.
  void (*widen_bf16)(const BFloat16* x, Real* y, Index n);

  /// y <- gain * x * s with s = 1 / sqrt(mean(x^2) + epsilon); returns s.
  Real (*rms_norm)(const Real* x, const Real* gain, Real epsilon, Real* y, Index n);
  /// Adds the gradients of `rms_norm` for the same x and returned s:
  /// d_gain <- d_gain + d_y x s,  d_x <- d_x + s (gain d_y - x s^2 mean(gain d_y x)).
  void (*rms_norm_backward)(const Real* x, const Real* gain, Real s, const Real* d_y, Real* d_gain, Real* d_x,
                            Index n);

  /// h <- g sigmoid(g) u
  void (*swiglu)(const Real* g, const Real* u, Real* h, Index n);
  /// d_g, d_u <- gradients of `swiglu` for d_h.
  void (*swiglu_backward)(const Real* g, const Real* u, const Real* d_h, Real* d_g, Real* d_u, Index n);

  /// Rotates pairs: (x_j, x_{j+half}) <- (x_j c_j - x_{j+half} s_j, x_{j+half} c_j + x_j s_j), j < half, in
  /// each of `heads` consecutive heads of 2 half elements.
  void (*rotate)(Real* x, const Real* cosine, const Real* sine, Index heads, Index half);
  /// The opposite rotation, which is also the gradient of `rotate`.
  void (*rotate_back)(Real* x, const Real* cosine, const Real* sine, Index heads, Index half);

  /// x <- exp(x - max x); returns the maximum and the sum of the new x through the pointers. n >= 1.
  /// exp is accurate to 2 ulp and saturates where the result would leave the normal range; NaN stays NaN.
  void (*exp_row)(Real* x, Index n, Real* maximum, Real* sum);
  /// Softmax of scale * x over the first `visible` elements; the rest of the n elements becomes 0.
  /// Returns in statistics[0], [1] the maximum and the reciprocal sum that `softmax_again` needs.
  void (*softmax)(Real* x, Index visible, Index n, Real scale, Real* statistics);
  /// The same bits as `softmax` from the same x and the statistics it returned, without a reduction.
  void (*softmax_again)(Real* x, Index visible, Index n, Real scale, const Real* statistics);
  /// d <- scale p (d - sum(p d)) over the first `visible` elements, 0 beyond: the gradient of `softmax`.
  void (*softmax_backward)(const Real* p, Real* d, Index visible, Index n, Real scale);

  /// One AdamW step, with g' = gradient_scale g:
  ///   m <- beta1 m + (1 - beta1) g',  v <- beta2 v + (1 - beta2) g'^2,
  ///   w <- decay w - step_size m / (sqrt(v) inv_sqrt_correction2 + epsilon).
  /// step_size = eta / (1 - beta1^t), inv_sqrt_correction2 = 1 / sqrt(1 - beta2^t),
  /// decay = 1 - eta * (weight decay).
  /// Reference: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.
  void (*adamw_update)(Real* w, Real* m, Real* v, const Real* g, Index n, Real beta1, Real beta2,
                       Real step_size, Real inv_sqrt_correction2, Real epsilon, Real decay,
                       Real gradient_scale);
};

/// The kernels for this processor (`vector_kernel_name()` in runtime/cpu.h), chosen on first use.
template <class Real>
const VectorKernels<Real>& vector_kernels();

/// Every set of kernels that this processor can run, by instruction set; for tests that compare their bits.
template <class Real>
struct NamedVectorKernels {
  std::string_view name;
  const VectorKernels<Real>* kernels;
};
template <class Real>
std::vector<NamedVectorKernels<Real>> runnable_vector_kernels();

template <class Real>
void adamw_update(Real* w, Real* m, Real* v, const Real* g, Index n, Real beta1, Real beta2, Real step_size,
                  Real inv_sqrt_correction2, Real epsilon, Real decay, Real gradient_scale) {
  vector_kernels<Real>().adamw_update(w, m, v, g, n, beta1, beta2, step_size, inv_sqrt_correction2, epsilon,
                                      decay, gradient_scale);
}

}  // namespace lowband
