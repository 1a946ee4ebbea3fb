#include "launcher/replay/replay_arguments.h"
#include "runtime/error.h"

#include <algorithm>
#include <cstdio>

namespace lowband {
namespace {

std::string fixed(double number) {
  char text[64];
  std::snprintf(text, sizeof text, "%.4f", number);
  return text;
}

std::string scientific(double number) {
  char text[64];
  std::snprintf(text, sizeof text, "%.1e", number);
  return text;
}

/// Rows of cells: the first column to the left, the others to the right.
std::string aligned(const std::vector<std::vector<std::string>>& rows) {
  std::vector<std::size_t> widths(rows.front().size());
  for (const auto& cells : rows) {
    for (std::size_t j = 0; j < cells.size(); ++j) widths[j] = std::max(widths[j], cells[j].size());
  }
  std::string text;
  for (const auto& cells : rows) {
    for (std::size_t j = 0; j < cells.size(); ++j) {
      const std::string padding(widths[j] - cells[j].size(), ' ');
      text += j == 0 ? cells[j] + padding : "  " + padding + cells[j];
    }
    text += "\n";
  }
  return text;
}

std::string matrices_table(const ReplaySummary& summary) {
  std::vector<std::vector<std::string>> rows{{"matrix", "m", "n", "rank", "bytes/step", "energy mean",
                                              "least", "last", "drift", "mass leak", "dead"}};
  const bool diagnosed = summary.diagnosed_steps() > 0;
  const auto figure = [&](const std::string& text) { return diagnosed ? text : "-"; };
  for (const ReplaySummary::Matrix& matrix : summary.matrices())
    rows.push_back(
        {matrix.name(), std::to_string(matrix.rows()), std::to_string(matrix.cols()),
         std::to_string(matrix.factor_rank()), std::to_string(matrix.planned_bytes()),
         figure(fixed(matrix.mean_captured_energy())), figure(fixed(matrix.least_captured_energy())),
         figure(fixed(matrix.last_captured_energy())), figure(scientific(matrix.last_drift())),
         figure(scientific(matrix.largest_mass_leak())), figure(std::to_string(matrix.dead_columns()))});
  return aligned(rows);
}

}  // namespace

std::string replay_table(const ReplaySummary& summary) {
  std::string text = cat(summary.optimizer(), summary.profile().empty() ? "" : " with " + summary.profile(),
                         ", ", summary.replicas(), " replica(s), steps ", summary.first_step(), " to ",
                         summary.first_step() + summary.steps() - 1, " of ", summary.folder(), "\n");
  if (summary.matrices_size() > 0) text += "\n" + matrices_table(summary) + "\n";
  if (summary.diagnosed_steps() > 0)
    text += cat("captured energy ", fixed(summary.mean_captured_energy()), ", mean over elements and ",
                summary.diagnosed_steps(), " diagnosed step(s)\n");
  text += cat("bytes of a replica per step: factors ", summary.planned_factor_bytes(), ", dense ",
              summary.planned_dense_bytes(), "; counted in all steps ", summary.counted_factor_bytes(),
              " and ", summary.counted_dense_bytes(), ", as planned; diagnostics ",
              summary.counted_periodic_bytes(), "\n");
  if (summary.dense_gradient_bytes() > 0)
    text += cat("factors / dense gradient of the matrices: ",
                fixed(static_cast<double>(summary.planned_factor_bytes()) /
                      static_cast<double>(summary.dense_gradient_bytes())),
                "\n");
  return text + cat("weights ", summary.weight_hash(), " in ", summary.output(), "\n");
}

}  // namespace lowband
