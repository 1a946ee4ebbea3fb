// Writes what lowband's optimizers do with recorded gradients, for torch_oracle.py to do again with torch.
//
// A line for each case, parameter and step: case, parameter, rows, cols, step, then the gradient and the
// weights after it; step -1 has the initial weights alone.

#include "world_run.h"

#include <cstdio>

#include <gtest/gtest.h>

namespace {

using namespace lowband;
using namespace lowband::test;

struct Case {
  const char* name;
  OptimizerOptions options;
};

const Case kCases[] = {
    {"sgd", {.kind = OptimizerKind::kSgd, .weight_decay = 0, .sgd_momentum = 0.8, .clip_norm = 0}},
    {"sgd_nesterov",
     {.kind = OptimizerKind::kSgd,
      .weight_decay = 0,
      .sgd_momentum = 0.8,
      .sgd_nesterov = true,
      .clip_norm = 0}},
    {"adamw", {.kind = OptimizerKind::kAdamW, .weight_decay = 0.1, .clip_norm = 0}},
    {"muon",
     {.kind = OptimizerKind::kMuon,
      .sign = SignPolynomial::kNewtonSchulz5,
      .update_scale = UpdateScale::kShape,
      .weight_decay = 0.1,
      .clip_norm = 0}},
    {"muon_nesterov_rms",
     {.kind = OptimizerKind::kMuon,
      .nesterov = true,
      .sign = SignPolynomial::kNewtonSchulz5,
      .update_scale = UpdateScale::kAdamRms,
      .weight_decay = 0.1,
      .clip_norm = 0}},
};

void print(const Case& c, const ParameterInfo& info, Index step, const std::vector<const Dense*>& arrays) {
  std::printf("%s %s %lld %lld %lld", c.name, info.name.c_str(), static_cast<long long>(info.rows),
              static_cast<long long>(info.cols), static_cast<long long>(step));
  for (const Dense* array : arrays) {
    for (const double x : array->a) std::printf(" %.17g", x);
  }
  std::printf("\n");
}

}  // namespace

int main() {
  for (const Case& c : kCases) {
    RunPlan plan;
    plan.mesh = {2, 2, 1};
    plan.parameters = assorted_parameters();
    plan.options = c.options;
    plan.gradient = noisy_gradient;
    plan.shares = 4;
    plan.steps = 20;
    const auto snapshots = run<double>(plan);
    for (const TestParameter& parameter : plan.parameters) {
      const ParameterInfo& info = parameter.info;
      if (!is_layer_matrix(info.role)) continue;
      const Dense initial = initial_weight(info);
      print(c, info, -1, {&initial});
      for (Index step = 0; step < plan.steps; ++step) {
        const Dense gradient = gradient_of(plan.gradient, info, step, 0, plan.shares);
        print(c, info, step, {&gradient, &snapshots[static_cast<std::size_t>(step)].weights.at(info.name)});
      }
    }
  }
  return testing::Test::HasFailure() ? 1 : 0;
}
