#pragma once

#include "runtime/buffer.h"
#include "runtime/device.h"
#include "runtime/tensor.h"

#include <span>
#include <vector>

namespace lowband {

// Where the matrices lie on a Device, it computes; functions that only LAPACK has copy to the host and back.
// Real = float there. G, U and T, small and in double, are always the host's.

/// C <- alpha op(A) op(B) + beta C. With beta = 0 the old C is not read.
///
/// Shapes: op(A) is (m, k), op(B) is (k, n), C is (m, n); any row stride >= the column count; zero extents
/// legal. DType: float (oneDNN when built in, else BLAS) or double (BLAS); accumulates in that type. Throws:
/// InvalidArgument naming the three shapes when they do not fit.
template <class Real>
void gemm(Op op_a, Op op_b, Real alpha, MatrixView<const Real> a, MatrixView<const Real> b, Real beta,
          MatrixView<Real> c);

/// G <- P^T P, accumulated and returned in double whatever the type of P.
///
/// Shapes: P is (rows, columns), G is (columns, columns), both triangles are filled.
template <class Real>
void gram(MatrixView<const Real> p, MatrixView<double> g);

/// Cholesky factor with the dead-column rule. On return the upper triangle of `g` holds U with U^T U = G on
/// the live columns; the lower triangle is zero.
///
/// Column j is dead when its remaining pivot is <= tolerance^2 x its own diagonal entry, or that entry is 0
/// or not finite: its row and column of U are zeroed, its diagonal set to 1 and `dead[j]` to 1. The caller
/// zeroes the dead columns of P, so that a NaN in one cannot reach the others. Shapes: g is (n, n), symmetric
/// positive semi-definite; dead has n elements. Reference: algorithms.md 3; the pivot test is
/// docs/numerics.md.
void cholesky_with_dead_columns(MatrixView<double> g, double tolerance, std::span<std::uint8_t> dead);

/// P <- P U^-1 for an upper triangular U (columns, columns), computed in the type of P.
template <class Real>
void solve_upper_right(MatrixView<Real> p, MatrixView<const double> u);

/// Replaces P by the orthonormal factor of its unpivoted Householder QR, positive diagonal in the triangular
/// factor. A column j with |R_jj| <= tolerance ||P_j|| is dead: its reflector is skipped, the column becomes
/// zero and `dead[j]` 1.
///
/// Shapes: P is (rows, columns), rows >= columns; dead has `columns` elements.
template <class Real>
void householder_orthonormalise(MatrixView<Real> p, double tolerance, std::span<std::uint8_t> dead);

/// Singular values of A in decreasing order (min(rows, cols) of them).
template <class Real>
std::vector<double> singular_values(MatrixView<const Real> a);

/// Singular vectors of A for its vectors.cols largest singular values, in decreasing order, as columns; their
/// signs are arbitrary. Computed in double.
///
/// Shapes: A is (rows, cols); left vectors are (rows, count), right ones (cols, count), count at most
/// min(rows, cols). Throws: InvalidArgument for other shapes.
template <class Real>
void left_singular_vectors(MatrixView<const Real> a, MatrixView<Real> vectors);
template <class Real>
void right_singular_vectors(MatrixView<const Real> a, MatrixView<Real> vectors);

/// Sum of squares, accumulated in double in a fixed order.
template <class Real>
double sum_of_squares(MatrixView<const Real> a);

/// True when every element is finite.
template <class Real>
bool all_finite(MatrixView<const Real> a);

}  // namespace lowband
