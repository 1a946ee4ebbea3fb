#include "runtime/error.h"
#include "trainer/replay/recorded_parameters.h"
#include "trainer/replay/replay.h"

#include <algorithm>

namespace lowband {
namespace {

bool goes_by_role(const RunConfig::Profile& profile) {
  const bool shape =
      profile.kind() == RunConfig::Profile::STRUCTURAL || profile.kind() == RunConfig::Profile::INVERTED;
  return shape || (profile.has_match_to() && goes_by_role(profile.match_to()));
}

/// Structural and inverted ranks follow from roles, width and head_dim, of which files have none.
void expect_roles(const RunConfig& config, const std::vector<RecordedParameter>& parameters) {
  if (!goes_by_role(config.profile())) return;
  const RunConfig::Model& model = config.model();
  for (const Index extent : {model.width(), model.head_dim()})
    LB_EXPECTS(extent >= 1, "profile: found ", model.width(), " and ", model.head_dim(),
               " for the width and head_dim of the model, from which it follows, expected at least 1: give a "
               "run configuration, or --set model.width=... --set model.head_dim=...");
  for (const RecordedParameter& parameter : parameters)
    LB_EXPECTS(!is_layer_matrix(parameter.info.role) || names_its_role(parameter.info.name),
               "profile: found the matrix ", parameter.info.name,
               ", expected a name with q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj or down_proj for a "
               "profile that goes by them");
}

std::vector<ParameterInfo> infos_of(const std::vector<RecordedParameter>& parameters) {
  std::vector<ParameterInfo> infos;
  infos.reserve(parameters.size());
  for (const RecordedParameter& parameter : parameters) infos.push_back(parameter.info);
  return infos;
}

void expect_free_output(const std::filesystem::path& output) {
  std::error_code error;
  if (!std::filesystem::exists(output, error)) return;
  LB_EXPECTS(std::filesystem::is_directory(output, error) && std::filesystem::is_empty(output, error),
             "--out: found ", output.string(),
             " with something in it, expected a folder that is empty or does "
             "not exist");
}

}  // namespace

ReplayPlan plan_replay(const ReplayRequest& request) {
  ReplayPlan plan{.config = request.config, .steps = {}, .parameters = {}, .profile = {}};
  const bool asked = request.has_model || plan.config.mesh().has_replica();
  plan.steps =
      find_recorded_steps(request.folder, asked ? std::optional(plan.config.mesh().replica()) : std::nullopt);
  plan.config.mutable_mesh()->set_replica(plan.steps.replicas);
  validate_for_replay(plan.config, request.has_model);

  const SafetensorsFile weights(request.folder / kWeightsFile);
  ModelConfig model{.width = plan.config.model().width(), .head_dim = plan.config.model().head_dim()};
  if (request.has_model) {
    model = model_config(plan.config);
    plan.parameters = parameters_of_model(weights, model);
  } else {
    plan.parameters = parameters_of_file(weights, request.scalar_patterns);
  }
  for (RecordedParameter& parameter : plan.parameters)
    parameter.info = with_blocks(plan.config, std::move(parameter.info));
  if (has_factor_ranks(plan.config)) {
    if (!request.has_model) expect_roles(plan.config, plan.parameters);
    plan.profile = rank_profile(plan.config.profile(), model, infos_of(plan.parameters));
    LB_EXPECTS(!plan.profile.matrices.empty(), weights.path(),
               ": found no layer matrix, expected one for optimizer.kind ",
               RunConfig::Optimizer::Kind_Name(plan.config.optimizer().kind()));
  }
  // It would go through unit vectors until then.
  LB_EXPECTS(plan.config.optimizer().kind() != RunConfig::Optimizer::GALORE || plan.steps.first == 0 ||
                 !request.state.empty(),
             request.folder.string(), ": found step ", plan.steps.first,
             " first, expected step 0, in which GALORE takes its first bases, or --state");
  expect_free_output(request.output);
  return plan;
}

}  // namespace lowband
