#include "collectives/agreement.h"
#include "trainer/message_fields.h"
#include "trainer/trainer_state.h"

#include <google/protobuf/text_format.h>

namespace lowband {

template <class Real>
CheckpointIdentity Trainer<Real>::State::identity() const {
  // What a trajectory depends on. The schedule may be extended and data may move.
  CheckpointIdentity identity;
  identity.mesh = mesh->shape();
  identity.parameters = parameter_table(model_shape);
  identity.fields = message_fields(config.model(), "model");
  RunConfig::Optimizer optimizer_fields = config.optimizer();
  optimizer_fields.clear_overlap();  // when gradients travel changes no bit of them
  optimizer_fields.clear_bucket_mib();
  identity.fields.merge(message_fields(optimizer_fields, "optimizer"));
  identity.fields.merge(message_fields(config.profile(), "profile"));
  identity.fields.merge(message_fields(config.batch(), "batch"));
  identity.fields["seed"] = std::to_string(config.seed());
  identity.fields["precision"] = RunConfig::Precision_Name(config.precision());
  return identity;
}

template <class Real>
std::vector<NamedTensor> Trainer<Real>::State::tensors(HostCopies<Real>& copies) {
  const auto weights = copies.weights_of(model->parameters());
  auto all = checkpoint_tensors<Real>(std::span<const Parameter<Real>>(weights));
  const auto state = copies.of(optimizer->state());
  const auto rest = checkpoint_tensors<Real>(std::span<const StateTensor<Real>>(state));
  all.insert(all.end(), rest.begin(), rest.end());
  return all;
}

template <class Real>
TensorPlaces Trainer<Real>::State::places() const {
  std::map<std::string, ParameterInfo> infos;
  for (const Parameter<Real>& parameter : model->parameters()) infos[parameter.info.name] = parameter.info;
  const auto letter = [](const std::string& name) { return name.substr(name.rfind('.') + 1); };
  TensorPlaces places;
  places.only_replicas_may_differ = config.optimizer().kind() == RunConfig::Optimizer::MUONBP;
  places.place = [infos, letter](const NamedTensor& tensor, const MeshShape& mesh_shape,
                                 const MeshPosition& position) {
    const auto weight = infos.find(tensor.name);
    if (weight != infos.end()) return parameter_place(weight->second, mesh_shape, position);
    const ParameterInfo& info = infos.at(tensor.name.substr(0, tensor.name.rfind('.')));
    return state_place(info, letter(tensor.name), tensor.cols, mesh_shape, position);
  };
  places.differs_between_replicas = [infos, letter](const NamedTensor& tensor) {
    return !infos.contains(tensor.name) && lowband::differs_between_replicas(letter(tensor.name));
  };
  return places;
}

template <class Real>
void Trainer<Real>::State::resume() {
  const std::string& from = config.checkpoint().resume();
  std::optional<std::filesystem::path> latest;
  agree(world, [&] {
    latest = latest_complete(checkpoints());
    // A run that began anew beside them would remove its own checkpoints first, and `auto` would continue the
    // other run.
    std::error_code missing;
    LB_EXPECTS(!latest || from == "auto" || std::filesystem::equivalent(from, *latest, missing),
               "checkpoint.resume: found ", from, " beside the checkpoint ", latest->string(),
               " of an earlier run, expected auto, another name or another output_dir");
  });
  // Process 0 chooses: on folders that are not shared, the others may see another one, or none.
  std::string chosen = latest ? latest->filename().string() : "";
  auto length = static_cast<Index>(chosen.size());
  world.broadcast<Index>({&length, 1}, 0, {Purpose::kControl});
  chosen.resize(static_cast<std::size_t>(length));
  world.broadcast<std::uint8_t>({reinterpret_cast<std::uint8_t*>(chosen.data()), chosen.size()}, 0,
                                {Purpose::kControl});
  if (from == "none" || (from == "auto" && chosen.empty())) return;
  const std::filesystem::path checkpoint =
      from == "auto" ? checkpoints() / chosen : std::filesystem::path(from);
  HostCopies<Real> copies;
  const CheckpointProgress reached =
      load_checkpoint(world, checkpoint, identity(), tensors(copies), places());
  copies.put_back();
  agree(world, [&] {
    LB_EXPECTS(reached.step <= steps(), "schedule.steps: found ", steps(), ", expected at least ",
               reached.step, ", the steps of the checkpoint ", checkpoint.string());
  });
  step = first_step = reached.step;
  if (reached.mesh != mesh->shape()) resharded_from = reached.mesh;
  const auto scalar = [&](const char* name) -> std::optional<double> {
    const auto found = reached.scalars.find(name);
    return found == reached.scalars.end() ? std::nullopt : std::optional(found->second);
  };
  last_loss = scalar("last_loss");
  factor_bytes = static_cast<Index>(scalar("factor_bytes").value_or(0));
  dense_bytes = static_cast<Index>(scalar("dense_bytes").value_or(0));
  exchange_seconds = scalar("exchange_seconds").value_or(0);
  exposed_seconds = scalar("exposed_seconds").value_or(0);
  earlier_transfers = transfer_sums_in(reached.scalars);
  best_validation = scalar("best_validation_loss");
  best_validation_step = static_cast<Index>(scalar("best_validation_step").value_or(0));
}

template <class Real>
void Trainer<Real>::State::save() {
  const Timeline::Range range(&timeline, "checkpoint", 0);
  CheckpointProgress reached;
  reached.step = step;
  reached.scalars = scalars_of(run_transfers());
  reached.scalars["exchange_seconds"] = exchange_seconds;
  reached.scalars["exposed_seconds"] = exposed_seconds;
  if (last_loss) reached.scalars["last_loss"] = *last_loss;
  reached.scalars["factor_bytes"] = static_cast<double>(factor_bytes);  // exact below 2^53
  reached.scalars["dense_bytes"] = static_cast<double>(dense_bytes);
  if (best_validation) {
    reached.scalars["best_validation_loss"] = *best_validation;
    reached.scalars["best_validation_step"] = static_cast<double>(best_validation_step);
  }
  std::string config_text;
  google::protobuf::TextFormat::PrintToString(config, &config_text);
  HostCopies<Real> copies;
  lowband::save_checkpoint(world, checkpoints(), identity(), config_text, reached, tensors(copies));
  agree(world, [&] {
    if (first_process()) keep_latest(checkpoints(), config.checkpoint().keep());
  });
}

template void Trainer<float>::State::resume();
template void Trainer<double>::State::resume();
template void Trainer<float>::State::save();
template void Trainer<double>::State::save();

}  // namespace lowband
