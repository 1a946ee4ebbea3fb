#pragma once

#include "optimizers/optimizer.h"
#include "runtime/error.h"
#include "sharding/parameter.h"
#include "trainer/checkpoint.pb.h"
#include "trainer/data/files.h"

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace lowband {

/// A contiguous matrix of this process under the name it has in a checkpoint. Borrows its elements.
struct NamedTensor {
  std::string name;
  DType dtype = DType::kF32;
  Index rows = 0;
  Index cols = 0;
  std::byte* data = nullptr;

  Index size_bytes() const { return rows * cols * dtype_bytes(dtype); }
  std::span<std::byte> bytes() const { return {data, static_cast<std::size_t>(size_bytes())}; }
};

template <class Real>
NamedTensor named_tensor(std::string name, MatrixView<Real> value) {
  LB_EXPECTS(value.contiguous(), "checkpoint tensor ", name, ": found a row stride of ", value.row_stride,
             ", expected ", value.cols);
  return {std::move(name), dtype_of<Real>, value.rows, value.cols, reinterpret_cast<std::byte*>(value.data)};
}

/// The weights of a model, as "<parameter>".
template <class Real>
std::vector<NamedTensor> checkpoint_tensors(std::span<const Parameter<Real>> parameters) {
  std::vector<NamedTensor> tensors;
  for (const Parameter<Real>& parameter : parameters) {
    tensors.push_back(named_tensor(parameter.info.name, parameter.weight));
  }
  return tensors;
}

/// The state of an optimizer, as "<parameter>.<letter>".
template <class Real>
std::vector<NamedTensor> checkpoint_tensors(std::span<const StateTensor<Real>> state) {
  std::vector<NamedTensor> tensors;
  for (const StateTensor<Real>& piece : state) tensors.push_back(named_tensor(piece.name, piece.value));
  return tensors;
}

// The tensors of one process in one file:
//
//   8 bytes  "lowband1"
//   8 bytes  size of the header
//   8 bytes  XXH64 of the header
//            header: CheckpointFileHeader, a name, shape, place and hash for every tensor
//            elements of each tensor; the first and every further one begins at a multiple of 64 bytes

struct TensorFileReceipt {
  Index size_bytes = 0;
  std::uint64_t header_hash = 0;  // covers all contents, since the header holds the hash of every tensor
};

/// Writes the file; it appears under its name complete and on disk. Throws: IoError.
TensorFileReceipt write_tensor_file(const std::filesystem::path& path, std::span<const NamedTensor> tensors);

/// A tensor file opened for reading, its structure and header found right.
class TensorFile {
 public:
  /// Throws: IoError when the file is missing, has another size than `receipt`, or is damaged.
  TensorFile(const std::filesystem::path& path, const TensorFileReceipt& receipt);

  /// Verifies that the file holds exactly `tensors`, in this order, and that no element is damaged.
  /// Throws: InvalidArgument naming tensor, found and expected for another name, dtype, shape or number of
  /// tensors; IoError naming the tensor whose hash differs.
  void check(std::span<const NamedTensor> tensors) const;

  /// Fills `tensors`. Requires check(tensors).
  void copy_to(std::span<const NamedTensor> tensors) const;

  /// Throws: InvalidArgument unless the file holds `count` tensors.
  void expect_count(Index count) const;
  /// The elements of tensor number `i`, of any shape. Throws: as check, for another name, dtype or number of
  /// elements, and when they are damaged.
  std::span<const std::byte> expect(Index i, const std::string& name, DType dtype, Index elements) const;

 private:
  void expect_undamaged(const CheckpointFileHeader::Tensor& tensor,
                        std::span<const std::byte> elements) const;
  std::span<const std::byte> elements(const CheckpointFileHeader::Tensor& tensor, Index size_bytes) const;

  std::string name_;
  MappedFile file_;
  CheckpointFileHeader header_;
  Index data_begin_bytes_ = 0;
};

}  // namespace lowband
