// The tree reduction on the device against that of the host: the same bits.
#include "collectives/cuda/device_tree_reduction.h"
#include "collectives/tree_reduction.h"
#include "runtime/bfloat16.h"
#include "tests/runtime/cuda/device_checks.h"

#include <cstring>
#include <vector>

namespace lowband {
namespace {

using namespace test;

template <class T>
T element(float x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return to_bfloat16(x);
  } else if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(static_cast<std::int64_t>(x * 1e6F));  // wraps in a byte
  } else {
    return static_cast<T>(x);
  }
}

// Every process as it holds the parts: its own, then those of 1, 2, ... places back around the ring.
template <class Stored, class Out>
void check_tree(const CudaStream& stream) {
  const Index n = 1003;
  for (const int processes : {1, 2, 3, 5, 8, 13}) {
    std::vector<std::vector<Stored>> parts;
    std::vector<const std::byte*> addresses;
    for (int p = 0; p < processes; ++p) {
      std::vector<Stored> part;
      for (const float x : noise(n, p)) part.push_back(element<Stored>(x));
      parts.push_back(part);
    }
    for (const auto& part : parts) addresses.push_back(reinterpret_cast<const std::byte*>(part.data()));
    for (const Reduction reduction : {Reduction::kSum, Reduction::kMax}) {
      std::vector<Out> expected(static_cast<std::size_t>(n));
      reduce_tree(addresses, reinterpret_cast<std::byte*>(expected.data()), n, dtype_of<Stored>,
                  dtype_of<Out>, reduction);
      for (int process = 0; process < processes; ++process) {
        std::vector<Stored> others;
        for (int back = 1; back < processes; ++back) {
          const auto& part = parts[static_cast<std::size_t>((process - back + processes) % processes)];
          others.insert(others.end(), part.begin(), part.end());
        }
        const auto own = on_device(parts[static_cast<std::size_t>(process)], stream);
        const auto device_others = on_device(others, stream);
        DeviceBuffer<Out> out(n, stream);
        device_reduce_tree({reinterpret_cast<const std::byte*>(own.data()),
                            reinterpret_cast<const std::byte*>(device_others.data()), process, processes},
                           reinterpret_cast<std::byte*>(out.data()), n, dtype_of<Stored>, dtype_of<Out>,
                           reduction, stream);
        const std::vector<Out> found = on_host(out);
        expect(std::memcmp(found.data(), expected.data(), sizeof(Out) * found.size()) == 0,
               dtype_name(dtype_of<Stored>), " to ", dtype_name(dtype_of<Out>), ", process ", process, " of ",
               processes, ": other bits than on the host");
      }
    }
  }
}

void trees_have_the_bits_of_the_host(const CudaStream& stream) {
  check_tree<float, float>(stream);
  check_tree<double, double>(stream);
  check_tree<std::uint8_t, std::uint8_t>(stream);
  check_tree<std::int64_t, std::int64_t>(stream);
  check_tree<BFloat16, float>(stream);
  check_tree<BFloat16, BFloat16>(stream);
}

constexpr DeviceCheck kChecks[] = {{"trees_have_the_bits_of_the_host", trees_have_the_bits_of_the_host}};

}  // namespace
}  // namespace lowband

int main() { return lowband::test::run_device_checks(lowband::kChecks); }
