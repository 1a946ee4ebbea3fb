#pragma once

#include "optimizers/options.h"
#include "plugin/lowband.h"
#include "sharding/parameter.h"
#include "sharding/process_mesh.h"
#include "sharding/rank_profile.h"

#include <span>
#include <string>
#include <vector>

// What a caller wrote into the structs of lowband.h, in lowband's own terms. Everything here throws
// InvalidArgument naming the field, the value found and the value expected, and touches this process alone.

namespace lowband::plugin {

/// 0 replicas become as many as `processes` allow.
MeshShape mesh_shape(const lowband_options& options, int processes);
OptimizerOptions optimizer_options(const lowband_options& options);
/// Also checks what concerns all parameters together: at least one, names that are unique.
std::vector<ParameterInfo> parameter_infos(std::span<const lowband_parameter> parameters);
/// The factor rank of every matrix. Empty where gradients travel dense.
RankProfile rank_profile(const lowband_options& options, std::span<const lowband_parameter> parameters,
                         std::span<const ParameterInfo> infos);

/// Everything that has to be equal on all processes, one fact a line: "parameters[3] wq: query, 64 x 64,
/// ...".
std::vector<std::string> facts(const lowband_options& options, std::span<const lowband_parameter> parameters);

/// `device`: where weights and gradients lie; null: on the host.
template <class Real>
std::vector<Parameter<Real>> bound_parameters(std::span<const lowband_parameter> parameters,
                                              std::span<const ParameterInfo> infos, const MeshShape& mesh,
                                              const MeshPosition& position, Device* device);

/// An address of `device`, unless that is null or there are no elements.
void expect_place(const void* memory, Index elements, const Device* device, std::string_view field);

}  // namespace lowband::plugin
