#pragma once

#include "optimizers/sharded_optimizer.h"
#include "runtime/copy.h"
#include "runtime/random.h"

#include <limits>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace lowband::test {

// Two matrices of one shape, a tall and a wide one, an embedding and a gain.
inline std::vector<ParameterInfo> small_parameters() {
  return {
      {"q", Role::kQuery, 24, 20, TensorCut::kNone},         {"k", Role::kKey, 24, 20, TensorCut::kNone},
      {"up", Role::kUp, 35, 20, TensorCut::kNone},           {"down", Role::kDown, 20, 35, TensorCut::kNone},
      {"embed", Role::kEmbedding, 50, 20, TensorCut::kNone}, {"norm", Role::kNorm, 1, 20, TensorCut::kNone}};
}

/// Those parameters, and an optimizer of them by all processes of `world` as replicas, on a device of its
/// own, or on the host. Gradients differ between processes.
class SmallTraining {
 public:
  SmallTraining(Communicator& world, bool on_device, const OptimizerOptions& options)
      : world_(world), device_(on_device ? open_device() : nullptr) {
    world.set_device(device_.get());
    mesh_.emplace(world, MeshShape{.replica = world.size()});
    Index elements = 0;
    for (const ParameterInfo& info : small_parameters()) elements += info.elements();
    weights_ = Buffer<float>(elements, device_.get());
    gradients_ = Buffer<float>(elements, device_.get());
    Index offset = 0;
    RankProfile profile{.name = "uniform", .matrices = {}, .factor_ranks = {}};
    for (const ParameterInfo& info : small_parameters()) {
      parameters_.push_back({info, weights_.matrix(offset, info.rows, info.cols),
                             gradients_.matrix(offset, info.rows, info.cols)});
      offset += info.elements();
      if (!is_layer_matrix(info.role) || !exchanges_factors(options.kind)) continue;
      profile.matrices.push_back(info);
      profile.factor_ranks.push_back(5);
    }
    put(weights_, -1);
    optimizer_.emplace(*mesh_, parameters_, profile, options);
  }
  SmallTraining(const SmallTraining&) = delete;
  SmallTraining& operator=(const SmallTraining&) = delete;
  ~SmallTraining() {
    optimizer_.reset();
    mesh_.reset();
    world_.set_device(nullptr);
  }

  /// Gradients of `step`, with a NaN in those of parameter `bad` where there is one.
  void draw_gradients(int step, int bad = -1) {
    put(gradients_, step + 1000 * world_.process());
    if (bad < 0) return;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const MatrixView<float> gradient = parameters_[static_cast<std::size_t>(bad)].gradient;
    copy<float>({&nan, 1, 1}, gradient.block(0, 1, 0, 1));
  }
  PendingReport step(int step) {
    return optimizer_->step({.step = step, .learning_rate = 0.01, .scalar_learning_rate = 0.01});
  }
  std::vector<float> weights() const {
    const OnHost<float> all(weights_.line());
    return {all.view().data, all.view().data + weights_.size()};
  }
  std::vector<float> weight(std::size_t i) const {
    const OnHost<float> all(parameters_[i].weight);
    return {all.view().data, all.view().data + all.view().elements()};
  }

 private:
  static void put(Buffer<float>& to, int step) {
    const RandomStream stream(3, "numbers", step);
    std::vector<float> numbers;
    for (Index i = 0; i < to.size(); ++i) numbers.push_back(static_cast<float>(stream.normal(i)));
    copy<float>({numbers.data(), 1, to.size()}, to.line());
  }

  Communicator& world_;
  std::unique_ptr<Device> device_;
  std::optional<ProcessMesh> mesh_;
  Buffer<float> weights_, gradients_;
  std::vector<Parameter<float>> parameters_;
  std::optional<ShardedOptimizer<float>> optimizer_;
};

}  // namespace lowband::test
