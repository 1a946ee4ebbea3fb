#pragma once

#include <filesystem>
#include <span>
#include <string>

namespace lowband {

/// One row per step at which any of the runs has a loss, a training and a validation column for each run;
/// empty where a run has no value. Throws: IoError as read_run_lines.
std::string loss_curves_csv(std::span<const std::filesystem::path> run_folders);

/// Draws the loss of finished runs over their steps: training as thin lines, validation as marked points.
/// Writes STEM.csv with the values, STEM.gp with gnuplot's instructions, STEM.png and STEM.svg.
///
/// Throws: IoError when a record cannot be read, a file cannot be written, or gnuplot is missing or fails.
void draw_loss_curves(std::span<const std::filesystem::path> run_folders, const std::filesystem::path& stem);

}  // namespace lowband
