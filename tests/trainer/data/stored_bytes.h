#pragma once

#include "runtime/types.h"

#include <bit>
#include <cstdint>
#include <string>
#include <vector>

namespace lowband::test {

/// A tensor of a safetensors file, written byte by byte.
struct StoredArray {
  std::string name;
  std::string dtype;
  std::vector<Index> shape;
  std::string bytes;
};

/// The lowest `count` bytes of a number, the least significant first.
inline std::string little_endian(std::uint64_t bits, int count) {
  std::string bytes;
  for (int i = 0; i < count; ++i, bits >>= 8) bytes += static_cast<char>(bits & 0xff);
  return bytes;
}

inline StoredArray stored_f32(const std::string& name, const std::vector<Index>& shape,
                              const std::vector<double>& values) {
  StoredArray array{name, "F32", shape, ""};
  for (const double x : values)
    array.bytes += little_endian(std::bit_cast<std::uint32_t>(static_cast<float>(x)), 4);
  return array;
}

inline StoredArray stored_f64(const std::string& name, const std::vector<Index>& shape,
                              const std::vector<double>& values) {
  StoredArray array{name, "F64", shape, ""};
  for (const double x : values) array.bytes += little_endian(std::bit_cast<std::uint64_t>(x), 8);
  return array;
}

/// A header and elements as a file. `header` is not checked.
inline std::string safetensors_file(const std::string& header, const std::string& elements) {
  return little_endian(header.size(), 8) + header + elements;
}

inline std::string safetensors_bytes(const std::vector<StoredArray>& arrays) {
  std::string header = R"({"__metadata__":{"format":"pt"})", elements;
  for (const StoredArray& array : arrays) {
    std::string shape;
    for (const Index extent : array.shape) shape += (shape.empty() ? "" : ",") + std::to_string(extent);
    header += ",\"" + array.name + R"(":{"dtype":")" + array.dtype + R"(","shape":[)" + shape +
              R"(],"data_offsets":[)" + std::to_string(elements.size()) + ",";
    elements += array.bytes;
    header += std::to_string(elements.size()) + "]}";
  }
  return safetensors_file(header + "}", elements);
}

}  // namespace lowband::test
