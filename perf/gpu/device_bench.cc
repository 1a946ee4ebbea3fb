// lowband's side of run_all: what a step does on one device, timed by the device's clock.
//
//   device_bench sign ROWS COLS       Newton-Schulz, 5 steps, in bf16
//   device_bench power ROWS COLS R    a step of low-rank power iteration with R columns, in float
//   device_bench adamw ELEMENTS       a step of AdamW, in float
//
// Prints a JSON line: seconds of every repetition, and `check`, the sum of squares of the result after the
// first steps from an input that torch is given as well.
#include "runtime/cuda/kernels.h"
#include "runtime/cuda/matrix_sign.h"
#include "runtime/cuda/orthonormalise.h"
#include "runtime/error.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <iostream>
#include <string>
#include <utility>
#include <vector>

namespace lowband {
namespace {

constexpr int kWarmUp = 3, kRepetitions = 20;

// Element k of input `which`: squares modulo the prime 2^31 - 1, twice over, around zero.
std::vector<float> input(Index elements, Index which) {
  constexpr Index kPrime = 2'147'483'647;
  std::vector<float> x(static_cast<std::size_t>(elements));
  for (Index k = 0; k < elements; ++k) {
    const Index shifted = (k + 1'000'003 * (which + 1)) % kPrime;
    const Index once = shifted * shifted % kPrime;
    const Index twice = once * once % kPrime;
    x[static_cast<std::size_t>(k)] =
        static_cast<float>(static_cast<double>(twice) / static_cast<double>(kPrime) - 0.5);
  }
  return x;
}

DeviceBuffer<float> on_device(Index elements, Index which, const CudaStream& stream) {
  DeviceBuffer<float> buffer(elements, stream);
  buffer.fill_from(input(elements, which));
  return buffer;
}

template <class T>
double sum_of_squares(const DeviceBuffer<T>& x, const CudaStream& stream) {
  DeviceSums sums(1, stream);
  DeviceBuffer<double> sum(1, stream);
  sums.sum_of_squares(x.data(), x.size(), sum.data());
  double host = 0;
  sum.copy_to({&host, 1});
  return host;
}

void time_and_print(const std::string& name, double check, const CudaStream& stream,
                    const std::function<void()>& step) {
  for (int i = 0; i < kWarmUp; ++i) step();
  CudaEvent begin(stream), end(stream);
  std::printf("{\"name\": \"%s\", \"check\": %.9g, \"seconds\": [", name.c_str(), check);
  for (int i = 0; i < kRepetitions; ++i) {
    begin.record(stream);
    step();
    end.record(stream);
    std::printf("%s%.9g", i == 0 ? "" : ", ", end.seconds_since(begin));
  }
  std::printf("]}\n");
}

void bench_sign(Index rows, Index cols) {
  const CudaStream stream;
  CudaBlas blas(stream);
  using Sign = DeviceMatrixSign<BFloat16>;
  const std::vector<Sign::Step> steps(5, {3.4445, -4.7750, 2.0315});  // Jordan et al., "Muon", 2024
  Sign sign(steps, 1, 1e-7, rows, cols, blas);
  auto u = on_device(rows * cols, 0, stream);
  DeviceBuffer<BFloat16> x(rows * cols, stream);
  const auto step = [&] { sign.compute(u.matrix(0, rows, cols), x.matrix(0, rows, cols)); };
  step();
  time_and_print("sign", sum_of_squares(x, stream), stream, step);
}

// M <- M + G ;  P <- M Q ;  P <- orthonormal ;  R <- M^T P ;  M <- M - (1 - mu) P R^T ;
// Q_j <- R_j / |R_j| ;  W <- decay W - eta P Q^T
void bench_power(Index rows, Index cols, Index r) {
  constexpr double kMu = 0.95, kEta = 0.01, kDecay = 0.9999;
  const CudaStream stream;
  CudaBlas blas(stream);
  DeviceOrthonormaliser orthonormaliser(1, rows, r, 1e-5, blas);
  DeviceSums sums(r, stream);
  auto momentum = on_device(rows * cols, 0, stream), gradient = on_device(rows * cols, 1, stream);
  auto weight = on_device(rows * cols, 2, stream), q_buffer = on_device(cols * r, 3, stream);
  DeviceBuffer<float> p_buffer(rows * r, stream), r_buffer(cols * r, stream);
  DeviceBuffer<double> squares(r, stream);
  const DeviceMatrix<float> m = momentum.matrix(0, rows, cols), w = weight.matrix(0, rows, cols);
  const DeviceMatrix<float> p = p_buffer.matrix(0, rows, r), right = r_buffer.matrix(0, cols, r),
                            q = q_buffer.matrix(0, cols, r);
  const auto step = [&] {
    accumulate(1, gradient.data(), 1, momentum.data(), nullptr, rows * cols, stream);
    blas.gemm<float, float>(Op::kNone, Op::kNone, 1, m, q, 0, p, p);
    orthonormaliser.run(p);
    blas.gemm<float, float>(Op::kTranspose, Op::kNone, 1, m, p, 0, right, right);
    blas.gemm<float, float>(Op::kNone, Op::kTranspose, kMu - 1, p, right, 1, m, m);
    sums.column_sums_of_squares(right, squares.data());
    normalise_columns(right, squares.data(), 1e-8F, q, stream);
    blas.gemm<float, float>(Op::kNone, Op::kTranspose, -kEta, p, q, kDecay, w, w);
  };
  for (int i = 0; i < 2; ++i) step();
  time_and_print("power", sum_of_squares(momentum, stream), stream, step);
}

void bench_adamw(Index elements) {
  const CudaStream stream;
  auto weight = on_device(elements, 0, stream), gradient = on_device(elements, 1, stream);
  DeviceBuffer<float> m(elements, stream), v(elements, stream);
  double t = 0;
  const auto step = [&] {
    t += 1;
    const double eta = 0.001;
    const AdamWStep<float> now{
        .beta1 = 0.9F,
        .beta2 = 0.95F,
        .step_size = static_cast<float>(eta / (1 - std::pow(0.9, t))),
        .inv_sqrt_correction2 = static_cast<float>(1 / std::sqrt(1 - std::pow(0.95, t))),
        .epsilon = 1e-8F,
        .decay = static_cast<float>(1 - eta * 0.1),
        .gradient_scale = 1};
    update(now, gradient.data(), m.data(), v.data(), weight.data(), elements, stream);
  };
  for (int i = 0; i < 3; ++i) step();
  time_and_print("adamw", sum_of_squares(weight, stream), stream, step);
}

int run(const std::vector<std::string>& words) {
  const auto number = [&](std::size_t i) { return std::stoll(words.at(i)); };
  LB_EXPECTS(!words.empty(), "device_bench: found nothing, expected sign, power or adamw");
  if (words[0] == "sign" && words.size() == 3) {
    bench_sign(number(1), number(2));
  } else if (words[0] == "power" && words.size() == 4) {
    bench_power(number(1), number(2), number(3));
  } else if (words[0] == "adamw" && words.size() == 2) {
    bench_adamw(number(1));
  } else {
    throw InvalidArgument(cat("device_bench: found ", words[0], " with ", words.size() - 1,
                              " numbers, expected sign ROWS COLS, power ROWS COLS R or adamw ELEMENTS"));
  }
  return 0;
}

}  // namespace
}  // namespace lowband

int main(int argc, char** argv) {
  try {
    return lowband::run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
