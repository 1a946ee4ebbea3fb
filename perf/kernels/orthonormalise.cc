// Orthonormalisation of one factor P (rows x factor rank, float32) on one thread: Orthonormaliser of
// collectives/factors against what a library offers, the Householder QR of LAPACK (sgeqrf, sorgqr), and
// against the same two passes of Cholesky QR by BLAS calls (dsyrk on a copy in double, strsm).
//
//   orthonormalise --benchmark_repetitions=5 --benchmark_enable_random_interleaving=true
//
// Counter `error`: max |P^T P - I| of what was computed, in double; all must agree to rounding.

#include "collectives/factors/orthonormalise.h"

#include "collectives/local/local_world.h"
#include "runtime/cpu.h"
#include "runtime/linalg.h"
#include "runtime/random.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include <benchmark/benchmark.h>

extern "C" {
void sgeqrf_(const int* m, const int* n, float* a, const int* lda, float* tau, float* work, const int* size,
             int* info);
void sorgqr_(const int* m, const int* n, const int* k, float* a, const int* lda, const float* tau,
             float* work, const int* size, int* info);
void dsyrk_(const char* uplo, const char* trans, const int* n, const int* k, const double* alpha,
            const double* a, const int* lda, const double* beta, double* c, const int* ldc);
void strsm_(const char* side, const char* uplo, const char* trans, const char* diag, const int* m,
            const int* n, const float* alpha, const float* a, const int* lda, float* b, const int* ldb);
}

namespace lowband {
namespace {

class Factor {
 public:
  Factor(Index rows, Index cols) : rows_(rows), cols_(cols), first_(rows * cols), p_(rows * cols) {
    const RandomStream stream(3, "P");
    for (Index i = 0; i < first_.size(); ++i) first_[i] = static_cast<float>(stream.normal(i));
  }
  MatrixView<float> fresh() {
    std::ranges::copy(first_.span(), p_.data());
    return view();
  }
  MatrixView<float> view() { return p_.matrix(0, rows_, cols_); }
  /// Columns of P follow one another in `columns`.
  void take_columns(const std::vector<float>& columns) {
    for (Index i = 0; i < rows_; ++i) {
      for (Index j = 0; j < cols_; ++j) p_[i * cols_ + j] = columns[static_cast<std::size_t>(j * rows_ + i)];
    }
  }
  double error() {
    double largest = 0;
    for (Index i = 0; i < cols_; ++i) {
      for (Index j = i; j < cols_; ++j) {
        double sum = i == j ? -1 : 0;
        for (Index k = 0; k < rows_; ++k)
          sum += static_cast<double>(p_[k * cols_ + i]) * static_cast<double>(p_[k * cols_ + j]);
        largest = std::max(largest, std::abs(sum));
      }
    }
    return largest;
  }

 private:
  Index rows_, cols_;
  Buffer<float> first_, p_;
};

void ours(benchmark::State& state) {
  Factor factor(state.range(0), state.range(1));
  run_world(1, [&](Communicator& alone) {
    Orthonormaliser<float> orthonormaliser(alone, {factor.view()});
    for (auto _ : state) {
      factor.fresh();
      orthonormaliser.run();
    }
  });
  state.counters["error"] = factor.error();
}

void blas(benchmark::State& state) {
  const Index rows = state.range(0), cols = state.range(1);
  Factor factor(rows, cols);
  const int m = static_cast<int>(rows), n = static_cast<int>(cols);
  const double one = 1, zero = 0;
  const float one_float = 1;
  std::vector<double> wide(static_cast<std::size_t>(rows * cols));
  Buffer<double> g(cols * cols);
  std::vector<float> u(static_cast<std::size_t>(cols * cols));
  std::vector<std::uint8_t> dead(static_cast<std::size_t>(cols));
  for (auto _ : state) {
    const MatrixView<float> p = factor.fresh();
    for (int pass = 0; pass < 2; ++pass) {
      std::copy_n(p.data, p.elements(), wide.begin());
      dsyrk_("L", "N", &n, &m, &one, wide.data(), &n, &zero, g.data(), &n);
      cholesky_with_dead_columns(g.matrix(0, cols, cols), kDeadColumnTolerance, dead);
      std::ranges::transform(g.span(), u.begin(), [](double x) { return static_cast<float>(x); });
      strsm_("L", "L", "N", "N", &n, &m, &one_float, u.data(), &n, p.data, &n);
    }
  }
  state.counters["error"] = factor.error();
}

void lapack(benchmark::State& state) {
  const Index rows = state.range(0), cols = state.range(1);
  Factor factor(rows, cols);
  const int m = static_cast<int>(rows), n = static_cast<int>(cols), size = 64 * n;
  int info = 0;
  std::vector<float> columns(static_cast<std::size_t>(rows * cols)), first(columns.size());
  std::vector<float> tau(static_cast<std::size_t>(cols)), work(static_cast<std::size_t>(size));
  const MatrixView<float> p = factor.fresh();
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < cols; ++j) first[static_cast<std::size_t>(j * rows + i)] = p(i, j);
  }
  for (auto _ : state) {
    std::ranges::copy(first, columns.begin());
    sgeqrf_(&m, &n, columns.data(), &m, tau.data(), work.data(), &size, &info);
    sorgqr_(&m, &n, &n, columns.data(), &m, tau.data(), work.data(), &size, &info);
  }
  factor.take_columns(columns);
  state.counters["error"] = factor.error();
}

void shapes(benchmark::internal::Benchmark* benchmark) {
  for (const int rows : {768, 2048}) {
    for (const int cols : {4, 16, 64, 256}) benchmark->Args({rows, cols});
  }
  benchmark->Unit(benchmark::kMicrosecond);
}
BENCHMARK(ours)->Apply(shapes);
BENCHMARK(blas)->Apply(shapes);
BENCHMARK(lapack)->Apply(shapes);

}  // namespace
}  // namespace lowband

int main(int argc, char** argv) {
  lowband::ensure_fast_blas_kernels(argv);
  lowband::set_compute_threads(1);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 64;
  benchmark::RunSpecifiedBenchmarks();
}
