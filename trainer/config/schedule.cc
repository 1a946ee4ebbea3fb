#include "trainer/config/schedule.h"

#include "runtime/error.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace lowband {

Index linear_decay_steps(const RunConfig::Schedule& schedule) {
  if (schedule.has_decay_steps()) return schedule.decay_steps();
  return std::llround(schedule.decay_fraction() * static_cast<double>(schedule.steps()));
}

double learning_rate_factor(const RunConfig::Schedule& schedule, Index step) {
  LB_EXPECTS(step >= 0, "schedule: found step ", step, ", expected at least 0");
  if (step < schedule.warmup_steps())
    return static_cast<double>(step + 1) / static_cast<double>(schedule.warmup_steps());

  const bool cosine = schedule.kind() == RunConfig::Schedule::COSINE;
  const Index decay_begin =
      cosine ? schedule.warmup_steps() : schedule.steps() - linear_decay_steps(schedule);
  if (step < decay_begin) return 1.0;
  if (step >= schedule.steps()) return schedule.final_fraction();
  const double progress =
      static_cast<double>(step - decay_begin) / static_cast<double>(schedule.steps() - decay_begin);
  const double left = cosine ? 0.5 * (1 + std::cos(std::numbers::pi * progress)) : 1 - progress;
  return schedule.final_fraction() + (1 - schedule.final_fraction()) * left;
}

}  // namespace lowband
