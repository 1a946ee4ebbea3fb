// Passes over device memory against the host's own functions. What is elementwise has the host's bits.
#include "runtime/cuda/kernels.h"
#include "tests/runtime/cuda/device_checks.h"

#include <bit>
#include <cstdint>
#include <limits>
#include <vector>

namespace lowband {
namespace {

using namespace test;

// None, one element, less than a block, many.
const Index kSizes[] = {0, 1, 1000, kManyElements};

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

std::vector<BFloat16> halves(const std::vector<float>& x) {
  std::vector<BFloat16> rounded;
  for (const float value : x) rounded.push_back(to_bfloat16(value));
  return rounded;
}

void expect_bits(const std::vector<float>& found, const std::vector<float>& expected, const char* what) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    expect(std::bit_cast<std::uint32_t>(found[i]) == std::bit_cast<std::uint32_t>(expected[i]), what, " ", i,
           " is ", found[i], ", expected ", expected[i]);
  }
}

// Step on the host: m, v (where it has two moments) and w.
template <class Step>
void check_step(const Step& step, bool two_moments, bool rounded_gradient, const CudaStream& stream) {
  for (const Index n : kSizes) {
    const std::vector<float> gradient = noise(n, 1);
    const std::vector<BFloat16> half_gradient = halves(gradient);
    std::vector<float> m = noise(n, 2), v = noise(n, 3), w = noise(n, 4);
    for (float& x : v) x *= x;
    auto device_m = on_device(m, stream), device_v = on_device(v, stream), device_w = on_device(w, stream);
    const auto device_gradient = on_device(gradient, stream);
    const auto device_half_gradient = on_device(half_gradient, stream);
    const auto on_both = [&](const auto* g) {
      if constexpr (std::is_same_v<Step, AdamWStep<float>>) {
        update(step, g, device_m.data(), device_v.data(), device_w.data(), n, stream);
      } else {
        update(step, g, device_m.data(), device_w.data(), n, stream);
      }
    };
    rounded_gradient ? on_both(device_half_gradient.data()) : on_both(device_gradient.data());
    for (Index i = 0; i < n; ++i) {
      const float g = rounded_gradient ? to_float(half_gradient[at(i)]) : gradient[at(i)];
      if constexpr (std::is_same_v<Step, AdamWStep<float>>) {
        step(g, m[at(i)], v[at(i)], w[at(i)]);
      } else {
        step(g, m[at(i)], w[at(i)]);
      }
    }
    expect_bits(on_host(device_m), m, "m");
    if (two_moments) expect_bits(on_host(device_v), v, "v");
    expect_bits(on_host(device_w), w, "w");
  }
}

void optimizers_have_the_bits_of_the_host(const CudaStream& stream) {
  for (const bool rounded : {false, true}) {
    check_step(AdamWStep<float>{.beta1 = 0.9F,
                                .beta2 = 0.95F,
                                .step_size = 0.011F,
                                .inv_sqrt_correction2 = 1.3F,
                                .epsilon = 1e-8F,
                                .decay = 0.999F,
                                .gradient_scale = 0.7F},
               true, rounded, stream);
    check_step(LionStep<float>{.beta1 = 0.9F,
                               .new1 = 0.1F,
                               .beta2 = 0.95F,
                               .new2 = 0.05F,
                               .eta = 0.01F,
                               .decay = 0.999F,
                               .gradient_scale = 0.7F},
               false, rounded, stream);
    check_step(
        SgdStep<float>{
            .mu = 0.9F, .own = 1, .across = 0.9F, .eta = 0.01F, .decay = 0.999F, .gradient_scale = 0.7F},
        false, rounded, stream);
  }
}

void momentum_accumulates_and_is_rounded(const CudaStream& stream) {
  for (const Index n : kSizes) {
    std::vector<float> m = noise(n, 5);
    const std::vector<float> g = noise(n, 6);
    auto device_m = on_device(m, stream);
    const auto device_g = on_device(g, stream);
    DeviceBuffer<BFloat16> rounded(n, stream);
    accumulate(0.5F, device_g.data(), 0.95F, device_m.data(), rounded.data(), n, stream);
    for (Index i = 0; i < n; ++i) m[at(i)] = 0.95F * m[at(i)] + 0.5F * g[at(i)];
    expect_bits(on_host(device_m), m, "m");
    expect(on_host(rounded) == halves(m), "the bf16 copy is not m rounded");
    // With beta = 0 nothing is read: not even a NaN.
    device_m.fill_from(std::vector<float>(at(n), std::numeric_limits<float>::quiet_NaN()));
    accumulate(2, device_g.data(), 0, device_m.data(), nullptr, n, stream);
    for (Index i = 0; i < n; ++i) m[at(i)] = 2 * g[at(i)];
    expect_bits(on_host(device_m), m, "m from nothing");
  }
}

void conversions_round_as_the_host_does(const CudaStream& stream) {
  std::vector<float> x = noise(100'003, 7);
  const float special[] = {std::numeric_limits<float>::infinity(),
                           std::numeric_limits<float>::quiet_NaN(),
                           0x1.01p0F,
                           0x1.03p0F,
                           0x1.fffffep127F,
                           0x1p-149F,
                           -0.0F};
  std::copy(std::begin(special), std::end(special), x.begin());
  const auto n = static_cast<Index>(x.size());
  const auto device = on_device(x, stream);
  DeviceBuffer<BFloat16> rounded(n, stream);
  convert(1.0F, device.data(), rounded.data(), n, stream);
  // 1 times a NaN is a device's own NaN, with other bits.
  std::vector<BFloat16> found_halves = on_host(rounded), expected_halves = halves(x);
  expect(std::isnan(to_float(found_halves[1])), "a NaN became ", to_float(found_halves[1]));
  found_halves[1] = expected_halves[1] = {};
  expect(found_halves == expected_halves, "bf16 differs from to_bfloat16");
  DeviceBuffer<float> back(n, stream);
  convert(0.5F, rounded.data(), back.data(), n, stream);
  std::vector<float> expected;
  for (const BFloat16 half : halves(x)) expected.push_back(0.5F * to_float(half));
  expected[1] = 0;
  std::vector<float> found = on_host(back);
  expect(std::isnan(found[1]), "a NaN became ", found[1]);
  found[1] = 0;
  expect_bits(found, expected, "half of bf16");
}

void tensors_travel_in_one_buffer(const CudaStream& stream) {
  // Sizes that no power of two divides, one of them empty; gaps in the buffer stay as they are.
  const Index sizes[] = {1, 100'003, 0, 777};
  std::vector<DeviceBuffer<float>> tensors;
  std::vector<std::vector<float>> host;
  std::vector<WireSegment> segments;
  Index offset = 3;
  for (const Index size : sizes) {
    host.push_back(noise(size, 10 + offset));
    tensors.push_back(on_device(host.back(), stream));
    segments.push_back({tensors.back().data(), size, offset});
    offset += size + 5;
  }
  const WireSegments table(segments, stream);
  const std::vector<BFloat16> sevens(at(offset), to_bfloat16(7));
  auto wire = on_device(sevens, stream);
  table.pack(wire.data());
  std::vector<BFloat16> expected = sevens;
  for (std::size_t s = 0; s < segments.size(); ++s) {
    for (Index i = 0; i < segments[s].elements; ++i)
      expected[at(segments[s].offset + i)] = to_bfloat16(host[s][at(i)]);
  }
  expect(on_host(wire) == expected, "the packed buffer differs");
  table.unpack(0.25F, wire.data());
  for (std::size_t s = 0; s < segments.size(); ++s) {
    std::vector<float> unpacked;
    for (const float x : host[s]) unpacked.push_back(0.25F * to_float(to_bfloat16(x)));
    expect_bits(on_host(tensors[s]), unpacked, "unpacked element");
  }
}

void a_weight_takes_what_came_over_the_wire(const CudaStream& stream) {
  const Index n = 100'003;
  std::vector<float> w = noise(n, 20);
  const std::vector<BFloat16> x = halves(noise(n, 21));
  auto device_w = on_device(w, stream);
  const auto device_x = on_device(x, stream);
  // A third rounded to float, not to bf16: sum, then scale.
  unpack_and_update(0.99F, 0.1F, 1.0F / 3, device_x.data(), device_w.data(), n, stream);
  for (Index i = 0; i < n; ++i) w[at(i)] = 0.99F * w[at(i)] - 0.1F * (1.0F / 3 * to_float(x[at(i)]));
  expect_bits(on_host(device_w), w, "w");
}

void one_bad_number_is_found_wherever_it_is(const CudaStream& stream) {
  const Index n = 3'000'001;
  for (const Index sick : {Index{-1}, Index{0}, Index{1'234'567}, n - 1}) {
    std::vector<float> x = noise(n, 22);
    if (sick >= 0)
      x[at(sick)] =
          sick % 2 == 0 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
    DeviceBuffer<std::int32_t> found(1, stream);
    find_non_finite(on_device(x, stream).data(), n, found.data(), stream);
    expect(on_host(found)[0] == (sick >= 0 ? 1 : 0), "with element ", sick, " sick, found ",
           on_host(found)[0]);
  }
}

// n squares of double precision: a relative error of at most n eps.
void sums_of_squares_are_those_of_double(const CudaStream& stream) {
  DeviceSums sums(1, stream);
  for (const Index n : kSizes) {
    const std::vector<float> x = noise(n, 23);
    double expected = 0;
    for (const float value : x) expected += static_cast<double>(value) * static_cast<double>(value);
    const auto device = on_device(x, stream);
    DeviceBuffer<double> sum(1, stream);
    sums.sum_of_squares(device.data(), n, sum.data());
    const double first = on_host(sum)[0];
    expect(std::abs(first - expected) <= static_cast<double>(n) * 0x1p-53 * expected, n, " squares: ", first,
           ", expected ", expected);
    for (int again = 0; again < 20; ++again) {
      sums.sum_of_squares(device.data(), n, sum.data());
      expect(on_host(sum)[0] == first, "another run gives other bits");
    }
  }
}

void columns_are_summed_and_normalised(const CudaStream& stream) {
  for (const auto& [rows, cols] : {std::pair<Index, Index>{1, 1}, {5000, 61}, {33, 300}, {100'000, 3}}) {
    const std::vector<float> r = noise(rows * cols, 24);
    std::vector<double> expected(at(cols));
    for (Index i = 0; i < rows; ++i) {
      for (Index j = 0; j < cols; ++j) {
        const double value = static_cast<double>(r[at(i * cols + j)]);
        expected[at(j)] += value * value;
      }
    }
    DeviceSums sums(cols, stream);
    DeviceBuffer<double> squares(cols, stream);
    auto device = on_device(r, stream);
    sums.column_sums_of_squares(device.matrix(0, rows, cols), squares.data());
    // Sums of at most 1e5 numbers around one, each of which may be off by that many half ulps of double.
    expect_near(on_host(squares), expected, 1e5 * 1e5 * 0x1p-53, "sums of columns");
    normalise_columns(device.matrix(0, rows, cols), squares.data(), 1e-8F, device.matrix(0, rows, cols),
                      stream);
    std::vector<double> units;
    for (Index e = 0; e < rows * cols; ++e) {
      units.push_back(static_cast<double>(r[at(e)]) / (std::sqrt(expected[at(e % cols)]) + 1e-8));
    }
    // Four rounded operations on numbers of at most one.
    expect_near(on_host(device), units, 4 * 0x1p-24, "unit columns");
  }
}

void a_lower_triangle_is_mirrored(const CudaStream& stream) {
  for (const Index n : {Index{1}, Index{32}, Index{100}}) {
    const std::vector<float> a = noise(2 * n * n, 25);
    auto device = on_device(a, stream);
    mirror_lower(device.matrix(0, n, n, 2), stream);
    std::vector<float> expected = a;
    for (Index b = 0; b < 2; ++b) {
      for (Index i = 0; i < n; ++i) {
        for (Index j = i + 1; j < n; ++j) expected[at((b * n + i) * n + j)] = a[at((b * n + j) * n + i)];
      }
    }
    expect_bits(on_host(device), expected, "mirrored element");
  }
}

constexpr DeviceCheck kChecks[] = {
    {"optimizers_have_the_bits_of_the_host", optimizers_have_the_bits_of_the_host},
    {"momentum_accumulates_and_is_rounded", momentum_accumulates_and_is_rounded},
    {"conversions_round_as_the_host_does", conversions_round_as_the_host_does},
    {"tensors_travel_in_one_buffer", tensors_travel_in_one_buffer},
    {"a_weight_takes_what_came_over_the_wire", a_weight_takes_what_came_over_the_wire},
    {"one_bad_number_is_found_wherever_it_is", one_bad_number_is_found_wherever_it_is},
    {"sums_of_squares_are_those_of_double", sums_of_squares_are_those_of_double},
    {"columns_are_summed_and_normalised", columns_are_summed_and_normalised},
    {"a_lower_triangle_is_mirrored", a_lower_triangle_is_mirrored},
};

}  // namespace
}  // namespace lowband

int main() { return lowband::test::run_device_checks(lowband::kChecks); }
