#pragma once

#include "runtime/types.h"

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace lowband {

// A recording of a training run is a folder of safetensors files (trainer/data/safetensors.h):
//
//   weights.safetensors                   before the first recorded step
//   step-000000.safetensors ...           gradients of a run with one replica; or
//   step-000000.replica-0.safetensors ... of each of several, the mean over the replica's tokens
//
// Steps are consecutive and begin anywhere. Tensor names are parameter names.

inline constexpr const char* kWeightsFile = "weights.safetensors";
inline constexpr const char* kStateFile = "state.safetensors";

/// "step-000012.safetensors", or with a replica "step-000012.replica-1.safetensors".
std::string step_file_name(Index step, std::optional<int> replica);

/// Where replica `replica` of `replicas` keeps its optimizer state: `file` itself with one replica, otherwise
/// "state.replica-1.safetensors" for "state.safetensors".
std::filesystem::path state_file_of(const std::filesystem::path& file, int replica, int replicas);

/// The gradients in a recording.
struct RecordedSteps {
  std::filesystem::path folder;
  Index first = 0;
  Index count = 0;
  int replicas = 1;
  bool numbered = false;  // files say which replica they are of, even if there is one

  std::filesystem::path file(Index step, int replica) const {
    return folder / step_file_name(step, numbered ? std::optional(replica) : std::nullopt);
  }
};

/// Finds the steps of a recording by the names of its files. `replicas` is how many were asked for; without
/// it, as many as the first step has.
///
/// Throws: IoError when the folder cannot be read; InvalidArgument for no step, a gap between steps, a file
/// of a replica that is missing or too many, and a name that begins with "step" and is none of the above.
RecordedSteps find_recorded_steps(const std::filesystem::path& folder, std::optional<int> replicas);

}  // namespace lowband
