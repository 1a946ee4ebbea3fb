// safetensors files, written byte by byte: what is read, what is written, and what is refused.

#include "trainer/data/safetensors.h"

#include "runtime/error.h"
#include "tests/trainer/data/stored_bytes.h"
#include "tests/trainer/scratch_directory.h"

#include <cmath>
#include <limits>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using test::little_endian;
using test::safetensors_bytes;
using test::safetensors_file;
using test::stored_f32;
using test::stored_f64;
using test::StoredArray;
using testing::ElementsAre;
using testing::HasSubstr;

template <class Real>
std::vector<Real> elements(const SafetensorsFile& file, std::string_view name) {
  const StoredTensor* tensor = file.find(name);
  std::vector<Real> values(static_cast<std::size_t>(tensor->elements()));
  file.read<Real>(*tensor, 0, values);
  return values;
}

TEST(Safetensors, ReadsEveryElementTypeInTheOrderOfTheElements) {
  const ScratchDirectory scratch;
  // 1.5, -2, the smallest subnormal half, the largest half; bf16 of 1.5, -2, 2^-126, a large one.
  StoredArray half{"half", "F16", {4}, ""}, brain{"brain", "BF16", {2, 2}, ""};
  for (const unsigned bits : {0x3e00u, 0xc000u, 0x0001u, 0x7bffu}) half.bytes += little_endian(bits, 2);
  for (const unsigned bits : {0x3fc0u, 0xc000u, 0x0080u, 0x7f00u}) brain.bytes += little_endian(bits, 2);
  const auto path =
      scratch.write("t.safetensors", safetensors_bytes({stored_f32("z", {2, 3}, {1, 2, 3, 4, 5, 6.25}), half,
                                                        stored_f64("a", {}, {1.0 / 3}), brain}));
  const SafetensorsFile file(path);
  std::vector<std::string> names;
  for (const StoredTensor& tensor : file.tensors()) names.push_back(tensor.name);
  EXPECT_THAT(names, ElementsAre("z", "half", "a", "brain"));
  EXPECT_THAT(file.find("z")->shape, ElementsAre(2, 3));
  EXPECT_THAT(elements<float>(file, "z"), ElementsAre(1, 2, 3, 4, 5, 6.25));
  EXPECT_THAT(elements<float>(file, "half"), ElementsAre(1.5, -2, std::ldexp(1.0, -24), 65504));
  EXPECT_THAT(elements<double>(file, "brain"),
              ElementsAre(1.5, -2, std::ldexp(1.0, -126), std::ldexp(1.0, 127)));
  EXPECT_THAT(elements<double>(file, "a"), ElementsAre(1.0 / 3));
  EXPECT_THAT(elements<float>(file, "a"), ElementsAre(1.0F / 3.0F));
  float part[2];
  file.read<float>(*file.find("z"), 4, part);
  EXPECT_THAT(part, ElementsAre(5, 6.25));
  EXPECT_EQ(file.find("absent"), nullptr);
}

TEST(Safetensors, WritesTheBytesOfTheFormat) {
  const ScratchDirectory scratch;
  const auto path = scratch.path() / "t.safetensors";
  const std::vector<SafetensorsWriter<float>::Entry> entries{{"b\"x", {2, 1}}, {"a", {3}}};
  SafetensorsWriter<float> writer(path, entries);
  writer.append(std::vector<float>{1, 2});
  writer.append(std::vector<float>{3, 4, 5});
  EXPECT_FALSE(std::filesystem::exists(path));
  writer.commit();
  std::string header = R"({"b\"x":{"dtype":"F32","shape":[2, 1],"data_offsets":[0,8]},)"
                       R"("a":{"dtype":"F32","shape":[3],"data_offsets":[8,20]}})";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const std::string numbers = stored_f32("", {}, {1, 2, 3, 4, 5}).bytes;
  EXPECT_EQ(read_text(path), safetensors_file(header, numbers));
  EXPECT_THAT(elements<float>(SafetensorsFile(path), "b\"x"), ElementsAre(1, 2));
}

TEST(Safetensors, WritesAndReadsDoublesExactly) {
  const ScratchDirectory scratch;
  const auto path = scratch.path() / "t.safetensors";
  const std::vector<SafetensorsWriter<double>::Entry> entries{{"x", {2}}, {"nothing", {0, 3}}, {"one", {}}};
  SafetensorsWriter<double> writer(path, entries);
  writer.append(std::vector<double>{1.0 / 3, -1e-300});
  writer.append(std::vector<double>{});
  writer.append(std::vector<double>{7});
  writer.commit();
  const SafetensorsFile file(path);
  EXPECT_THAT(elements<double>(file, "x"), ElementsAre(1.0 / 3, -1e-300));
  EXPECT_EQ(file.find("nothing")->elements(), 0);
  EXPECT_THAT(elements<double>(file, "one"), ElementsAre(7));
}

struct Refused {
  const char* name;
  std::string bytes;
  std::vector<std::string> parts;
};

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return "\"" + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets +
         "}";
}

std::vector<Refused> refused_files() {
  const std::string good = safetensors_bytes({stored_f32("x", {2}, {1, 2}), stored_f32("y", {1}, {3})});
  const auto one = [](const std::string& header, int bytes) {
    return safetensors_file("{" + header + "}", std::string(static_cast<std::size_t>(bytes), '\0'));
  };
  const std::string x = entry("x", "F32", "[2]", "[0,8]");
  return {
      {"short", "abc", {"truncated", "3 bytes", "8"}},
      {"header_beyond", little_endian(1000, 8) + "{}", {"size of the header", "1000", "at most 2"}},
      {"huge_header", little_endian(~std::uint64_t{0}, 8) + "{}", {"size of the header", "at most 2"}},
      {"no_json", safetensors_file("{\"x\"", ""), {"header", "expected"}},
      {"no_object", safetensors_file("[1]", ""), {"header", "expected"}},
      {"twice", one(x + "," + entry("x", "F32", "[2]", "[8,16]"), 16), {"header", "x"}},
      {"truncated", good.substr(0, good.size() - 1), {"y", "truncated", "11", "12"}},
      {"too_long", good + "z", {"13", "12", "y"}},
      {"dtype", one(entry("x", "I64", "[1]", "[0,8]"), 8), {"x", "dtype", "I64", "F32, F64, BF16 or F16"}},
      {"no_dtype", one(R"("x":{"shape":[1],"data_offsets":[0,4]})", 4), {"x", "dtype", "nothing"}},
      {"no_entry", one(R"("x":3)", 0), {"x", "no object"}},
      {"shape", one(entry("x", "F32", "[3]", "[0,8]"), 8), {"x", "8 bytes", "12", "(3)"}},
      {"negative", one(entry("x", "F32", "[-1]", "[0,8]"), 8), {"x", "shape", "whole number"}},
      {"fraction", one(entry("x", "F32", "[1.5]", "[0,6]"), 6), {"x", "shape", "whole number"}},
      {"overflow", one(entry("x", "F32", "[4294967296,4294967296]", "[0,0]"), 0), {"x", "shape", "2^50"}},
      {"offsets", one(entry("x", "F32", "[2]", "[0]"), 8), {"x", "data_offsets", "1 numbers"}},
      {"backwards", one(entry("x", "F32", "[2]", "[8,0]"), 8), {"x", "data_offsets", "-8"}},
      {"overlap", one(x + "," + entry("y", "F32", "[1]", "[4,8]"), 8), {"y", "4", "8", "where x ends"}},
      {"gap", one(x + "," + entry("y", "F32", "[1]", "[12,16]"), 16), {"y", "12", "8", "where x ends"}},
      {"late", one(entry("x", "F32", "[1]", "[4,8]"), 8), {"x", "4", "0", "the header"}},
  };
}

TEST(Safetensors, RefusesWhatDoesNotFitTheFormat) {
  const ScratchDirectory scratch;
  for (const Refused& refused : refused_files()) {
    SCOPED_TRACE(refused.name);
    const auto path = scratch.write("bad.safetensors", refused.bytes);
    const std::string message = thrown_message<InvalidArgument>([&] { SafetensorsFile file(path); });
    EXPECT_THAT(message, HasSubstr(path.string()));
    EXPECT_THAT(message, HasSubstr("expected"));
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    for (const std::string& part : refused.parts) EXPECT_THAT(message, HasSubstr(part));
  }
  EXPECT_THAT(thrown_message<IoError>([&] { SafetensorsFile file(scratch.path() / "absent"); }),
              HasSubstr("absent"));
}

TEST(Safetensors, NamesWhatIsMissingMisshapenOrNotFinite) {
  const ScratchDirectory scratch;
  const double infinity = std::numeric_limits<double>::infinity();
  std::vector<double> long_values(5000, 1.0);
  long_values[4999] = 1e300;  // finite, but not as a float
  const auto path = scratch.write(
      "t.safetensors",
      safetensors_bytes({stored_f32("x", {2, 3}, {1, 2, 3, 4, 5, 6}), stored_f64("y", {5000}, long_values)}));
  const SafetensorsFile file(path);
  const std::vector<Index> transposed{3, 2}, shape{2, 3};
  EXPECT_EQ(file.expect("x", shape).name, "x");
  EXPECT_THAT(thrown_message<InvalidArgument>([&] { file.expect("x", transposed); }),
              HasSubstr("x: shape: found (2, 3), expected (3, 2)"));
  EXPECT_THAT(thrown_message<InvalidArgument>([&] { file.expect("w", shape); }),
              HasSubstr("w: found no such tensor"));
  file.expect_finite<double>();
  EXPECT_THAT(thrown_message<InvalidArgument>([&] { file.expect_finite<float>(); }),
              HasSubstr("y: found inf at element 4999"));
  const SafetensorsFile bad(
      scratch.write("bad.safetensors", safetensors_bytes({stored_f32("x", {3}, {1, -infinity, 2})})));
  EXPECT_THAT(thrown_message<InvalidArgument>([&] { bad.expect_finite<float>(); }),
              HasSubstr("x: found -inf at element 1"));
}

}  // namespace
}  // namespace lowband
