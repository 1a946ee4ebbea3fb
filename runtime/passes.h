#pragma once

#include "runtime/bfloat16.h"
#include "runtime/elementwise_math.h"
#include "runtime/tensor.h"

#include <span>

namespace lowband {

// What optimizers do to the elements of a matrix, wherever it lies: the host or its Device. What each costs
// is what it reads and writes. On both places the same bits, save for sums.
//
// Shapes: matrices of one call are equal, with any row strides, and do not overlap unless they are the same.
// Real: float, double; float on a Device. Threads: one.
// Throws: InvalidArgument naming the shapes or places when they do not fit.

/// X <- value
template <class Real>
void fill(Real value, MatrixView<Real> x);

/// Y <- alpha X + beta Y, as fma(beta, Y, alpha X), or fma(alpha, X, Y) with beta = 1; with beta = 0 the old
/// Y is not read. Y may be X.
template <class Real>
void add(Real alpha, MatrixView<const Real> x, Real beta, MatrixView<Real> y);
template <class Real>
void add(const Scalar& alpha, MatrixView<const Real> x, Real beta, MatrixView<Real> y);

/// X <- alpha X
template <class Real>
void scale(Real alpha, MatrixView<Real> x);

/// X_ij <- factors_i X_ij ;  X_ij <- factors_j X_ij. `factors` of the host.
template <class Real>
void scale_rows(std::span<const Real> factors, MatrixView<Real> x);
template <class Real>
void scale_columns(std::span<const Real> factors, MatrixView<Real> x);

/// Y <- X, rounded as by `to_bfloat16` (a double to float before); and back, exact.
template <class Real>
void round_to_bf16(MatrixView<const Real> x, MatrixView<BFloat16> y);
template <class Real>
void widen_bf16(MatrixView<const BFloat16> x, MatrixView<Real> y);

/// One step of every weight; see runtime/elementwise_math.h.
template <class Real>
void update(const AdamWStep<Real>& step, MatrixView<const Real> g, MatrixView<Real> m, MatrixView<Real> v,
            MatrixView<Real> w);
template <class Real>
void update(const AdamDirection<Real>& step, MatrixView<const Real> g, MatrixView<Real> m1,
            MatrixView<Real> m2, MatrixView<Real> n);
template <class Real>
void update(const LionStep<Real>& step, MatrixView<const Real> g, MatrixView<Real> m, MatrixView<Real> w);
template <class Real>
void update(const SgdStep<Real>& step, MatrixView<const Real> g, MatrixView<Real> v, MatrixView<Real> w);
/// Likewise with this gradient_scale; AdamW as t <- t + 1, then its step of update t. Shapes: t is one
/// number.
template <class Real>
void update(const AdamWRule<Real>& rule, const Scalar& gradient_scale, MatrixView<Real> t,
            MatrixView<const Real> g, MatrixView<Real> m, MatrixView<Real> v, MatrixView<Real> w);
template <class Real>
void update(const LionStep<Real>& step, const Scalar& gradient_scale, MatrixView<const Real> g,
            MatrixView<Real> m, MatrixView<Real> w);
template <class Real>
void update(const SgdStep<Real>& step, const Scalar& gradient_scale, MatrixView<const Real> g,
            MatrixView<Real> v, MatrixView<Real> w);

/// U_k <- slice places[k] of X ;  slice places[k] of X += alpha U_k, by fma. Slices are rows or columns.
///
/// Shapes: U has places.size() slices, as long as those of X; `places` differ.
template <class Real>
void take_slices(bool of_rows, std::span<const Index> places, MatrixView<const Real> x, MatrixView<Real> u);
template <class Real>
void add_to_slices(Real alpha, MatrixView<const Real> u, bool of_rows, std::span<const Index> places,
                   MatrixView<Real> x);

// Sums, in double. Those with a view of `sums` leave them where the matrices lie; the others bring them to
// the host, and wait for a Device.

/// sums[k] <- sum of squares of matrices[k]; NaN where an element or its square is no finite Real.
template <class Real>
void usable_sums_of_squares(std::span<const MatrixView<const Real>> matrices, MatrixView<double> sums);
template <class Real>
void usable_sums_of_squares(std::span<const MatrixView<const Real>> matrices, std::span<double> sums);

/// sum <- sum of squares, as sum_of_squares of runtime/linalg.h
template <class Real>
void sum_of_squares(MatrixView<const Real> x, MatrixView<double> sum);

/// sum of X_ij Y_ij
template <class Real>
double inner_product(MatrixView<const Real> x, MatrixView<const Real> y);

/// sums[i] <- sum over j of |X_ij|, or with columns sums[j] <- sum over i of |X_ij|
template <class Real>
void sums_of_magnitudes(bool of_rows, MatrixView<const Real> x, std::span<double> sums);

/// sums[i] <- sum over j of X_ij^2
template <class Real>
void sums_of_squares_of_rows(MatrixView<const Real> x, std::span<double> sums);

/// sums[j] <- sum over i of X_ij^2 for the columns of all matrices, one matrix after the other.
template <class Real>
void sums_of_squares_of_columns(std::span<const MatrixView<const Real>> matrices, MatrixView<double> sums);
template <class Real>
void sums_of_squares_of_columns(std::span<const MatrixView<const Real>> matrices, std::span<double> sums);

}  // namespace lowband
