#pragma once

#include "tests/trainer/scratch_directory.h"
#include "trainer/run_record.h"

#include <cmath>
#include <string>

namespace lowband {

/// Writes the record of a run of 60 steps whose loss falls to `floor`, validated every 20 steps.
inline std::filesystem::path finished_run(const ScratchDirectory& scratch, const std::string& name,
                                          const std::string& profile, double floor, Index factor_bytes) {
  const std::filesystem::path folder = scratch.path() / name;
  RunRecorder recorder(folder);
  const auto loss_at = [floor](Index step) {
    return floor + 3.0 * std::exp(-static_cast<double>(step) / 15);
  };
  for (Index step = 1; step <= 60; ++step) {
    StepRecord record;
    record.set_step(step);
    record.set_loss(loss_at(step) + 0.1 * std::sin(static_cast<double>(7 * step)));
    recorder.write(record);
    if (step % 20 != 0) continue;
    ValidationRecord validation;
    validation.set_step(step);
    validation.set_loss(loss_at(step) + 0.05);
    recorder.write(validation);
  }
  RunSummary summary;
  summary.set_name(name);
  summary.set_profile(profile);
  summary.set_steps(60);
  summary.set_optimizer("DION");
  summary.set_exchange("FACTORS");
  summary.set_wire_dtype("f32");
  summary.set_tokens_per_second(5123);
  summary.set_final_validation_loss(floor + 0.1);
  summary.set_best_validation_loss(floor + 0.05);
  summary.set_best_validation_step(40);
  summary.set_planned_factor_bytes(factor_bytes);
  summary.set_counted_factor_bytes(factor_bytes);
  summary.set_counted_dense_bytes(110000);
  summary.set_seconds_per_step(0.4);
  summary.set_optimizer_seconds_per_step(0.0625);
  summary.set_state_bytes(7000000);
  summary.set_peak_memory_bytes(250000000);
  summary.set_ratio_to_dense(static_cast<double>(factor_bytes) / 1e7);
  recorder.write(summary);
  return folder;
}

}  // namespace lowband
