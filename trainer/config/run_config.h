#pragma once

#include "model/model.h"
#include "optimizers/options.h"
#include "sharding/budget.h"
#include "sharding/process_mesh.h"
#include "sharding/rank_profile.h"
#include "trainer/config/run_config.pb.h"

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace lowband {

// ---- Text to message ----

/// Reads a run configuration in protobuf text format. Fields that are not written keep their defaults.
///
/// Throws: IoError when the file cannot be read; InvalidArgument as `parse_run_config`.
RunConfig load_run_config(const std::string& path);

/// Throws: InvalidArgument naming source, line, column and field, for example
/// "run.txtpb:3:18: optimizer.learning_rate: found fast, expected a number".
RunConfig parse_run_config(std::string_view text, std::string_view source_name);

/// Sets one field from "optimizer.learning_rate=0.02". A list field takes its elements separated by commas; a
/// section takes text format, "profile={kind: FRACTION numerator: 1 denominator: 8}", and is replaced as a
/// whole; with an empty value, "profile=", it is taken out.
///
/// Throws: InvalidArgument naming the field, and the nearest existing ones when it does not exist. `config`
/// is then unchanged.
void apply_override(RunConfig& config, std::string_view assignment);

/// A profile as it is written on a command line: "uniform:620", "structural", "inverted*0.125",
/// "fraction:1/4", and either of them "@" another one to be matched to it, "structural@uniform:24".
RunConfig::Profile parse_profile(std::string_view text);

// ---- Checks ----

/// Checks everything that can be known before any file is opened, for a job of `processes` processes; the
/// budget last.
///
/// Throws: InvalidArgument for the first violation, "optimizer.learning_rate: found -1, expected a positive
/// number".
void validate(const RunConfig& config, int processes);
/// The part of it that concerns how gradients become updates: mesh, optimizer, profile, diagnostics, the
/// model when `has_model`, and the schedule where there is one. Throws: as above.
void validate_for_replay(const RunConfig& config, bool has_model);

// ---- Message to what the parts of a run take; each expects a validated configuration ----

ModelConfig model_config(const RunConfig& config);
MeshShape mesh_shape(const RunConfig& config);
OptimizerOptions optimizer_options(const RunConfig& config);
double scalar_learning_rate(const RunConfig& config);
Determinism determinism(const RunConfig& config);
/// Sequences that one process computes at a time, and how many such micro-batches make its share of a step.
Index sequences_per_micro_batch(const RunConfig& config);
Index micro_batches_per_step(const RunConfig& config);

/// A parameter as the optimizer is to take it: with a block for each head where optimizer.blocks says so.
ParameterInfo with_blocks(const RunConfig& config, ParameterInfo info);
/// Those of the model.
std::vector<ParameterInfo> parameter_table(const RunConfig& config);

/// Whether layer matrices have factor ranks: they cross the replica axis compressed.
bool has_factor_ranks(const RunConfig& config);
/// How layer matrices cross the replica axis.
ReplicaTraffic replica_traffic(const RunConfig& config);
/// What `precision` stands for: of weights, gradients, states, and of what the model's products read.
DType computed_dtype(const RunConfig& config);
DType products_dtype(const RunConfig& config);
DeviceModelOptions device_model_options(const RunConfig& config);

/// The factor ranks of the layer matrices among `parameters`.
///
/// Throws: InvalidArgument naming the parameter for a rank outside 1 .. min(m, n), and "profile.match_to:
/// ..." with the nearest reachable ratio when that misses match_tolerance.
RankProfile rank_profile(const RunConfig& config, std::span<const ParameterInfo> parameters);
/// The same for any profile of this model.
RankProfile rank_profile(const RunConfig::Profile& profile, const ModelConfig& model,
                         std::span<const ParameterInfo> parameters);
/// The profile that budget.reference names. Throws: InvalidArgument "budget.reference: profile...".
RankProfile budget_reference(const RunConfig& config, std::span<const ParameterInfo> parameters);

}  // namespace lowband
