#pragma once

#include "trainer/data/files.h"

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace lowband {

// A safetensors file, all numbers little-endian:
//
//   8 bytes   size of the header
//             header: JSON, {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}, and
//             "__metadata__" with strings, which are not read
//             elements of each tensor, row-major, one after the other without gaps
//
// Reference: https://github.com/huggingface/safetensors, "Format".

/// Element types that are read; F32 and F64 are written.
enum class StoredType : std::uint8_t { kF64, kF32, kF16, kBF16 };

struct StoredTensor {
  std::string name;
  std::vector<Index> shape;
  StoredType type = StoredType::kF32;
  Index begin_bytes = 0;  // from the end of the header
  Index elements() const;
};

/// "(2, 3)".
std::string shape_text(std::span<const Index> shape);

/// A safetensors file opened for reading.
class SafetensorsFile {
 public:
  /// Checks the whole structure. Throws: IoError when the file cannot be read, InvalidArgument naming file,
  /// tensor, found and expected for a truncated file, a header that is no JSON or names a tensor twice, an
  /// element type that is not read, a size that does not fit its shape, and tensors that overlap or leave
  /// gaps.
  explicit SafetensorsFile(const std::filesystem::path& path);

  const std::string& path() const { return path_; }
  /// In the order of their elements in the file.
  const std::vector<StoredTensor>& tensors() const { return tensors_; }
  /// Null when there is none of this name.
  const StoredTensor* find(std::string_view name) const;
  /// Throws: InvalidArgument when there is none, or it has another shape.
  const StoredTensor& expect(std::string_view name, std::span<const Index> shape) const;

  /// Elements `first` .. `first + to.size()` of a tensor, rounded to nearest where Real is narrower.
  template <class Real>
  void read(const StoredTensor& tensor, Index first, std::span<Real> to) const;
  /// Throws: InvalidArgument naming the first element of any tensor that is not finite as a Real.
  template <class Real>
  void expect_finite() const;

 private:
  void read_header(std::span<const std::byte> header);
  void check_places() const;

  std::string path_;
  MappedFile file_;
  std::span<const std::byte> data_;
  std::vector<StoredTensor> tensors_;
};

/// Writes tensors of one element type; the file appears under its name complete or not at all.
template <class Real>
class SafetensorsWriter {
 public:
  struct Entry {
    std::string name;
    std::vector<Index> shape;
  };
  /// Throws: IoError naming the path, here and in `append` and `commit`.
  SafetensorsWriter(const std::filesystem::path& path, std::span<const Entry> entries);
  /// The elements of the next entry.
  void append(std::span<const Real> elements) { file_.append(std::as_bytes(elements)); }
  void commit() { file_.commit(); }

 private:
  DurableFile file_;
};

}  // namespace lowband
