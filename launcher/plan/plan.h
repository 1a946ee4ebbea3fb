#pragma once

#include "launcher/plan/plan.pb.h"
#include "trainer/config/run_config.h"

#include <string>

namespace lowband {

/// The ranks and bytes of `config`'s profile, beside those of `reference` for the same model, and what really
/// crosses the replica axis.
///
/// Throws: InvalidArgument as `validate`, as `rank_profile`, and for an optimizer.kind without factor ranks.
PlanReport make_plan(const RunConfig& config, const RunConfig::Profile& reference);

/// The report as aligned text, neighbouring layers that are alike shown once.
std::string plan_table(const PlanReport& report);

}  // namespace lowband
