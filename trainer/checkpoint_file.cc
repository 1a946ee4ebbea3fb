#include "trainer/checkpoint_file.h"

#include "trainer/data/content_hash.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace lowband {
namespace {

struct Preamble {
  std::array<char, 8> magic;
  std::uint64_t header_bytes;
  std::uint64_t header_hash;
};
static_assert(sizeof(Preamble) == 24);
constexpr std::array<char, 8> kMagic{'l', 'o', 'w', 'b', 'a', 'n', 'd', '1'};
constexpr Index kAlignmentBytes = 64;

Index aligned(Index bytes) { return (bytes + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes; }

void pad_to_alignment(DurableFile& file) {
  static constexpr std::array<std::byte, kAlignmentBytes> kZeros{};
  const Index missing = aligned(file.size_bytes()) - file.size_bytes();
  file.append(std::span(kZeros).first(static_cast<std::size_t>(missing)));
}

std::string shape_text(Index rows, Index cols) { return cat("(", rows, ", ", cols, ")"); }

void expect_same(const std::string& file, Index i, const CheckpointFileHeader::Tensor& found,
                 const std::string& name, DType dtype) {
  LB_EXPECTS(found.name() == name, file, ": tensor ", i, ": found ", found.name(), ", expected ", name);
  LB_EXPECTS(found.dtype() == dtype_name(dtype), file, ": ", name, ": dtype: found ", found.dtype(),
             ", expected ", dtype_name(dtype));
}

}  // namespace

TensorFileReceipt write_tensor_file(const std::filesystem::path& path, std::span<const NamedTensor> tensors) {
  CheckpointFileHeader header;
  Index offset_bytes = 0;
  for (const NamedTensor& tensor : tensors) {
    auto& entry = *header.add_tensors();
    entry.set_name(tensor.name);
    entry.set_dtype(std::string(dtype_name(tensor.dtype)));
    entry.set_rows(tensor.rows);
    entry.set_cols(tensor.cols);
    entry.set_offset_bytes(offset_bytes);
    entry.set_hash(content_hash(tensor.bytes()));
    offset_bytes += aligned(tensor.size_bytes());
  }
  header.set_data_bytes(offset_bytes);
  const std::string header_text = header.SerializeAsString();
  const Preamble preamble{kMagic, header_text.size(), content_hash(header_text)};

  DurableFile file(path);
  file.append(std::as_bytes(std::span(&preamble, 1)));
  file.append(header_text);
  pad_to_alignment(file);
  for (const NamedTensor& tensor : tensors) {
    file.append(tensor.bytes());
    pad_to_alignment(file);
  }
  file.commit();
  return {file.size_bytes(), preamble.header_hash};
}

TensorFile::TensorFile(const std::filesystem::path& path, const TensorFileReceipt& receipt)
    : name_(path.string()), file_(path) {
  const std::span<const std::byte> bytes = file_.bytes();
  if (std::ssize(bytes) != receipt.size_bytes) {
    throw IoError(cat(name_, ": file size: found ", bytes.size(), " bytes, expected ", receipt.size_bytes));
  }
  const auto require = [this](bool intact) {
    if (!intact) throw IoError(cat(name_, ": damaged: the header does not match its hash"));
  };
  Preamble preamble{};
  require(bytes.size() >= sizeof preamble);
  std::memcpy(&preamble, bytes.data(), sizeof preamble);
  require(preamble.magic == kMagic && preamble.header_bytes <= bytes.size() - sizeof preamble);
  const auto header = bytes.subspan(sizeof preamble, static_cast<std::size_t>(preamble.header_bytes));
  require(preamble.header_hash == receipt.header_hash && content_hash(header) == receipt.header_hash);
  require(header_.ParseFromArray(header.data(), static_cast<int>(header.size())));
  data_begin_bytes_ = aligned(static_cast<Index>(sizeof preamble + header.size()));
  require(data_begin_bytes_ + header_.data_bytes() == std::ssize(bytes));
}

void TensorFile::check(std::span<const NamedTensor> tensors) const {
  for (int i = 0; i < header_.tensors_size() && i < std::ssize(tensors); ++i) {
    const auto& found = header_.tensors(i);
    const NamedTensor& expected = tensors[static_cast<std::size_t>(i)];
    expect_same(name_, i, found, expected.name, expected.dtype);
    LB_EXPECTS(found.rows() == expected.rows && found.cols() == expected.cols, name_, ": ", found.name(),
               ": shape: found ", shape_text(found.rows(), found.cols()), ", expected ",
               shape_text(expected.rows, expected.cols));
  }
  expect_count(std::ssize(tensors));
  for (int i = 0; i < header_.tensors_size(); ++i) {
    const auto& found = header_.tensors(i);
    expect_undamaged(found, elements(found, tensors[static_cast<std::size_t>(i)].size_bytes()));
  }
}

void TensorFile::expect_count(Index count) const {
  LB_EXPECTS(header_.tensors_size() == count, name_, ": found ", header_.tensors_size(),
             " tensors, expected ", count);
}

void TensorFile::expect_undamaged(const CheckpointFileHeader::Tensor& tensor,
                                  std::span<const std::byte> elements) const {
  const std::uint64_t hash = content_hash(elements);
  if (hash == tensor.hash()) return;
  throw IoError(cat(name_, ": ", tensor.name(), ": damaged: found hash ", hash_text(hash), ", expected ",
                    hash_text(tensor.hash())));
}

std::span<const std::byte> TensorFile::expect(Index i, const std::string& name, DType dtype,
                                              Index elements) const {
  const auto& found = header_.tensors(static_cast<int>(i));
  expect_same(name_, i, found, name, dtype);
  LB_EXPECTS(found.rows() * found.cols() == elements, name_, ": ", name, ": found ",
             shape_text(found.rows(), found.cols()), ", expected ", elements, " elements");
  const auto bytes = this->elements(found, elements * dtype_bytes(dtype));
  expect_undamaged(found, bytes);
  return bytes;
}

void TensorFile::copy_to(std::span<const NamedTensor> tensors) const {
  for (int i = 0; i < header_.tensors_size(); ++i) {
    const NamedTensor& tensor = tensors[static_cast<std::size_t>(i)];
    std::ranges::copy(elements(header_.tensors(i), tensor.size_bytes()), tensor.data);
  }
}

std::span<const std::byte> TensorFile::elements(const CheckpointFileHeader::Tensor& tensor,
                                                Index size_bytes) const {
  return file_.bytes().subspan(static_cast<std::size_t>(data_begin_bytes_ + tensor.offset_bytes()),
                               static_cast<std::size_t>(size_bytes));
}

}  // namespace lowband
