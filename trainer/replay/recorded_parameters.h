#pragma once

#include "model/transformer.h"
#include "trainer/data/safetensors.h"
#include "trainer/replay/whole_tensors.h"

#include <string>
#include <vector>

namespace lowband {

/// The parameters of a recording without a run configuration, from names and shapes alone, in the order of
/// the elements in the file:
///   two dimensions   a layer matrix, unless one of `scalar_patterns` (*, ? and [] as in a shell) matches its
///                    name: then it is updated like everything that is not a matrix, with weight decay
///   one dimension    a norm gain or bias: no weight decay
///   any other        flattened, not a matrix, with weight decay
/// A name with a part q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj or down_proj says what a layer
/// matrix does; others are taken for `up_proj`.
///
/// Throws: InvalidArgument for a tensor without elements, no tensor at all, and a pattern that matches no
/// tensor of two dimensions.
std::vector<RecordedParameter> parameters_of_file(const SafetensorsFile& weights,
                                                  const std::vector<std::string>& scalar_patterns);

/// The parameters of a model. Throws: InvalidArgument unless the file has exactly these.
std::vector<RecordedParameter> parameters_of_model(const SafetensorsFile& weights, const ModelConfig& model);

/// Whether a name says what its layer matrix does, as structural and inverted profiles have to know.
bool names_its_role(std::string_view name);

}  // namespace lowband
