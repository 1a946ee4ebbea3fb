#pragma once

#include "launcher/plan/plan.pb.h"
#include "trainer/config/run_config.h"

#include <string>

namespace lowband {

/// What one step of `config` sends. Where its optimizer has factor ranks, also these and their bytes, beside
/// those of `reference` for the same model, which is not read otherwise.
///
/// Throws: InvalidArgument as `validate` and `rank_profile`.
PlanReport make_plan(const RunConfig& config, const RunConfig::Profile& reference);

/// The report as aligned text, neighbouring layers that are alike shown once.
std::string plan_table(const PlanReport& report);

}  // namespace lowband
