#pragma once

#include "collectives/communicator.h"
#include "sharding/parameter.h"
#include "sharding/process_mesh.h"
#include "trainer/checkpoint_file.h"
#include "trainer/resharding.h"

#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace lowband {

// A checkpoint is a directory "<directory>/step-000100" on a file system that all processes see:
//
//   process-0000.bin   the tensors of process 0 (checkpoint_file.h)
//   ...
//   manifest.txtpb     step, mesh, identity, parameters, configuration, size and hash of every process's file
//
// It is written as "step-000100.partial" and renamed when every file is on disk, so a directory without
// ".partial" is complete.

/// What must be equal in the run that wrote a checkpoint and the run that continues it.
struct CheckpointIdentity {
  MeshShape mesh;
  std::map<std::string, std::string> fields;  // "model.width" -> "256"; see message_fields
  std::vector<ParameterInfo> parameters;      // names and global shapes
};

/// How far a run has come.
struct CheckpointProgress {
  Index step = 0;                         // steps completed
  std::map<std::string, double> scalars;  // whatever else the trainer needs to continue bit-identically
  MeshShape mesh = {};                    // that it was written on; load_checkpoint says it
};

/// Saves this process's tensors and waits until the whole checkpoint stands under its name. A checkpoint of
/// the same step is replaced.
///
/// Collective: all processes of `world`, equal arguments except `tensors`. Returns: the checkpoint's
/// directory. Throws: IoError or InvalidArgument on all processes, naming the one that failed.
std::filesystem::path save_checkpoint(Communicator& world, const std::filesystem::path& directory,
                                      const CheckpointIdentity& identity, const std::string& config_text,
                                      const CheckpointProgress& progress,
                                      std::span<const NamedTensor> tensors);

/// Fills this process's tensors from `checkpoint`. Everything is verified on all processes, including the
/// hash of every tensor, before any process changes anything. With `places` it may have been written on
/// another mesh, and with micro-batches of another size.
///
/// Collective: all processes of `world`, equal arguments except `tensors`.
/// Throws: IoError (missing, incomplete, truncated, damaged) or InvalidArgument (another mesh, model, tensor
/// name, shape or dtype: field, value found, value expected), on all processes alike.
CheckpointProgress load_checkpoint(Communicator& world, const std::filesystem::path& checkpoint,
                                   const CheckpointIdentity& expected, std::span<const NamedTensor> tensors,
                                   const std::optional<TensorPlaces>& places = std::nullopt);

/// The complete checkpoint of the highest step in `directory`, if there is one.
std::optional<std::filesystem::path> latest_complete(const std::filesystem::path& directory);

/// Removes all complete checkpoints but the newest `count`, and what interrupted saves left behind.
/// Call on one process, within agree, while none of them saves.
void keep_latest(const std::filesystem::path& directory, Index count);

/// The configuration text that a checkpoint carries.
std::string checkpoint_config_text(const std::filesystem::path& checkpoint);

}  // namespace lowband
