#pragma once

#include "runtime/types.h"

#include <chrono>
#include <iosfwd>
#include <optional>
#include <string>
#include <string_view>

namespace lowband {

/// What one line of progress says.
struct ProgressState {
  Index step = 0;  // completed
  Index total_steps = 0;
  double loss = 0;
  double tokens_per_second = 0;
  double bytes_per_step = 0;  // payload of all axes
  double seconds_left = 0;
  std::optional<double> exposed_fraction = {};  // of the step, spent waiting for the optimizer's exchange
};

/// "step 120/300 [########............] loss 2.412 | 5.1k tok/s | 1.89 MB/step | 0:52 left", at most
/// `columns` wide: the bar shrinks first, then disappears, then fields are left out from the right. Exposed
/// communication comes last, "7 % exposed".
std::string format_progress(const ProgressState& state, int columns);

/// Three digits and a prefix: 5123 -> "5.12k"; with a unit, 1890000 -> "1.89 MB".
std::string format_quantity(double value, std::string_view unit = "");
/// "0:52", "12:05", "3:07:00".
std::string format_duration(double seconds);

/// Columns of the terminal that standard output ends at; 0 when it is no terminal. The variable
/// LOWBAND_TERMINAL_COLUMNS overrides: mpirun gives every program a terminal of its own, which says nothing
/// about where the text goes, so `lowband-run` sets it.
int terminal_columns();

/// Shows the progress of a run: one line that is written over on a terminal, else a line every few seconds.
class Progress {
 public:
  using Clock = std::chrono::steady_clock;

  /// `columns` as terminal_columns() says. Ownership: borrows `out`.
  Progress(std::ostream& out, int columns, Index completed_steps, Index total_steps,
           std::chrono::seconds plain_interval = std::chrono::seconds(10),
           Clock::time_point now = Clock::now());

  /// After each step. `step` counts completed steps; `seconds` is the time of this step alone, from which the
  /// rate follows (moving average of weight 0.95, bias-corrected); the time left follows from all time since
  /// construction, validation included. `exposed_seconds`, a part of `seconds`, is averaged like the rate.
  void update(Index step, double loss, double tokens, double seconds, double bytes,
              std::optional<double> exposed_seconds = {}, Clock::time_point now = Clock::now());
  /// A line of its own above the progress.
  void say(std::string_view line);
  /// Leaves the last state on its line.
  void finish();

 private:
  std::ostream* out_;
  int columns_;
  Index first_step_;
  Clock::time_point begin_;
  Clock::duration plain_interval_;
  Clock::time_point last_shown_;
  ProgressState state_;
  double mean_seconds_ = 0;  // of a step, not yet corrected
  double mean_tokens_ = 0;
  double mean_exposed_seconds_ = 0;
  bool line_open_ = false;  // the cursor stands behind a line that may be written over
};

}  // namespace lowband
