#pragma once

#include <filesystem>
#include <string>
#include <string_view>

namespace lowband {

/// A string of gnuplot's.
std::string gnuplot_text(std::string_view text);

/// Writes STEM.csv with `csv` and STEM.gp with `instructions`, and runs gnuplot on the latter in the folder
/// of STEM; what it draws is up to the instructions.
///
/// Throws: InvalidArgument for a stem without a name; IoError when a file cannot be written, or gnuplot is
/// missing or fails.
void draw_with_gnuplot(const std::filesystem::path& stem, std::string_view csv,
                       std::string_view instructions);

}  // namespace lowband
