// Products, orthonormalisation and the matrix sign on the device against loops in double.
#include "runtime/cuda/matrix_sign.h"
#include "runtime/cuda/orthonormalise.h"
#include "tests/runtime/cuda/device_checks.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace lowband {
namespace {

using namespace test;

constexpr double kDeadTolerance = 1e-5;
std::size_t at(Index i) { return static_cast<std::size_t>(i); }

// A row-major matrix in double, for loops that are too simple to be wrong.
struct Dense {
  Dense(Index rows_, Index cols_) : rows(rows_), cols(cols_), x(at(rows_ * cols_)) {}
  Dense(Index rows_, Index cols_, const std::vector<float>& values) : Dense(rows_, cols_) {
    std::copy(values.begin(), values.end(), x.begin());
  }
  double& operator()(Index i, Index j) { return x[at(i * cols + j)]; }
  double operator()(Index i, Index j) const { return x[at(i * cols + j)]; }
  std::vector<float> rounded() const { return {x.begin(), x.end()}; }
  Index rows, cols;
  std::vector<double> x;
};

Dense transposed(const Dense& a) {
  Dense t(a.cols, a.rows);
  for (Index i = 0; i < a.rows; ++i) {
    for (Index j = 0; j < a.cols; ++j) t(j, i) = a(i, j);
  }
  return t;
}

Dense operator*(const Dense& a, const Dense& b) {
  Dense c(a.rows, b.cols);
  for (Index i = 0; i < a.rows; ++i) {
    for (Index k = 0; k < a.cols; ++k) {
      for (Index j = 0; j < b.cols; ++j) c(i, j) += a(i, k) * b(k, j);
    }
  }
  return c;
}

template <class T>
Dense dense(Index rows, Index cols, const std::vector<T>& values, Index begin = 0) {
  Dense a(rows, cols);
  for (Index e = 0; e < rows * cols; ++e) a.x[at(e)] = number(values[at(begin + e)]);
  return a;
}

// op(A) op(B) of two matrices, uneven shapes, rows that lie further apart than they are long; the third shape
// again, which must not ask for another algorithm. `unit`: the rounding of the result, and of each of its k
// terms when they are summed in float.
template <class In, class Out>
void check_gemm(double unit, const CudaStream& stream) {
  CudaBlas blas(stream);
  const Index m = 37, n = 70, k = 129, count = 2, spare = 8;
  for (const Op op_a : {Op::kNone, Op::kTranspose}) {
    for (const Op op_b : {Op::kNone, Op::kTranspose}) {
      const Index a_rows = op_a == Op::kNone ? m : k, a_cols = op_a == Op::kNone ? k : m;
      const Index b_rows = op_b == Op::kNone ? k : n, b_cols = op_b == Op::kNone ? n : k;
      const std::vector<In> a = as<In>(noise(count * a_rows * (a_cols + spare), 1));
      const std::vector<In> b = as<In>(noise(count * b_rows * b_cols, 2));
      const std::vector<Out> c = as<Out>(noise(count * m * n, 3));
      auto device_a = on_device(a, stream), device_b = on_device(b, stream);
      auto device_c = on_device(c, stream);
      DeviceBuffer<Out> d(count * m * n, stream);
      const DeviceMatrix<const In> view_a(device_a.data(), a_rows, a_cols, a_cols + spare, count,
                                          a_rows * (a_cols + spare));
      const Index before = blas.plans();
      for (int again = 0; again < 2; ++again) {
        blas.gemm<In, Out>(op_a, op_b, 0.5, view_a, device_b.matrix(0, b_rows, b_cols, count), -2,
                           device_c.matrix(0, m, n, count), d.matrix(0, m, n, count));
      }
      expect(blas.plans() == before + 1, "the second product of a shape made a plan");
      const std::vector<Out> found = on_host(d);
      for (Index matrix = 0; matrix < count; ++matrix) {
        Dense left(a_rows, a_cols);
        for (Index i = 0; i < a_rows; ++i) {
          for (Index j = 0; j < a_cols; ++j)
            left(i, j) = number(a[at((matrix * a_rows + i) * (a_cols + spare) + j)]);
        }
        const Dense right = dense(b_rows, b_cols, b, matrix * b_rows * b_cols);
        const Dense product =
            (op_a == Op::kNone ? left : transposed(left)) * (op_b == Op::kNone ? right : transposed(right));
        for (Index e = 0; e < m * n; ++e) {
          const double expected = 0.5 * product.x[at(e)] - 2 * number(c[at(matrix * m * n + e)]);
          const double off = std::abs(number(found[at(matrix * m * n + e)]) - expected);
          // Terms of at most 4 x 4 x 0.5, and a result of at most 100.
          const double bound =
              100 * unit + 8 * static_cast<double>(k) * (sizeof(In) == 8 ? 0x1p-53 : 0x1p-24);
          expect(off <= bound, "matrix ", matrix, ", element ", e, " is off by ", off, ", at most ", bound);
        }
      }
    }
  }
}

void products_are_those_of_double(const CudaStream& stream) {
  check_gemm<float, float>(0x1p-24, stream);
  check_gemm<double, double>(0x1p-53, stream);
  check_gemm<BFloat16, float>(0x1p-24, stream);
  check_gemm<BFloat16, BFloat16>(0x1p-8, stream);
}

// 256 + 1 - 256: the first half of the terms adds up to what bf16 rounds to 256. A sum in float is exact.
void half_products_are_rounded_once(const CudaStream& stream) {
  CudaBlas blas(stream);
  for (const Index k : {Index{64}, Index{8192}}) {
    const Index m = 16, n = 8;
    std::vector<float> b(at(k * n));
    for (Index j = 0; j < n; ++j) b[at(j)] = 256, b[at(n + j)] = 1, b[at((k - 1) * n + j)] = -256;
    const auto left = on_device(as<BFloat16>(std::vector<float>(at(m * k), 1.0F)), stream);
    const auto right = on_device(as<BFloat16>(b), stream);
    DeviceBuffer<BFloat16> d(m * n, stream);
    blas.gemm<BFloat16, BFloat16>(Op::kNone, Op::kNone, 1, left.matrix(0, m, k), right.matrix(0, k, n), 0,
                                  d.matrix(0, m, n), d.matrix(0, m, n));
    for (const BFloat16 x : on_host(d)) expect(number(x) == 1, "256 + 1 - 256 is ", number(x));
  }
}

void products_of_other_shapes_are_refused(const CudaStream& stream) {
  CudaBlas blas(stream);
  DeviceBuffer<float> x(100, stream);
  try {
    blas.gemm<float, float>(Op::kNone, Op::kNone, 1, x.matrix(0, 3, 4), x.matrix(0, 5, 2), 0,
                            x.matrix(0, 3, 2), x.matrix(0, 3, 2));
  } catch (const InvalidArgument& error) {
    const std::string text = error.what();
    expect(text.find("A 1 x (3, 4), B 1 x (5, 2)") != std::string::npos, "the message is ", text);
    return;
  }
  throw CheckFailed("(3, 4) times (5, 2) was taken");
}

// Large enough to be formed by blocks: the same as the product formed at once, and symmetric.
void a_large_symmetric_product_is_formed_by_blocks(const CudaStream& stream) {
  CudaBlas blas(stream);
  const Index n = 5000, k = 64;
  auto x = on_device(noise(n * k, 4), stream);
  DeviceBuffer<float> by_blocks(n * n, stream), at_once(n * n, stream);
  const DeviceMatrix<float> a = x.matrix(0, n, k), c = by_blocks.matrix(0, n, n), d = at_once.matrix(0, n, n);
  blas.symmetric_gemm<float>(Op::kNone, Op::kTranspose, 1, a, a, 0, c, c);
  blas.gemm<float, float>(Op::kNone, Op::kTranspose, 1, a, a, 0, d, d);
  const std::vector<float> found = on_host(by_blocks);
  // 64 terms of at most 16 in float, in two orders.
  expect_near(found, on_host(at_once), 2 * 64 * 16 * 64 * 0x1p-24, "by blocks");
  for (Index i = 0; i < n; ++i) {
    for (Index j = 0; j < i; ++j)
      expect(found[at(i * n + j)] == found[at(j * n + i)], "(", i, ", ", j, ") differs from its mirror");
  }
}

// Unpivoted QR with positive diagonal by Gram-Schmidt, three times over; a dead column becomes zero.
Dense orthonormal_factor(Dense p, std::vector<std::uint8_t>& dead) {
  dead.assign(at(p.cols), 0);
  const auto dot = [&](Index j, Index k) {
    double sum = 0;
    for (Index i = 0; i < p.rows; ++i) sum += p(i, j) * p(i, k);
    return sum;
  };
  for (Index j = 0; j < p.cols; ++j) {
    const double before = std::sqrt(dot(j, j));
    for (int time = 0; time < 3; ++time) {
      for (Index k = 0; k < j; ++k) {
        const double along = dot(j, k);
        for (Index i = 0; i < p.rows; ++i) p(i, j) -= along * p(i, k);
      }
    }
    const double left = std::sqrt(dot(j, j));
    dead[at(j)] = !(left > kDeadTolerance * before);
    for (Index i = 0; i < p.rows; ++i) p(i, j) = dead[at(j)] ? 0 : p(i, j) / left;
  }
  return p;
}

struct Orthonormalised {
  std::vector<float> p;
  std::vector<std::uint8_t> dead;
  std::vector<std::int32_t> factorisation;
};
Orthonormalised orthonormalise(const std::vector<float>& p, Index count, Index rows, Index cols,
                               const CudaStream& stream) {
  CudaBlas blas(stream);
  DeviceOrthonormaliser orthonormaliser(count, rows, cols, kDeadTolerance, blas);
  auto device = on_device(p, stream);
  orthonormaliser.run(device.matrix(0, rows, cols, count));
  return {on_host(device), on_host(orthonormaliser.dead()), on_host(orthonormaliser.factorisation())};
}

// Factors of double arithmetic, rounded: the result is off by the condition of the input times 2^-53, far
// below the rounding of the result where the condition is below 1e6.
void expect_factor(const Orthonormalised& found, Index matrix, const Dense& p, double tolerance) {
  std::vector<std::uint8_t> dead;
  const Dense expected = orthonormal_factor(p, dead);
  for (Index j = 0; j < p.cols; ++j)
    expect(found.dead[at(matrix * p.cols + j)] == dead[at(j)], "column ", j, " of matrix ", matrix,
           " is dead: ", int{found.dead[at(matrix * p.cols + j)]}, ", expected ", int{dead[at(j)]});
  for (Index e = 0; e < p.rows * p.cols; ++e) {
    const double off = std::abs(number(found.p[at(matrix * p.rows * p.cols + e)]) - expected.x[at(e)]);
    expect(off <= tolerance, "element ", e, " of matrix ", matrix, " is off by ", off, ", at most ",
           tolerance);
  }
}

void orthonormal_factors_are_those_of_unpivoted_qr(const CudaStream& stream) {
  // In shared memory, in two and three blocks of columns, a single column, square.
  for (const auto& [count, rows, cols] : {std::tuple<Index, Index, Index>{5, 300, 12},
                                          {3, 1000, 64},
                                          {1, 700, 200},
                                          {2, 400, 300},
                                          {4, 50, 1},
                                          {2, 33, 33}}) {
    std::vector<float> p = noise(count * rows * cols, 5);
    if (cols == 300) {  // dead columns in every block, of what lies before them in their own and in others
      for (Index i = 0; i < rows; ++i) {
        float* const row = p.data() + i * cols;
        row[5] = 0;
        row[150] = row[3] - 2 * row[140];
        row[299] = row[7] + row[200] + row[298];
      }
    }
    const Orthonormalised found = orthonormalise(p, count, rows, cols, stream);
    for (Index matrix = 0; matrix < count; ++matrix) {
      expect(found.factorisation[at(matrix)] == 0, "matrix ", matrix,
             " went another way: ", found.factorisation[at(matrix)]);
      expect_factor(found, matrix, dense(rows, cols, p, matrix * rows * cols), 2e-7);
    }
  }
}

// Nothing depends on the scale of a matrix or of a column, and no square over- or underflows.
void any_scale_gives_the_same_factor(const CudaStream& stream) {
  const Index rows = 200, cols = 10;
  const std::vector<float> p = noise(rows * cols, 6);
  std::vector<float> scaled;
  for (const float scale : {1.0F, 0x1p100F, 0x1p-90F}) {
    for (Index e = 0; e < rows * cols; ++e)
      scaled.push_back(scale * p[at(e)] * (e % cols == 3 ? 0x1p-20F : 1));
  }
  const Orthonormalised found = orthonormalise(scaled, 3, rows, cols, stream);
  for (Index matrix = 0; matrix < 3; ++matrix) expect_factor(found, matrix, Dense(rows, cols, p), 2e-7);
}

void dead_columns_become_zero_and_disturb_nobody(const CudaStream& stream) {
  const Index rows = 256, cols = 24;
  std::vector<float> p = noise(4 * rows * cols, 7);
  const auto entry = [&](Index matrix, Index i, Index j) -> float& {
    return p[at((matrix * rows + i) * cols + j)];
  };
  for (Index i = 0; i < rows; ++i) {
    entry(0, i, 5) = 0;                                                    // a zero column
    entry(0, i, 9) = 2 * entry(0, i, 3) - entry(0, i, 8);                  // in the span of others
    entry(0, i, 11) = entry(0, i, 10) + 1e-7F * entry(0, i, 11);           // nearly
    for (Index j = 0; j < cols; ++j) entry(1, i, j) = 0;                   // nothing at all
    for (Index j = 8; j < cols; ++j) entry(2, i, j) = entry(2, i, j - 8);  // rank 8, exactly
  }
  const Orthonormalised found = orthonormalise(p, 4, rows, cols, stream);
  for (Index matrix = 0; matrix < 4; ++matrix) {
    expect(found.factorisation[at(matrix)] == 0, "matrix ", matrix, " went another way");
    expect_factor(found, matrix, dense(rows, cols, p, matrix * rows * cols), 2e-7);
  }
}

void a_matrix_with_a_nan_is_left_alone(const CudaStream& stream) {
  const Index rows = 100, cols = 8;
  std::vector<float> p = noise(3 * rows * cols, 8);
  p[at(rows * cols + 77)] = std::numeric_limits<float>::quiet_NaN();
  const Orthonormalised found = orthonormalise(p, 3, rows, cols, stream);
  expect(found.factorisation == std::vector<std::int32_t>{0, 2, 0}, "the factorisations are ",
         found.factorisation[0], " ", found.factorisation[1], " ", found.factorisation[2]);
  for (Index e = 0; e < rows * cols; ++e) {
    const float left = found.p[at(rows * cols + e)];
    expect(e == 77 ? std::isnan(left) : left == p[at(rows * cols + e)], "element ", e, " became ", left);
  }
  expect_factor(found, 0, dense(rows, cols, p), 2e-7);
  expect_factor(found, 2, dense(rows, cols, p, 2 * rows * cols), 2e-7);
}

// P = N R with R unit upper triangular, all -1 above the diagonal: no column loses more than a factor 10
// against those before it, and yet the condition doubles with every column, until the rounding of P to float
// ends that at some 1e8. Two passes end there with deviations from 0.05 to 400 (tried with numpy, whose
// rounding differs), so that of sixteen such matrices some must take the other way, and all must have the
// factor of QR.
void ill_conditioned_matrices_take_the_other_way(const CudaStream& stream) {
  const Index count = 16, rows = 128, cols = 56;
  const std::vector<float> n = noise(count * rows * cols, 9);
  std::vector<float> p(n.size());
  for (Index row = 0; row < count * rows; ++row) {
    double before = 0;
    for (Index j = 0; j < cols; ++j) {
      const auto own = static_cast<double>(n[at(row * cols + j)]);
      p[at(row * cols + j)] = static_cast<float>(own - before);
      before += own;
    }
  }
  const Orthonormalised found = orthonormalise(p, count, rows, cols, stream);
  expect(std::count(found.factorisation.begin(), found.factorisation.end(), 1) > 0,
         "two passes were accurate for all matrices");
  for (Index matrix = 0; matrix < count; ++matrix)
    expect_factor(found, matrix, dense(rows, cols, p, matrix * rows * cols), 2e-7);
}

constexpr DeviceMatrixSign<float>::Step kPolarExpress[] = {
    {8.2051, -22.9019, 16.4607}, {4.0664, -2.8612, 0.5184}, {3.9096, -2.8234, 0.5250},
    {3.2856, -2.4153, 0.4853},   {2.2779, -1.6198, 0.3985}, {1.8726, -1.2307, 0.3585},
    {1.8564, -1.2132, 0.3568},   {1.8750, -1.2500, 0.3750}};

// The iteration as it is written, in double.
Dense sign_reference(Dense x, Index steps, double safety, double epsilon) {
  double squares = 0;
  for (const double value : x.x) squares += value * value;
  for (double& value : x.x) value /= safety * std::sqrt(squares) + epsilon;
  const bool wide = x.rows <= x.cols;
  for (Index k = 0; k < steps; ++k) {
    const auto& step = kPolarExpress[at(k)];
    const Dense a = wide ? x * transposed(x) : transposed(x) * x;
    Dense p = a * a;
    for (std::size_t e = 0; e < p.x.size(); ++e) p.x[e] = step.b * a.x[e] + step.c * p.x[e];
    for (Index i = 0; i < p.rows; ++i) p(i, i) += step.a;
    x = wide ? p * x : x * p;
  }
  return x;
}

template <class T>
void check_sign(double tolerance, const CudaStream& stream) {
  CudaBlas blas(stream);
  using Step = typename DeviceMatrixSign<T>::Step;
  std::vector<Step> steps;
  for (const auto& step : kPolarExpress) steps.push_back({step.a, step.b, step.c});
  for (const auto& [rows, cols] : {std::pair<Index, Index>{48, 200}, {200, 48}, {64, 64}}) {
    const std::vector<float> u = noise(rows * cols, 11);
    for (const Index count : {Index{7}, Index{8}}) {  // the last iterate must be in x either way
      DeviceMatrixSign<T> sign(std::span<const Step>(steps).first(at(count)), 1.01, 1e-7, rows, cols, blas);
      const auto device_u = on_device(u, stream);
      DeviceBuffer<T> x(rows * cols, stream);
      sign.compute(device_u.matrix(0, rows, cols), x.matrix(0, rows, cols));
      const Dense expected = sign_reference(Dense(rows, cols, u), count, 1.01, 1e-7);
      const std::vector<T> found = on_host(x);
      for (Index e = 0; e < rows * cols; ++e) {
        const double off = std::abs(number(found[at(e)]) - expected.x[at(e)]);
        expect(off <= tolerance, rows, " x ", cols, ", ", count, " steps: element ", e, " is off by ", off,
               ", at most ", tolerance);
      }
    }
    DeviceMatrixSign<T> sign(steps, 1.01, 1e-7, rows, cols, blas);
    DeviceBuffer<float> zero(rows * cols, stream);
    DeviceBuffer<T> x(rows * cols, stream);
    sign.compute(zero.matrix(0, rows, cols), x.matrix(0, rows, cols));
    for (const T value : on_host(x)) expect(number(value) == 0, "the sign of zero is ", number(value));
  }
}

// Rounding of a step, 2^-24 or 2^-8 of an element of at most 1, times the slope of the iteration where that
// is large: only for the smallest singular values, early. Noise of these shapes has none below 0.05 |U|_2 but
// the square one. Eight steps of some ulps in float; in bf16 the rounded Gram matrices decide.
void signs_are_those_of_the_iteration_in_double(const CudaStream& stream) {
  check_sign<float>(1e-4, stream);
  check_sign<BFloat16>(0.15, stream);
}

constexpr DeviceCheck kChecks[] = {
    {"products_are_those_of_double", products_are_those_of_double},
    {"half_products_are_rounded_once", half_products_are_rounded_once},
    {"products_of_other_shapes_are_refused", products_of_other_shapes_are_refused},
    {"a_large_symmetric_product_is_formed_by_blocks", a_large_symmetric_product_is_formed_by_blocks},
    {"orthonormal_factors_are_those_of_unpivoted_qr", orthonormal_factors_are_those_of_unpivoted_qr},
    {"any_scale_gives_the_same_factor", any_scale_gives_the_same_factor},
    {"dead_columns_become_zero_and_disturb_nobody", dead_columns_become_zero_and_disturb_nobody},
    {"a_matrix_with_a_nan_is_left_alone", a_matrix_with_a_nan_is_left_alone},
    {"ill_conditioned_matrices_take_the_other_way", ill_conditioned_matrices_take_the_other_way},
    {"signs_are_those_of_the_iteration_in_double", signs_are_those_of_the_iteration_in_double},
};

}  // namespace
}  // namespace lowband

int main() { return lowband::test::run_device_checks(lowband::kChecks); }
