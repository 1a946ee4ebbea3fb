#include "runtime/linalg.h"

#include "runtime/copy.h"
#include "runtime/cpu/blas.h"
#include "runtime/cpu/gemm.h"
#include "runtime/cpu/kernels/low_rank_tables.h"
#include "runtime/passes.h"
#include "runtime/vector_kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace lowband {
namespace {

int as_int(Index value) {
  LB_EXPECTS(value <= std::numeric_limits<int>::max(), "linalg: found extent ", value,
             ", expected at most 2^31 - 1, what BLAS can address");
  return static_cast<int>(value);
}

template <class T>
std::string shape(MatrixView<T> view) {
  return cat("(", view.rows, ", ", view.cols, ")");
}

void library_gemm(Op op_a, Op op_b, double alpha, MatrixView<const double> a, MatrixView<const double> b,
                  double beta, MatrixView<double> c, Index inner) {
  // Row-major C = op(A) op(B) is column-major C^T = op(B)^T op(A)^T, so the operands change places.
  const char trans_first = op_b == Op::kNone ? 'N' : 'T', trans_second = op_a == Op::kNone ? 'N' : 'T';
  const int m = as_int(c.cols), n = as_int(c.rows), k = as_int(inner);
  const int ld_first = as_int(b.row_stride), ld_second = as_int(a.row_stride), ld_c = as_int(c.row_stride);
  dgemm_(&trans_first, &trans_second, &m, &n, &k, &alpha, b.data, &ld_first, a.data, &ld_second, &beta,
         c.data, &ld_c);
}

// A column-major double copy: column j of the matrix is contiguous.
template <class Real>
std::vector<double> columns_of(MatrixView<const Real> a) {
  std::vector<double> columns(static_cast<std::size_t>(a.elements()));
  for (Index i = 0; i < a.rows; ++i) {
    for (Index j = 0; j < a.cols; ++j)
      columns[static_cast<std::size_t>(j * a.rows + i)] = static_cast<double>(a(i, j));
  }
  return columns;
}

double dot(const double* x, const double* y, Index n) {
  double sum = 0;
  for (Index i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

// y <- y - 2 v (v . y): the reflection along the unit vector v.
void reflect(const double* v, double* y, Index n) {
  const double twice = 2 * dot(v, y, n);
  for (Index i = 0; i < n; ++i) y[i] -= twice * v[i];
}

// What LowRankKernels::solve_upper takes, formed in double.
template <class Real>
Buffer<Real> solve_blocks(MatrixView<const double> u) {
  const Index n = u.cols;
  Buffer<Real> blocks(n * n);
  double inverse[kSolveBlock][kSolveBlock];
  for (Index begin = 0; begin < n; begin += kSolveBlock) {
    const Index end = std::min(n, begin + kSolveBlock), size = end - begin;
    // Row i of the inverse T from the rows below it: U_ii T_i = e_i - sum over k > i of U_ik T_k.
    for (Index i = size - 1; i >= 0; --i) {
      for (Index j = 0; j < size; ++j) inverse[i][j] = i == j ? 1.0 : 0.0;
      for (Index k = i + 1; k < size; ++k) {
        for (Index j = k; j < size; ++j) inverse[i][j] -= u(begin + i, begin + k) * inverse[k][j];
      }
      for (Index j = i; j < size; ++j) inverse[i][j] /= u(begin + i, begin + i);
    }
    for (Index i = 0; i < size; ++i) {
      Real* const row = blocks.data() + (begin + i) * n;
      for (Index j = 0; j < size; ++j) row[begin + j] = static_cast<Real>(inverse[i][j]);
      for (Index j = end; j < n; ++j) row[j] = static_cast<Real>(-u(begin + i, j));
    }
  }
  return blocks;
}

void triangular_solve(MatrixView<float> p, const Buffer<float>& u) {
  const int columns = as_int(p.cols), rows = as_int(p.rows), ld_p = as_int(p.row_stride);
  const float one = 1;
  strsm_("L", "L", "N", "N", &columns, &rows, &one, u.data(), &columns, p.data, &ld_p);
}

void triangular_solve(MatrixView<double> p, const Buffer<double>& u) {
  const int columns = as_int(p.cols), rows = as_int(p.rows), ld_p = as_int(p.row_stride);
  const double one = 1;
  dtrsm_("L", "L", "N", "N", &columns, &rows, &one, u.data(), &columns, p.data, &ld_p);
}

// Rows [begin, end) of the upper triangle of G <- G - V^T V, V the rows [first, last) of G, of which there
// are at most 64. What is left of the diagonal may become anything.
void subtract_squares(MatrixView<double> g, Index first, Index last, Index begin, Index end) {
  const LowRankKernels<double>* const kernels = low_rank_kernels<double>();
  double packed[64 * kPanelRows];
  for (Index i = begin; i < end; i += kPanelRows) {
    const Index rows = std::min(kPanelRows, end - i);
    for (Index k = first; k < last; ++k) {
      for (Index l = 0; l < rows; ++l) packed[(k - first) * kPanelRows + l] = -g(k, i + l);
    }
    if (kernels != nullptr) {
      kernels->add_product(1, g.row(i) + i, g.row_stride, rows, g.cols - i, packed, last - first,
                           g.row(first) + i, g.row_stride, {});
      continue;
    }
    for (Index l = 0; l < rows; ++l) {
      for (Index k = first; k < last; ++k)
        vector_kernels<double>().axpy(packed[(k - first) * kPanelRows + l], g.row(k) + i + l,
                                      g.row(i + l) + i + l, g.cols - i - l);
    }
  }
}

// P <- P U^-1 by blocks J of columns: P_J <- (P_J - sum over I < J of P_I U_IJ) U_JJ^-1, products by `gemm`.
template <class Real>
void solve_by_blocks(const LowRankKernels<Real>& kernels, MatrixView<Real> p, MatrixView<const double> u) {
  constexpr Index kBlock = 128;
  Buffer<Real> above(u.rows * kBlock);
  for (Index begin = 0; begin < p.cols; begin += kBlock) {
    const Index cols = std::min(kBlock, p.cols - begin);
    const MatrixView<Real> block = p.block(0, p.rows, begin, cols);
    if (begin > 0) {
      const MatrixView<Real> factor = above.matrix(0, begin, cols);
      for (Index i = 0; i < begin; ++i) {
        for (Index j = 0; j < cols; ++j) factor(i, j) = static_cast<Real>(u(i, begin + j));
      }
      gemm<Real>(Op::kNone, Op::kNone, Real{-1}, p.block(0, p.rows, 0, begin), factor, Real{1}, block);
    }
    const Buffer<Real> blocks = solve_blocks<Real>(u.block(begin, cols, begin, cols));
    kernels.solve_upper(block.data, block.row_stride, block.rows, cols, blocks.data());
  }
}

// G <- P^T P by the BLAS, for processors without AVX2.
template <class Real>
void library_gram(MatrixView<const Real> p, MatrixView<double> g) {
  std::vector<double> rows = columns_of<Real>(p);
  const MatrixView<const double> p_t{rows.data(), p.cols, p.rows};
  gemm<double>(Op::kNone, Op::kTranspose, 1, p_t, p_t, 0, g);
}

// U^-1 of an upper triangular U.
Buffer<double> inverse_upper(MatrixView<const double> u) {
  Buffer<double> inverse(u.elements());
  const MatrixView<double> t = inverse.matrix(0, u.rows, u.cols);
  // Row i from the rows below it: U_ii T_i = e_i - sum over k > i of U_ik T_k.
  for (Index i = u.rows - 1; i >= 0; --i) {
    t(i, i) = 1;
    for (Index k = i + 1; k < u.cols; ++k)
      vector_kernels<double>().axpy(-u(i, k), t.row(k) + k, t.row(i) + k, u.cols - k);
    vector_kernels<double>().scale(1 / u(i, i), t.row(i) + i, u.cols - i);
  }
  return inverse;
}

}  // namespace

template <class Real>
void gemm(Op op_a, Op op_b, Real alpha, MatrixView<const Real> a, MatrixView<const Real> b, Real beta,
          MatrixView<Real> c) {
  const Index rows = op_a == Op::kNone ? a.rows : a.cols;
  const Index inner = op_a == Op::kNone ? a.cols : a.rows;
  const Index inner_b = op_b == Op::kNone ? b.rows : b.cols;
  const Index cols = op_b == Op::kNone ? b.cols : b.rows;
  LB_EXPECTS(rows == c.rows && cols == c.cols && inner == inner_b, "gemm: found A ", shape(a),
             op_a == Op::kNone ? "" : "^T", ", B ", shape(b), op_b == Op::kNone ? "" : "^T", ", C ", shape(c),
             ", expected op(A) (m, k), op(B) (k, n), C (m, n)");
  if (rows == 0 || cols == 0) return;
  if (inner == 0) return beta == Real{0} ? fill<Real>(Real{0}, c) : scale<Real>(beta, c);
  if (Device* const device = computing_device<Real>("gemm", a, b, c)) {
    if constexpr (kOnDevices<Real>) return device->gemm(op_a, op_b, alpha, a, b, beta, c, false);
  }
  library_gemm(op_a, op_b, alpha, a, b, beta, c, inner);
}

template <class Real>
void gram(MatrixView<const Real> p, MatrixView<double> g) {
  LB_EXPECTS(g.rows == p.cols && g.cols == p.cols, "gram: found P ", shape(p), ", G ", shape(g),
             ", expected G (", p.cols, ", ", p.cols, ")");
  if (Device* const device = computing_device<Real>("gram", p)) {
    if constexpr (kOnDevices<Real>) return device->gram(p, g);
  }
  const LowRankKernels<Real>* const kernels = low_rank_kernels<Real>();
  if (kernels == nullptr) return library_gram(p, g);
  const Index n = p.cols, sums_stride = gram_stride(n);
  // A block of rows in double stays in the first cache, or in the second for many columns: sums then come
  // from the third, once for every block, and blocks of 64 KiB would wait for them as long as they compute.
  const Index block_rows =
      n <= 128 ? std::clamp<Index>(8192 / std::max<Index>(1, n), 32, 1024) : std::max<Index>(32, 49152 / n);
  Buffer<double> wide(std::min(block_rows, p.rows) * n + kGramTile);
  Buffer<double> sums(sums_stride * sums_stride);
  for (Index begin = 0; begin < p.rows; begin += block_rows)
    kernels->add_gram(p.row(begin), p.row_stride, std::min(block_rows, p.rows - begin), n, wide.data(),
                      sums.data());
  for (Index i = 0; i < n; ++i) {
    for (Index j = i; j < n; ++j) g(i, j) = g(j, i) = sums[i * sums_stride + j];
  }
}

void cholesky_with_dead_columns(MatrixView<double> g, double tolerance, std::span<std::uint8_t> dead) {
  const Index n = g.rows;
  LB_EXPECTS(g.cols == n && static_cast<Index>(dead.size()) == n, "cholesky: found G ", shape(g), " and ",
             dead.size(), " flags, expected a square G and a flag per column");
  std::vector<double> diagonal(static_cast<std::size_t>(n));
  for (Index j = 0; j < n; ++j) diagonal[static_cast<std::size_t>(j)] = g(j, j);
  // Right-looking: before row j, the rows below it hold the Schur complement of the live columns so far.
  // Within kRows rows one pivot at a time; these then act together on the other rows of their block of
  // kBlock, and all rows of the block on those below.
  constexpr Index kRows = kPanelRows, kBlock = 64;
  for (Index block = 0; block < n; block += kBlock) {
    const Index block_end = std::min(n, block + kBlock);
    for (Index begin = block; begin < block_end; begin += kRows) {
      const Index end = std::min(block_end, begin + kRows);
      for (Index j = begin; j < end; ++j) {
        const auto flag = static_cast<std::size_t>(j);
        const double pivot = g(j, j);
        const double limit = tolerance * tolerance * diagonal[flag];
        // Negated comparisons, so that NaN is dead too.
        dead[flag] = !(std::isfinite(diagonal[flag]) && diagonal[flag] > 0 && pivot > limit);
        if (dead[flag]) {
          for (Index i = 0; i < j; ++i) g(i, j) = 0;
          std::fill(g.row(j) + j, g.row(j) + n, 0.0);
          g(j, j) = 1;
          continue;
        }
        const double root = std::sqrt(pivot);
        g(j, j) = root;
        for (Index k = j + 1; k < n; ++k) g(j, k) /= root;
        for (Index i = j + 1; i < end; ++i)
          vector_kernels<double>().axpy(-g(j, i), g.row(j) + i, g.row(i) + i, n - i);
      }
      subtract_squares(g, begin, end, end, block_end);
    }
    subtract_squares(g, block, block_end, block_end, n);
  }
  for (Index i = 0; i < n; ++i) std::fill_n(g.row(i), i, 0.0);
}

template <class Real>
void solve_upper_right(MatrixView<Real> p, MatrixView<const double> u) {
  LB_EXPECTS(u.rows == p.cols && u.cols == p.cols, "solve_upper_right: found P ", shape(p), ", U ", shape(u),
             ", expected U (", p.cols, ", ", p.cols, ")");
  if (p.rows == 0 || p.cols == 0) return;
  if (Device* const device = computing_device<Real>("solve_upper_right", p)) {
    const Buffer<double> inverse = inverse_upper(u);
    if constexpr (kOnDevices<Real>) return device->multiply_right(p, inverse.matrix(0, u.rows, u.cols));
  }
  const LowRankKernels<Real>* const kernels = low_rank_kernels<Real>();
  if (kernels != nullptr && p.cols <= kMostSolvedColumns) {
    const Buffer<Real> blocks = solve_blocks<Real>(u);
    return kernels->solve_upper(p.data, p.row_stride, p.rows, p.cols, blocks.data());
  }
  if (kernels != nullptr) return solve_by_blocks<Real>(*kernels, p, u);
  // P U^-1 = (U^-T P^T)^T, and row-major U is Fortran's U^T, a lower triangle.
  Buffer<Real> factor(u.elements());
  for (Index i = 0; i < u.rows; ++i) {
    for (Index j = 0; j < u.cols; ++j) factor[i * u.cols + j] = static_cast<Real>(u(i, j));
  }
  triangular_solve(p, factor);
}

template <class Real>
void householder_orthonormalise(MatrixView<Real> p, double tolerance, std::span<std::uint8_t> dead) {
  const Index rows = p.rows, cols = p.cols;
  LB_EXPECTS(rows >= cols, "householder_orthonormalise: found P ", shape(p), ", expected rows >= columns");
  LB_EXPECTS(static_cast<Index>(dead.size()) == cols, "householder_orthonormalise: found ", dead.size(),
             " flags, expected ", cols);
  if (p.device != nullptr) {
    OnHost<Real> on_host(p);
    householder_orthonormalise<Real>(on_host.writable(), tolerance, dead);
    return copy<Real>(on_host.view(), p);
  }
  std::vector<double> a = columns_of<Real>(p);
  const auto column = [&](Index j) { return a.data() + j * rows; };
  std::vector<double> original_norm(static_cast<std::size_t>(cols));
  for (Index j = 0; j < cols; ++j)
    original_norm[static_cast<std::size_t>(j)] = std::sqrt(dot(column(j), column(j), rows));

  // Live column j is reduced at row k = number of live columns before it; a dead one uses up no row, so that
  // the columns after it lose no direction. The unit reflection vector replaces the column below row k.
  struct Reflector {
    Index column, row;
    double sign;
  };
  std::vector<Reflector> live;
  for (Index j = 0; j < cols; ++j) {
    const Index k = static_cast<Index>(live.size());
    double* x = column(j) + k;
    const Index n = rows - k;
    const double norm = std::sqrt(dot(x, x, n));
    const double reference = original_norm[static_cast<std::size_t>(j)];
    const bool is_dead = !(norm > tolerance * reference) || !std::isfinite(norm);  // NaN is dead too
    dead[static_cast<std::size_t>(j)] = is_dead;
    if (is_dead) continue;
    // H x = alpha e_1 with alpha of the sign opposite to x_0 (no cancellation). R_jj = alpha, so column j of
    // Q takes the sign of alpha to make the diagonal positive.
    const double alpha = x[0] > 0 ? -norm : norm;
    x[0] -= alpha;
    const double length = std::sqrt(dot(x, x, n));
    for (Index i = 0; i < n; ++i) x[i] /= length;
    live.push_back({j, k, alpha < 0 ? -1.0 : 1.0});
    for (Index later = j + 1; later < cols; ++later) reflect(x, column(later) + k, n);
  }

  for (Index j = 0; j < cols; ++j) {
    if (!dead[static_cast<std::size_t>(j)]) continue;
    for (Index i = 0; i < rows; ++i) p(i, j) = Real{0};
  }
  // Column k of Q is H_0 H_1 ... H_k e_k: the later reflectors leave e_k alone.
  std::vector<double> q(static_cast<std::size_t>(rows));
  for (std::size_t index = 0; index < live.size(); ++index) {
    std::fill(q.begin(), q.end(), 0.0);
    q[static_cast<std::size_t>(live[index].row)] = live[index].sign;
    for (std::size_t r = index + 1; r-- > 0;) {
      reflect(column(live[r].column) + live[r].row, q.data() + live[r].row, rows - live[r].row);
    }
    for (Index i = 0; i < rows; ++i)
      p(i, live[index].column) = static_cast<Real>(q[static_cast<std::size_t>(i)]);
  }
}

template <class Real>
std::vector<double> singular_values(MatrixView<const Real> a) {
  const Index count = std::min(a.rows, a.cols);
  std::vector<double> values(static_cast<std::size_t>(count));
  if (count == 0) return values;
  std::vector<double> columns = columns_of<Real>(OnHost<Real>(a).view());
  const int m = as_int(a.rows), n = as_int(a.cols), one = 1, query = -1;
  std::vector<int> integers(static_cast<std::size_t>(8 * count));
  double best_size = 0;
  int info = 0;
  dgesdd_("N", &m, &n, columns.data(), &m, values.data(), nullptr, &one, nullptr, &one, &best_size, &query,
          integers.data(), &info);
  std::vector<double> work(static_cast<std::size_t>(best_size));
  const int work_size = static_cast<int>(work.size());
  dgesdd_("N", &m, &n, columns.data(), &m, values.data(), nullptr, &one, nullptr, &one, work.data(),
          &work_size, integers.data(), &info);
  LB_EXPECTS(info == 0, "singular_values: found dgesdd status ", info, " for a matrix ", shape(a),
             ", expected finite elements");
  return values;
}

namespace {

// A = U S V^T. Fortran's U is (rows, side) and V^T is (side, cols), both column-major.
struct SingularVectors {
  std::vector<double> u, vt;
  Index side;
};

template <class Real>
SingularVectors singular_vectors(MatrixView<const Real> a) {
  SingularVectors found{.u = {}, .vt = {}, .side = std::min(a.rows, a.cols)};
  const auto side = static_cast<std::size_t>(found.side);
  if (side == 0) return found;
  found.u.resize(static_cast<std::size_t>(a.rows) * side);
  found.vt.resize(static_cast<std::size_t>(a.cols) * side);
  std::vector<double> columns = columns_of<Real>(OnHost<Real>(a).view()), values(side);
  std::vector<int> integers(8 * side);
  const int m = as_int(a.rows), n = as_int(a.cols), k = as_int(found.side);
  std::vector<double> work(1);
  int work_size = -1, info = 0;  // the first call asks for the best size
  for (const bool asks : {true, false}) {
    dgesdd_("S", &m, &n, columns.data(), &m, values.data(), found.u.data(), &m, found.vt.data(), &k,
            work.data(), &work_size, integers.data(), &info);
    if (asks) work.resize(static_cast<std::size_t>(work[0]));
    work_size = as_int(static_cast<Index>(work.size()));
  }
  LB_EXPECTS(info == 0, "singular_vectors: found dgesdd status ", info, " for a matrix ", shape(a),
             ", expected finite elements");
  return found;
}

}  // namespace

template <class Real>
void left_singular_vectors(MatrixView<const Real> a, MatrixView<Real> vectors) {
  LB_EXPECTS(vectors.rows == a.rows && vectors.cols <= std::min(a.rows, a.cols),
             "left_singular_vectors: found A ", shape(a), " and vectors ", shape(vectors), ", expected (",
             a.rows, ", at most ", std::min(a.rows, a.cols), ")");
  const SingularVectors found = singular_vectors(a);
  Buffer<Real> columns(vectors.elements());
  const MatrixView<Real> chosen = columns.matrix(0, vectors.rows, vectors.cols);
  for (Index i = 0; i < vectors.rows; ++i) {
    for (Index j = 0; j < vectors.cols; ++j)
      chosen(i, j) = static_cast<Real>(found.u[static_cast<std::size_t>(j * a.rows + i)]);
  }
  copy(chosen, vectors);
}

template <class Real>
void right_singular_vectors(MatrixView<const Real> a, MatrixView<Real> vectors) {
  LB_EXPECTS(vectors.rows == a.cols && vectors.cols <= std::min(a.rows, a.cols),
             "right_singular_vectors: found A ", shape(a), " and vectors ", shape(vectors), ", expected (",
             a.cols, ", at most ", std::min(a.rows, a.cols), ")");
  const SingularVectors found = singular_vectors(a);
  Buffer<Real> columns(vectors.elements());
  const MatrixView<Real> chosen = columns.matrix(0, vectors.rows, vectors.cols);
  for (Index i = 0; i < vectors.rows; ++i) {
    for (Index j = 0; j < vectors.cols; ++j)
      chosen(i, j) = static_cast<Real>(found.vt[static_cast<std::size_t>(i * found.side + j)]);
  }
  copy(chosen, vectors);
}

template <class Real>
bool all_finite(MatrixView<const Real> a) {
  if (a.device != nullptr) return std::isfinite(sum_of_squares<Real>(a));  // no float's square overflows
  // x - x is 0 for a finite x and NaN otherwise, and a NaN survives the sum.
  for (Index i = 0; i < a.rows; ++i) {
    const Real* row = a.row(i);
    Real lanes[16] = {};
    Index j = 0;
    for (; j + 16 <= a.cols; j += 16) {
      for (int lane = 0; lane < 16; ++lane) lanes[lane] += row[j + lane] - row[j + lane];
    }
    for (; j < a.cols; ++j) lanes[0] += row[j] - row[j];
    Real sum = 0;
    for (const Real lane : lanes) sum += lane;
    if (!(sum == Real{0})) return false;
  }
  return true;
}

#define LB_INSTANTIATE(Real)                                                                         \
  template void gemm<Real>(Op, Op, Real, MatrixView<const Real>, MatrixView<const Real>, Real,       \
                           MatrixView<Real>);                                                        \
  template void gram<Real>(MatrixView<const Real>, MatrixView<double>);                              \
  template void solve_upper_right<Real>(MatrixView<Real>, MatrixView<const double>);                 \
  template void householder_orthonormalise<Real>(MatrixView<Real>, double, std::span<std::uint8_t>); \
  template std::vector<double> singular_values<Real>(MatrixView<const Real>);                        \
  template void left_singular_vectors<Real>(MatrixView<const Real>, MatrixView<Real>);               \
  template void right_singular_vectors<Real>(MatrixView<const Real>, MatrixView<Real>);              \
  template bool all_finite<Real>(MatrixView<const Real>);
LB_INSTANTIATE(float)
LB_INSTANTIATE(double)
#undef LB_INSTANTIATE

}  // namespace lowband
