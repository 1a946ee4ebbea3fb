#include "trainer/data/safetensors.h"

#include "runtime/bfloat16.h"
#include "runtime/error.h"
#include "runtime/json.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>

#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>

namespace lowband {
namespace {

static_assert(std::endian::native == std::endian::little, "elements are mapped as they are stored");

constexpr Index kSizeBytes = 8;
/// As in the reference implementation: no header of real tensors comes near.
constexpr Index kLargestHeaderBytes = 100'000'000;
/// JSON numbers arrive as doubles, which hold every integer up to here.
constexpr double kLargestInteger = 9007199254740992.0;
constexpr std::string_view kMetadata = "__metadata__";

using google::protobuf::Struct;
using google::protobuf::Value;

Index stored_bytes(StoredType type) {
  switch (type) {
    case StoredType::kF64:
      return 8;
    case StoredType::kF32:
      return 4;
    case StoredType::kF16:
    case StoredType::kBF16:
      return 2;
  }
  return 0;
}

std::optional<StoredType> type_of(std::string_view name) {
  if (name == "F64") return StoredType::kF64;
  if (name == "F32") return StoredType::kF32;
  if (name == "F16") return StoredType::kF16;
  if (name == "BF16") return StoredType::kBF16;
  return std::nullopt;
}

/// IEEE 754 binary16: 1 bit of sign, 5 of exponent, 10 of mantissa. Exact.
float from_half(std::uint16_t bits) {
  constexpr int kInfiniteExponent = 31;
  const int exponent = bits >> 10 & 0x1f;
  const int mantissa = bits & 0x3ff;
  const float sign = (bits & 0x8000) != 0 ? -1.0F : 1.0F;
  if (exponent == kInfiniteExponent)
    return mantissa == 0 ? sign * std::numeric_limits<float>::infinity()
                         : std::numeric_limits<float>::quiet_NaN();
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
}

template <class Stored>
Stored load(const std::byte* from) {
  Stored value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

const Value& member(const std::string& where, const Struct& object, const char* name) {
  const auto found = object.fields().find(name);
  LB_EXPECTS(found != object.fields().end(), where, ": ", name, ": found nothing, expected a value");
  return found->second;
}

std::vector<Index> integers(const std::string& where, const Value& value) {
  LB_EXPECTS(value.has_list_value(), where, ": found no list, expected a list of whole numbers");
  std::vector<Index> numbers;
  for (const Value& element : value.list_value().values()) {
    const double number = element.has_number_value() ? element.number_value() : -1;
    LB_EXPECTS(number >= 0 && number <= kLargestInteger && number == std::floor(number), where,
               ": found an element that is no whole number of at least 0, expected whole numbers");
    numbers.push_back(static_cast<Index>(number));
  }
  return numbers;
}

/// Throws when the product or its bytes would not fit.
Index checked_elements(const std::string& where, std::span<const Index> shape) {
  Index elements = 1;
  for (const Index extent : shape)
    LB_EXPECTS(!__builtin_mul_overflow(elements, extent, &elements) &&
                   static_cast<double>(elements) <= kLargestInteger / 8,
               where, ": shape: found ", shape_text(shape), ", expected fewer than 2^50 elements");
  return elements;
}

StoredTensor read_entry(const std::string& where, const std::string& name, const Value& value) {
  LB_EXPECTS(value.has_struct_value(), where, ": found no object, expected dtype, shape and data_offsets");
  const Struct& object = value.struct_value();
  const std::string& dtype = member(where, object, "dtype").string_value();
  const std::optional<StoredType> type = type_of(dtype);
  LB_EXPECTS(type.has_value(), where, ": dtype: found ", dtype.empty() ? "no name" : dtype,
             ", expected F32, F64, BF16 or F16");
  StoredTensor tensor{.name = name, .shape = {}, .type = *type, .begin_bytes = 0};
  tensor.shape = integers(where + ": shape", member(where, object, "shape"));
  const auto offsets = integers(where + ": data_offsets", member(where, object, "data_offsets"));
  LB_EXPECTS(offsets.size() == 2, where, ": data_offsets: found ", offsets.size(), " numbers, expected 2");
  tensor.begin_bytes = offsets[0];
  const Index size_bytes = checked_elements(where, tensor.shape) * stored_bytes(*type);
  LB_EXPECTS(offsets[1] - offsets[0] == size_bytes, where, ": data_offsets: found ", offsets[1] - offsets[0],
             " bytes from ", offsets[0], " to ", offsets[1], ", expected ", size_bytes, " of ", dtype, " ",
             shape_text(tensor.shape));
  return tensor;
}

}  // namespace

Index StoredTensor::elements() const {
  return std::accumulate(shape.begin(), shape.end(), Index{1}, std::multiplies<>());
}

std::string shape_text(std::span<const Index> shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) text += cat(i == 0 ? "" : ", ", shape[i]);
  return text + ")";
}

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : path_(path.string()), file_(path) {
  const std::span<const std::byte> bytes = file_.bytes();
  LB_EXPECTS(std::ssize(bytes) >= kSizeBytes, path_, ": truncated: found ", bytes.size(),
             " bytes, expected at least ", kSizeBytes);
  const auto announced = load<std::uint64_t>(bytes.data());
  const Index most = std::min(kLargestHeaderBytes, std::ssize(bytes) - kSizeBytes);
  LB_EXPECTS(announced <= static_cast<std::uint64_t>(most), path_, ": size of the header: found ", announced,
             " bytes, expected at most ", most, most < kLargestHeaderBytes ? ", the rest of the file" : "");
  const auto header_bytes = static_cast<std::size_t>(announced);
  data_ = bytes.subspan(kSizeBytes + header_bytes);
  read_header(bytes.subspan(kSizeBytes, header_bytes));
  check_places();
}

void SafetensorsFile::read_header(std::span<const std::byte> header) {
  Struct object;
  const auto status = google::protobuf::util::JsonStringToMessage(
      google::protobuf::StringPiece(reinterpret_cast<const char*>(header.data()), header.size()), &object);
  LB_EXPECTS(status.ok(), path_, ": header: found no JSON object of different names, expected one (",
             std::string(status.message()).substr(0, status.message().find('\n')), ")");
  for (const auto& [name, value] : object.fields()) {
    if (name != kMetadata) tensors_.push_back(read_entry(path_ + ": " + name, name, value));
  }
  std::ranges::sort(tensors_, [](const StoredTensor& a, const StoredTensor& b) {
    return std::tuple(a.begin_bytes, a.elements(), a.name) < std::tuple(b.begin_bytes, b.elements(), b.name);
  });
}

void SafetensorsFile::check_places() const {
  Index end_bytes = 0;
  std::string_view before = "the header";
  for (const StoredTensor& tensor : tensors_) {
    LB_EXPECTS(tensor.begin_bytes == end_bytes, path_, ": ", tensor.name, ": data_offsets: found a begin at ",
               tensor.begin_bytes, ", expected ", end_bytes, ", where ", before, " ends");
    end_bytes += tensor.elements() * stored_bytes(tensor.type);
    before = tensor.name;
  }
  LB_EXPECTS(std::ssize(data_) >= end_bytes, path_, ": ", before, ": truncated: found ", data_.size(),
             " bytes of elements in the file, expected ", end_bytes);
  LB_EXPECTS(std::ssize(data_) == end_bytes, path_, ": found ", data_.size(),
             " bytes of elements in the file, expected ", end_bytes, ", where ", before, " ends");
}

const StoredTensor* SafetensorsFile::find(std::string_view name) const {
  const auto found = std::ranges::find(tensors_, name, &StoredTensor::name);
  return found == tensors_.end() ? nullptr : &*found;
}

const StoredTensor& SafetensorsFile::expect(std::string_view name, std::span<const Index> shape) const {
  const StoredTensor* tensor = find(name);
  LB_EXPECTS(tensor != nullptr, path_, ": ", name, ": found no such tensor, expected one of shape ",
             shape_text(shape));
  LB_EXPECTS(std::ranges::equal(tensor->shape, shape), path_, ": ", name, ": shape: found ",
             shape_text(tensor->shape), ", expected ", shape_text(shape));
  return *tensor;
}

template <class Real>
void SafetensorsFile::read(const StoredTensor& tensor, Index first, std::span<Real> to) const {
  const Index element_bytes = stored_bytes(tensor.type);
  const std::byte* from = data_.data() + tensor.begin_bytes + first * element_bytes;
  for (Real& x : to) {
    switch (tensor.type) {
      case StoredType::kF64:
        x = static_cast<Real>(load<double>(from));
        break;
      case StoredType::kF32:
        x = static_cast<Real>(load<float>(from));
        break;
      case StoredType::kF16:
        x = static_cast<Real>(from_half(load<std::uint16_t>(from)));
        break;
      case StoredType::kBF16:
        x = static_cast<Real>(to_float(BFloat16{load<std::uint16_t>(from)}));
        break;
    }
    from += element_bytes;
  }
}

template <class Real>
void SafetensorsFile::expect_finite() const {
  constexpr Index kChunk = 4096;
  std::vector<Real> chunk(kChunk);
  for (const StoredTensor& tensor : tensors_) {
    for (Index first = 0; first < tensor.elements(); first += kChunk) {
      const auto part =
          std::span(chunk).first(static_cast<std::size_t>(std::min(kChunk, tensor.elements() - first)));
      read<Real>(tensor, first, part);
      const auto bad = std::ranges::find_if(part, [](Real x) { return !std::isfinite(x); });
      LB_EXPECTS(bad == part.end(), path_, ": ", tensor.name, ": found ", bad == part.end() ? Real{0} : *bad,
                 " at element ", first + (bad - part.begin()), ", expected finite numbers");
    }
  }
}

template <class Real>
SafetensorsWriter<Real>::SafetensorsWriter(const std::filesystem::path& path, std::span<const Entry> entries)
    : file_(path) {
  std::string header = "{";
  Index begin_bytes = 0;
  for (const Entry& entry : entries) {
    const StoredTensor tensor{.name = entry.name, .shape = entry.shape};
    const Index end_bytes = begin_bytes + tensor.elements() * Index{sizeof(Real)};
    const std::string shape = shape_text(entry.shape);
    header +=
        cat(begin_bytes == 0 && header.size() == 1 ? "" : ",", json_string(entry.name), ":{\"dtype\":\"",
            sizeof(Real) == sizeof(double) ? "F64" : "F32", "\",\"shape\":[",
            shape.substr(1, shape.size() - 2), "],\"data_offsets\":[", begin_bytes, ",", end_bytes, "]}");
    begin_bytes = end_bytes;
  }
  header += "}";
  // Elements begin at a multiple of their size, as the reference implementation writes them.
  header.resize((header.size() + kSizeBytes - 1) / kSizeBytes * kSizeBytes, ' ');
  const std::uint64_t header_bytes = header.size();
  file_.append(std::as_bytes(std::span(&header_bytes, 1)));
  file_.append(header);
}

template void SafetensorsFile::read(const StoredTensor&, Index, std::span<float>) const;
template void SafetensorsFile::read(const StoredTensor&, Index, std::span<double>) const;
template void SafetensorsFile::expect_finite<float>() const;
template void SafetensorsFile::expect_finite<double>() const;
template class SafetensorsWriter<float>;
template class SafetensorsWriter<double>;

}  // namespace lowband
