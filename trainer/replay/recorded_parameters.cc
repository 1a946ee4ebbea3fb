#include "trainer/replay/recorded_parameters.h"

#include "runtime/error.h"

#include <algorithm>
#include <array>
#include <optional>

#include <fnmatch.h>

namespace lowband {
namespace {

struct NamedRole {
  std::string_view part;
  Role role;
  TensorCut cut;  // as in Megatron: what reads the residual stream is cut by rows
};
constexpr std::array kNamedRoles{NamedRole{"q_proj", Role::kQuery, TensorCut::kRows},
                                 NamedRole{"k_proj", Role::kKey, TensorCut::kRows},
                                 NamedRole{"v_proj", Role::kValue, TensorCut::kRows},
                                 NamedRole{"o_proj", Role::kOutput, TensorCut::kCols},
                                 NamedRole{"gate_proj", Role::kGate, TensorCut::kRows},
                                 NamedRole{"up_proj", Role::kUp, TensorCut::kRows},
                                 NamedRole{"down_proj", Role::kDown, TensorCut::kCols}};

/// The role of which a dot-separated part of the name is the word.
std::optional<NamedRole> named_role(std::string_view name) {
  for (std::size_t begin = 0; begin <= name.size();) {
    const std::size_t end = std::min(name.find('.', begin), name.size());
    const auto found = std::ranges::find(kNamedRoles, name.substr(begin, end - begin), &NamedRole::part);
    if (found != kNamedRoles.end()) return *found;
    begin = end + 1;
  }
  return std::nullopt;
}

RecordedParameter classified(const StoredTensor& tensor, bool scalar) {
  RecordedParameter parameter{{.name = tensor.name, .role = Role::kEmbedding, .rows = 1}, tensor.shape};
  ParameterInfo& info = parameter.info;
  info.cols = tensor.elements();
  if (tensor.shape.size() == 1) info.role = Role::kNorm;
  if (tensor.shape.size() != 2) return parameter;
  info.rows = tensor.shape[0];
  info.cols = tensor.shape[1];
  info.cut = TensorCut::kRows;
  if (scalar) return parameter;
  const NamedRole role = named_role(tensor.name).value_or(NamedRole{"", Role::kUp, TensorCut::kRows});
  info.role = role.role;
  info.cut = role.cut;
  return parameter;
}

}  // namespace

std::vector<RecordedParameter> parameters_of_file(const SafetensorsFile& weights,
                                                  const std::vector<std::string>& scalar_patterns) {
  LB_EXPECTS(!weights.tensors().empty(), weights.path(), ": found no tensor, expected the parameters");
  std::vector<bool> used(scalar_patterns.size());
  std::vector<RecordedParameter> parameters;
  for (const StoredTensor& tensor : weights.tensors()) {
    LB_EXPECTS(tensor.elements() > 0, weights.path(), ": ", tensor.name, ": shape: found ",
               shape_text(tensor.shape), ", expected at least one element");
    bool scalar = false;
    for (std::size_t i = 0; tensor.shape.size() == 2 && i < scalar_patterns.size(); ++i) {
      if (fnmatch(scalar_patterns[i].c_str(), tensor.name.c_str(), 0) != 0) continue;
      scalar = true;
      used[i] = true;
    }
    parameters.push_back(classified(tensor, scalar));
  }
  for (std::size_t i = 0; i < used.size(); ++i)
    LB_EXPECTS(used[i], "--scalar-parameters: found ", scalar_patterns[i],
               ", which no tensor of two dimensions in ", weights.path(),
               " matches, expected one of their names");
  return parameters;
}

std::vector<RecordedParameter> parameters_of_model(const SafetensorsFile& weights, const ModelConfig& model) {
  std::vector<RecordedParameter> parameters;
  for (const ParameterInfo& info : parameter_table(model)) {
    parameters.push_back(recorded_parameter(info));
    weights.expect(info.name, parameters.back().shape);
  }
  for (const StoredTensor& tensor : weights.tensors())
    LB_EXPECTS(std::ranges::any_of(parameters, [&](const auto& p) { return p.info.name == tensor.name; }),
               weights.path(), ": found the tensor ", tensor.name,
               ", expected only the parameters of the configuration's model");
  return parameters;
}

bool names_its_role(std::string_view name) { return named_role(name).has_value(); }

}  // namespace lowband
