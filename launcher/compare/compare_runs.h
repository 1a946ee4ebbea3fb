#pragma once

#include "launcher/compare/comparison.pb.h"

#include <filesystem>
#include <span>
#include <string>

namespace lowband {

/// Reads the summaries of finished runs. B(r) is set against that of the first one.
///
/// Throws: InvalidArgument without a folder; IoError naming the summary that is missing (the run has not
/// ended) or cannot be read.
Comparison compare_runs(std::span<const std::filesystem::path> run_folders);

/// The comparison as aligned text, a line per run.
std::string comparison_table(const Comparison& comparison);

}  // namespace lowband
