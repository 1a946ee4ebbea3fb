#pragma once

#include "runtime/linalg.h"
#include "runtime/tensor.h"

namespace lowband {

// What a low-rank optimizer does with its large matrices. Each function passes over them once: for few
// columns r that traffic is the cost, whatever the arithmetic. Real: float, double. Where the matrices lie on
// a Device (Real = float), a function is its products and passes one after the other.
//
// Shapes: M, G, D, E, U, W are (rows, cols) with any row stride of at least cols; factors have r columns,
// r >= 0. Arguments written to overlap no other argument.
// Threads: compute_threads(). The bits do not depend on their number.
// Throws: InvalidArgument naming the shapes when they do not fit.

/// The matrix L R^T: left L is (rows, r), right R is (cols, r). With B = M, P and R are left and right; with
/// B = M^T they are right and left.
template <class Real>
struct FactorPair {
  MatrixView<const Real> left;
  MatrixView<const Real> right;
};

/// M <- M + alpha G ;  out <- op(M) Q
///
/// Shapes: Q is (columns of op(M), r), out is (rows of op(M), r).
template <class Real>
void accumulate_and_multiply(Real alpha, MatrixView<const Real> g, MatrixView<Real> m, Op op,
                             MatrixView<const Real> q, MatrixView<Real> out);
template <class Real>
void accumulate_and_multiply(const Scalar& alpha, MatrixView<const Real> g, MatrixView<Real> m, Op op,
                             MatrixView<const Real> q, MatrixView<Real> out);

/// out <- op(M) Q, shapes as above.
template <class Real>
void multiply(Op op, MatrixView<const Real> m, MatrixView<const Real> q, MatrixView<Real> out);

/// P <- M Q ;  R <- M^T P, both products of a power iteration. One thread with up to kOnePassColumns reads M
/// once: a panel of rows gives its rows of P and, while it lies in the cache, what it adds to R.
///
/// Shapes: P is (rows, r), Q and R are (cols, r) and may be the same memory. The bits are those of two calls
/// of multiply.
template <class Real>
void multiply_there_and_back(MatrixView<const Real> m, MatrixView<const Real> q, MatrixView<Real> p,
                             MatrixView<Real> r);

inline constexpr Index kOnePassColumns = 16;

/// M <- beta M + alpha G. Returns |M|^2 in double: sums of rows, added in the order of the rows.
template <class Real>
double accumulate(Real alpha, MatrixView<const Real> g, Real beta, MatrixView<Real> m);

/// M <- beta M + alpha G ;  P <- M Q ;  R <- M^T P. Returns |M|^2. One thread with up to kOnePassColumns
/// reads M and G and writes M once: both products take a panel of the new M from the cache, while the next
/// one comes from memory.
///
/// Shapes: those of multiply_there_and_back. The bits are those of accumulate and multiply_there_and_back.
template <class Real>
double accumulate_and_multiply_there_and_back(Real alpha, MatrixView<const Real> g, Real beta,
                                              MatrixView<Real> m, MatrixView<const Real> q,
                                              MatrixView<Real> p, MatrixView<Real> r);

/// M <- beta M + alpha L R^T. With beta = 0 the old M is not read.
template <class Real>
void add_product(Real alpha, const FactorPair<Real>& factors, Real beta, MatrixView<Real> m);

/// E <- E - own ;  D <- sent. PowerSGD's error feedback, and the gradient that all replicas agree on.
template <class Real>
void decompress(const FactorPair<Real>& sent, const FactorPair<Real>& own, MatrixView<Real> d,
                MatrixView<Real> e);

/// E <- E - own ;  U <- lambda U + D ;  W <- decay W - eta (D + U), with D = sent and the new U. D itself is
/// never stored.
///
/// Reference: PowerSGD (arXiv 1905.13727), algorithm 2; decay = 1 - eta * (weight decay).
template <class Real>
void decompress_and_update(const FactorPair<Real>& sent, const FactorPair<Real>& own, Real lambda, Real eta,
                           Real decay, MatrixView<Real> e, MatrixView<Real> u, MatrixView<Real> w);

}  // namespace lowband
