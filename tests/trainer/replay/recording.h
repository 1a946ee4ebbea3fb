#pragma once

#include "tests/trainer/data/stored_bytes.h"
#include "tests/trainer/scratch_directory.h"
#include "trainer/data/safetensors.h"
#include "trainer/replay/recorded_files.h"

#include <cmath>
#include <map>
#include <string>
#include <vector>

namespace lowband::test {

struct RecordedTensor {
  std::string name;
  std::vector<Index> shape;
  Index elements() const {
    Index product = 1;
    for (const Index extent : shape) product *= extent;
    return product;
  }
};

/// Tall, wide and square matrices, an embedding, a norm gain, a tensor of three dimensions and a scalar.
inline std::vector<RecordedTensor> recorded_tensors() {
  return {
      {"embed.weight", {11, 6}}, {"a.q_proj.weight", {13, 7}}, {"a.norm.weight", {7}}, {"b.weight", {6, 9}},
      {"c.weight", {8, 8}},      {"d.kernel", {2, 3, 2}},      {"e.scale", {}}};
}

/// A number that depends on all of its arguments, about -1 .. 1, exact as a float.
inline double recorded_number(const std::string& name, Index step, int replica, Index element) {
  double phase = 0.7 * static_cast<double>(step) + 1.9 * replica + 2.3 * static_cast<double>(element);
  for (const char c : name) phase = 1.13 * phase + 0.01 * c;
  return static_cast<double>(static_cast<float>(std::sin(phase) + 0.3 * std::cos(phase * phase)));
}

inline std::vector<double> recorded_numbers(const RecordedTensor& tensor, Index step, int replica) {
  std::vector<double> numbers;
  for (Index k = 0; k < tensor.elements(); ++k)
    numbers.push_back(recorded_number(tensor.name, step, replica, k));
  return numbers;
}

/// The weights have step -1.
inline std::vector<StoredArray> recorded_arrays(Index step, int replica) {
  std::vector<StoredArray> arrays;
  for (const RecordedTensor& tensor : recorded_tensors())
    arrays.push_back(stored_f32(tensor.name, tensor.shape, recorded_numbers(tensor, step, replica)));
  return arrays;
}

/// Writes steps first .. first + count - 1 of `replicas` replicas into `folder` of the scratch directory.
inline std::filesystem::path write_recording(const ScratchDirectory& scratch, const std::string& folder,
                                             int replicas, Index first, Index count) {
  scratch.write(folder + "/weights.safetensors", safetensors_bytes(recorded_arrays(-1, 0)));
  for (Index step = first; step < first + count; ++step) {
    for (int replica = 0; replica < replicas; ++replica)
      scratch.write(folder + "/" + step_file_name(step, replicas > 1 ? std::optional(replica) : std::nullopt),
                    safetensors_bytes(recorded_arrays(step, replica)));
  }
  return scratch.path() / folder;
}

inline std::map<std::string, std::vector<double>> read_all(const std::filesystem::path& path) {
  const SafetensorsFile file(path);
  std::map<std::string, std::vector<double>> tensors;
  for (const StoredTensor& tensor : file.tensors()) {
    auto& values = tensors[tensor.name];
    values.resize(static_cast<std::size_t>(tensor.elements()));
    file.read<double>(tensor, 0, values);
  }
  return tensors;
}

}  // namespace lowband::test
