#pragma once

#include "collectives/communicator.h"
#include "trainer/config/run_config.h"
#include "trainer/replay/recorded_files.h"
#include "trainer/replay/replay_record.pb.h"
#include "trainer/replay/whole_tensors.h"

#include <filesystem>
#include <string>
#include <vector>

namespace lowband {

/// What `lowband replay` is asked for.
struct ReplayRequest {
  std::filesystem::path folder = {};  // a recording: recorded_files.h
  std::filesystem::path output = {};  // empty or not there yet
  std::filesystem::path state = {};   // initial optimizer state, see state_file_of; empty: a fresh one
  /// Whether `config` is that of a run: parameters, roles and the number of replicas are then its own, and
  /// otherwise those of the files. Only mesh, optimizer, profile, schedule, diagnostics, seed, precision,
  /// device, determinism, threads, the deadline and the model are read. Without schedule.steps the learning
  /// rates are constant.
  bool has_model = false;
  RunConfig config = {};
  std::vector<std::string> scalar_patterns = {};  // of parameters_of_file; none with a model
};

/// What a replay goes by, found in its folder and its configuration.
struct ReplayPlan {
  RunConfig config;  // with mesh.replica
  RecordedSteps steps;
  std::vector<RecordedParameter> parameters;
  RankProfile profile;  // empty without factor ranks
};

/// Finds the steps and the parameters and checks the options, without reading any element.
/// Throws: InvalidArgument, IoError naming file or field, found and expected.
ReplayPlan plan_replay(const ReplayRequest& request);

/// Applies the optimizer of the configuration to recorded gradients, replica by replica as a training run
/// would, with the numbers of the recorded steps, and writes into the output folder
///   weights.safetensors                         after the last step
///   state.safetensors, or state.replica-0...    of the optimizer
///   replay.jsonl                                ReplayLines: what was planned, counted and measured
///
/// Every process of a replica sees the whole gradient of its replica. Where the optimizer state at the
/// beginning is that of the run, its weights come out bit by bit on the same mesh, or with any number of
/// replicas on shard axes of a power of two; on others to rounding.
///
/// Collective: all processes of `world`, equal requests. Every file is checked whole before the first step,
/// and nothing is written before. Returns: on process 0 the summary.
/// Throws: AgreedFailure for bad input.
ReplaySummary replay(const ReplayRequest& request, Communicator& world);

}  // namespace lowband
