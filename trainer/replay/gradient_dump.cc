#include "trainer/replay/gradient_dump.h"

#include "collectives/agreement.h"
#include "runtime/error.h"
#include "trainer/host_copies.h"

#include <algorithm>
#include <optional>
#include <utility>

namespace lowband {

template <class Real>
GradientDump<Real>::GradientDump(std::filesystem::path folder, Index first_step, Index steps,
                                 ProcessMesh& mesh, std::span<const Parameter<Real>> parameters)
    : folder_(std::move(folder)),
      first_step_(first_step),
      steps_(steps),
      mesh_(&mesh),
      parameters_(parameters) {
  Index largest = 0;
  for (const Parameter<Real>& parameter : parameters) {
    recorded_.push_back(recorded_parameter(parameter.info));
    largest = std::max(largest, parameter.gradient.elements());
  }
  mean_ = Buffer<Real>(largest);
}

template <class Real>
void GradientDump<Real>::prepare(Index completed_steps) {
  agree(mesh_->world(), [&] {
    if (!first_process() || completed_steps >= first_step_ + steps_) return;
    std::error_code missing;
    const bool has_files = !std::filesystem::is_empty(folder_, missing) && !missing;
    LB_EXPECTS(completed_steps > 0 || !has_files, "dump.folder: found files in ", folder_.string(),
               ", expected a folder that is empty or does not exist");
    LB_EXPECTS(completed_steps <= first_step_ || std::filesystem::exists(folder_ / kWeightsFile),
               "dump.first_step: found ", first_step_, " in a run that continues after step ",
               completed_steps, ", expected at least ", completed_steps, ", or the earlier steps' files in ",
               folder_.string());
    require_writable_directory(folder_);
  });
}

template <class Real>
void GradientDump<Real>::write(Index step, const std::vector<StateTensor<Real>>& state,
                               const std::string& config_text) {
  if (step == first_step_) write_beginning(state, config_text);
  write_gradients(step);
}

template <class Real>
void GradientDump<Real>::write_beginning(const std::vector<StateTensor<Real>>& state,
                                         const std::string& config_text) {
  const MeshShape& shape = mesh_->shape();
  const int replica = mesh_->position().replica;
  HostCopies<Real> copies;
  const auto weights = weight_pieces<Real>(recorded_, copies.weights_of(parameters_), shape);
  write_whole_tensors<Real>(*mesh_, replica == 0 ? folder_ / kWeightsFile : "", weights);
  const auto pieces = state_pieces<Real>(recorded_, copies.of(state), shape);
  write_whole_tensors<Real>(*mesh_, state_file_of(folder_ / kStateFile, replica, shape.replica), pieces);
  agree(mesh_->world(), [&] {
    if (!first_process()) return;
    DurableFile file(folder_ / "run.txtpb");
    file.append(config_text);
    file.commit();
  });
}

// The mean over a replica's tokens is the mean over its shard axis; one tensor at a time, in one buffer.
template <class Real>
void GradientDump<Real>::write_gradients(Index step) {
  const MeshShape& shape = mesh_->shape();
  auto pieces = weight_pieces<Real>(recorded_, parameters_, shape);
  for (TensorPiece<Real>& piece : pieces) piece.elements = mean_.span(0, std::ssize(piece.elements));
  const auto form_mean = [&](std::size_t i) {
    const std::span<Real> mean = pieces[i].elements;
    const MatrixView<Real> gradient = parameters_[i].gradient;
    copy<Real>(gradient, {mean.data(), gradient.rows, gradient.cols});
    if (shape.shard == 1) return;
    mesh_->shard().template all_reduce<Real>(mean, Reduction::kSum, {Purpose::kPeriodic});
    for (Real& g : mean) g /= static_cast<Real>(shape.shard);
  };
  const int replica = mesh_->position().replica;
  const auto file =
      folder_ / step_file_name(step, shape.replica == 1 ? std::nullopt : std::optional(replica));
  write_whole_tensors<Real>(*mesh_, file, pieces, form_mean);
}

template class GradientDump<float>;
template class GradientDump<double>;

}  // namespace lowband
