#include "launcher/compare/compare_runs.h"

#include "runtime/error.h"
#include "trainer/progress.h"
#include "trainer/run_record.h"

#include <algorithm>
#include <cstdio>
#include <vector>

namespace lowband {
namespace {

std::string fixed(double number, int decimals) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", decimals, number);
  return text;
}

/// "DION", "POWERSGD AUTO bf16": kind, and exchange and wire where they are not the plainest.
std::string optimizer_text(const Comparison::Run& run) {
  std::string text = run.optimizer();
  if (!run.exchange().empty() && run.exchange() != "FACTORS") text += " " + run.exchange();
  if (run.wire_dtype() == "bf16") text += " bf16";
  return text;
}

// Rows of equally many cells, the first `text_columns` columns to the left, numbers to the right.
std::string aligned(const std::vector<std::vector<std::string>>& rows, std::size_t text_columns) {
  std::vector<std::size_t> widths(rows.front().size());
  for (const auto& row : rows) {
    for (std::size_t j = 0; j < row.size(); ++j) widths[j] = std::max(widths[j], row[j].size());
  }
  std::string text;
  for (const auto& row : rows) {
    for (std::size_t j = 0; j < row.size(); ++j) {
      const std::string padding(widths[j] - row[j].size(), ' ');
      text += (j > 0 ? "  " : "") + (j < text_columns ? row[j] + padding : padding + row[j]);
    }
    text += '\n';
  }
  return text;
}

}  // namespace

Comparison compare_runs(std::span<const std::filesystem::path> run_folders) {
  LB_EXPECTS(!run_folders.empty(), "compare: found no run folder, expected at least one");
  Comparison comparison;
  for (const std::filesystem::path& folder : run_folders) {
    const RunSummary summary = read_run_summary(folder);
    Comparison::Run& run = *comparison.add_runs();
    run.set_folder(folder.string());
    run.set_profile(summary.profile());
    run.set_steps(summary.steps());
    if (summary.has_final_validation_loss()) run.set_final_validation_loss(summary.final_validation_loss());
    if (summary.has_best_validation_loss()) {
      run.set_best_validation_loss(summary.best_validation_loss());
      run.set_best_validation_step(summary.best_validation_step());
    }
    run.set_tokens_per_second(summary.tokens_per_second());
    run.set_planned_factor_bytes(summary.planned_factor_bytes());
    run.set_counted_factor_bytes(summary.counted_factor_bytes());
    run.set_ratio_to_dense(summary.ratio_to_dense());
    run.set_optimizer(summary.optimizer());
    run.set_exchange(summary.exchange());
    run.set_wire_dtype(summary.wire_dtype());
    run.set_exchange_seconds(summary.exchange_seconds());
    run.set_exposed_seconds(summary.exposed_seconds());
    run.set_exposed_fraction(summary.exposed_fraction());
    run.set_seconds_per_step(summary.seconds_per_step());
    run.set_optimizer_seconds_per_step(summary.optimizer_seconds_per_step());
    run.set_counted_dense_bytes(summary.counted_dense_bytes());
    run.set_state_bytes(summary.state_bytes());
    run.set_peak_memory_bytes(summary.peak_memory_bytes());
    const auto first_bytes = static_cast<double>(comparison.runs(0).counted_factor_bytes());
    run.set_ratio_to_first(first_bytes > 0 ? static_cast<double>(run.counted_factor_bytes()) / first_bytes
                                           : 0);
  }
  return comparison;
}

namespace {

std::string name_of(const Comparison::Run& run) {
  return std::filesystem::path(run.folder()).filename().string();
}

std::string milliseconds(double seconds) { return seconds > 0 ? fixed(1e3 * seconds, 2) : "none"; }

/// What a step took and sent.
std::string costs_table(const Comparison& comparison) {
  std::vector<std::vector<std::string>> rows{{"run", "optimizer", "ms / step", "in the optimizer", "factors",
                                              "dense", "together / first run", "state", "peak memory"}};
  const auto sent = [](const Comparison::Run& run) {
    return run.counted_factor_bytes() + run.counted_dense_bytes();
  };
  for (const Comparison::Run& run : comparison.runs()) {
    const auto first = static_cast<double>(sent(comparison.runs(0)));
    rows.push_back({name_of(run), optimizer_text(run), milliseconds(run.seconds_per_step()),
                    milliseconds(run.optimizer_seconds_per_step()), cat(run.counted_factor_bytes(), " B"),
                    cat(run.counted_dense_bytes(), " B"),
                    first > 0 ? fixed(static_cast<double>(sent(run)) / first, 4) : "none",
                    cat(run.state_bytes(), " B"),
                    format_quantity(static_cast<double>(run.peak_memory_bytes()), "B")});
  }
  return aligned(rows, 2);
}

}  // namespace

std::string comparison_table(const Comparison& comparison) {
  std::vector<std::vector<std::string>> rows{{"run", "optimizer", "profile", "steps", "final val. loss",
                                              "best (step)", "tokens/s", "factors planned", "factors counted",
                                              "/ dense", "/ first run", "exposed"}};
  for (const Comparison::Run& run : comparison.runs()) {
    rows.push_back({name_of(run), optimizer_text(run), run.profile().empty() ? "none" : run.profile(),
                    std::to_string(run.steps()),
                    run.has_final_validation_loss() ? fixed(run.final_validation_loss(), 4) : "none",
                    run.has_best_validation_loss()
                        ? cat(fixed(run.best_validation_loss(), 4), " (", run.best_validation_step(), ")")
                        : "none",
                    format_quantity(run.tokens_per_second()), cat(run.planned_factor_bytes(), " B"),
                    cat(run.counted_factor_bytes(), " B"), fixed(run.ratio_to_dense(), 4),
                    fixed(run.ratio_to_first(), 4),
                    run.exchange_seconds() > 0 ? fixed(100 * run.exposed_fraction(), 1) + " %" : "none"});
  }
  return aligned(rows, 3) +
         "Loss in nats per token. Factors: their payload of one step on the replica axis. Exposed: the part "
         "of the optimizer's communication time for which training waited.\n\n" +
         costs_table(comparison) +
         "Means over the steps. Factors, dense: payload of one replica on the replica axis. State: of the "
         "optimizer, peak memory: resident, both on the process that has most.\n";
}

}  // namespace lowband
