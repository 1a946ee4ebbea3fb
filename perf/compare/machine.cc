#include "perf/compare/machine.h"

#include "runtime/buffer.h"
#include "runtime/cpu.h"
#include "runtime/vector_kernels.h"

#include <algorithm>
#include <chrono>
#include <functional>

#include <immintrin.h>

namespace lowband {
namespace {

// Four times the 32 MiB of a large last-level cache.
constexpr Index kBytes = Index{128} << 20;

double seconds(const std::function<void()>& body) {
  double best = 1e300;
  for (int repetition = 0; repetition < 9; ++repetition) {
    const auto begin = std::chrono::steady_clock::now();
    body();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  return best;
}

// Twelve sums hide the latency of four cycles at two additions per cycle, with room. The empty statement
// keeps them in registers.
#define LB_SUMS(type, init, fma)                  \
  type s[12];                                     \
  for (type & x : s) x = init;                    \
  const type a = init;                            \
  for (long i = 0; i < rounds; ++i) {             \
    _Pragma("GCC unroll 12") for (type & x : s) { \
      x = fma(x, a, a);                           \
      __asm__ volatile("" : "+v"(x));             \
    }                                             \
  }                                               \
  type total = s[0];                              \
  for (int i = 1; i < 12; ++i) total = fma(total, a, s[i]);

__attribute__((target("avx512f"))) void fma_float_avx512(long rounds) {
  LB_SUMS(__m512, _mm512_set1_ps(0.5F), _mm512_fmadd_ps)
  __asm__ volatile("" : "+v"(total));
}
__attribute__((target("avx512f"))) void fma_double_avx512(long rounds) {
  LB_SUMS(__m512d, _mm512_set1_pd(0.5), _mm512_fmadd_pd)
  __asm__ volatile("" : "+v"(total));
}
__attribute__((target("avx2,fma"))) void fma_float_avx2(long rounds) {
  LB_SUMS(__m256, _mm256_set1_ps(0.5F), _mm256_fmadd_ps)
  __asm__ volatile("" : "+x"(total));
}
__attribute__((target("avx2,fma"))) void fma_double_avx2(long rounds) {
  LB_SUMS(__m256d, _mm256_set1_pd(0.5), _mm256_fmadd_pd)
  __asm__ volatile("" : "+x"(total));
}
#undef LB_SUMS

__attribute__((target("avx2"))) void read_all(const float* x, Index elements) {
  __m256 sums[8] = {};
  for (Index i = 0; i + 64 <= elements; i += 64) {
    for (int k = 0; k < 8; ++k) sums[k] = _mm256_add_ps(sums[k], _mm256_loadu_ps(x + i + 8 * k));
  }
  for (__m256& sum : sums) __asm__ volatile("" : "+x"(sum));
}

}  // namespace

Machine measure_machine() {
  const CpuInfo info = cpu_info();
  if (!info.avx2) throw Error("measure_machine: found a processor without AVX2, expected one that has it");
  const VectorKernels<float>& kernels = vector_kernels<float>();
  const Index elements = kBytes / 4;
  Buffer<float> x(elements), y(elements);
  const auto bytes = static_cast<double>(kBytes);
  Machine machine;
  machine.read = bytes / seconds([&] { read_all(x.data(), elements); });
  machine.update = 2 * bytes / seconds([&] { kernels.scale(0.5F, x.data(), elements); });
  machine.accumulate = 3 * bytes / seconds([&] { kernels.axpy(0.5F, x.data(), y.data(), elements); });
  machine.write = bytes / seconds([&] { std::fill_n(x.data(), elements, 0.0F); });

  constexpr long kRounds = 1 << 20;
  const double lanes = info.avx512 ? 16 : 8;  // of float
  const double flops = 2.0 * 12 * lanes * kRounds;
  machine.float_flops =
      flops / seconds([&] { info.avx512 ? fma_float_avx512(kRounds) : fma_float_avx2(kRounds); });
  machine.double_flops =
      flops / 2 / seconds([&] { info.avx512 ? fma_double_avx512(kRounds) : fma_double_avx2(kRounds); });
  return machine;
}

}  // namespace lowband
