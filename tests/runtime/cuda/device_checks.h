#pragma once

#include "runtime/bfloat16.h"
#include "runtime/cuda/buffer.h"
#include "runtime/cuda/stream.h"
#include "runtime/error.h"
#include "runtime/types.h"

#include <cmath>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace lowband::test {

// Checks of device code, in programs that need nothing but lowband's runtime: a machine with a device often
// has a compiler and little else.

struct DeviceCheck {
  const char* name;
  void (*body)(const CudaStream& stream);
};

/// Runs all checks on device 0 and prints a line for each. Returns 0 or 1, or 77 and the reason where there
/// is no device, which CTest shows as skipped.
int run_device_checks(std::span<const DeviceCheck> checks);

/// More elements than a launch has threads for at once.
extern const Index kManyElements;

/// The check fails with the joined message.
class CheckFailed : public Error {
 public:
  using Error::Error;
};
template <class... Parts>
void expect(bool condition, const Parts&... parts) {
  if (!condition) throw CheckFailed(cat(parts...));
}

/// |found - expected| <= tolerance for each element; a NaN is equal to nothing.
template <class Found, class Expected>
void expect_near(const std::vector<Found>& found, const std::vector<Expected>& expected, double tolerance,
                 std::string_view what) {
  expect(found.size() == expected.size(), what, ": ", found.size(), " elements, expected ", expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    const double difference = static_cast<double>(found[i]) - static_cast<double>(expected[i]);
    expect(std::abs(difference) <= tolerance, what, ": element ", i, " is ", found[i], ", expected ",
           expected[i], " to ", tolerance);
  }
}

template <class T>
DeviceBuffer<T> on_device(const std::vector<T>& host, const CudaStream& stream) {
  DeviceBuffer<T> device(static_cast<Index>(host.size()), stream);
  device.fill_from(host);
  return device;
}

template <class T>
std::vector<T> on_host(const DeviceBuffer<T>& device) {
  std::vector<T> host(static_cast<std::size_t>(device.size()));
  device.copy_to(host);
  return host;
}

/// Rounded where T is BFloat16.
template <class T>
std::vector<T> as(const std::vector<float>& x) {
  std::vector<T> converted;
  for (const float value : x) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      converted.push_back(to_bfloat16(value));
    } else {
      converted.push_back(static_cast<T>(value));
    }
  }
  return converted;
}

template <class T>
double number(T x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return static_cast<double>(to_float(x));
  } else {
    return static_cast<double>(x);
  }
}

/// Reproducible numbers around zero, of magnitude about one, all different.
std::vector<float> noise(Index elements, Index seed);

}  // namespace lowband::test
