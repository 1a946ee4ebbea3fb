#include "tests/runtime/cuda/device_checks.h"

#include <cstdint>

namespace lowband::test {

std::vector<float> noise(Index elements, Index seed) {
  std::vector<float> numbers(static_cast<std::size_t>(elements));
  // Four terms of a Weyl sequence around zero, scrambled by the finaliser of SplitMix64.
  for (Index i = 0; i < elements; ++i) {
    std::uint64_t x = static_cast<std::uint64_t>(seed) * 0x9e3779b97f4a7c15 + static_cast<std::uint64_t>(i);
    double sum = 0;
    for (int term = 0; term < 4; ++term) {
      x += 0x9e3779b97f4a7c15;
      std::uint64_t z = x;
      z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
      z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
      z ^= z >> 31;
      sum += static_cast<double>(z >> 11) * 0x1p-53 - 0.5;
    }
    numbers[static_cast<std::size_t>(i)] = static_cast<float>(sum * 1.7);  // variance 4/12 * 1.7^2, about 1
  }
  return numbers;
}

}  // namespace lowband::test
