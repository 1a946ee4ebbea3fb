// Steps of training on a device, model and optimizer in the order of one stream, against the host's.
#include "collectives/local/local_world.h"
#include "collectives/process_device.h"
#include "model/cuda/device_transformer.h"
#include "model/transformer.h"
#include "optimizers/sharded_optimizer.h"
#include "runtime/copy.h"
#include "runtime/cuda/stream_device.h"
#include "runtime/random.h"

#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace lowband {
namespace {

constexpr ModelConfig kConfig{.vocabulary = 61,
                              .width = 32,
                              .layers = 2,
                              .heads = 2,
                              .kv_heads = 2,
                              .head_dim = 16,
                              .ffn_width = 48,
                              .sequence = 16};
constexpr Index kSequences = 2;
constexpr int kSteps = 4;

std::vector<std::int32_t> draw_tokens(const char* what, int step) {
  const RandomStream stream(3, what, step);
  std::vector<std::int32_t> tokens;
  for (Index i = 0; i < kSequences * kConfig.sequence; ++i)
    tokens.push_back(
        static_cast<std::int32_t>(stream.bits(i) % static_cast<std::uint64_t>(kConfig.vocabulary)));
  return tokens;
}

struct Trained {
  std::vector<double> losses;
  std::vector<std::vector<float>> weights;
};

Trained train(Model<float>& model, Communicator& world, OptimizerKind kind) {
  ProcessMesh mesh(world, {});
  const std::span<Parameter<float>> parameters = model.parameters();
  RankProfile profile{.name = "uniform", .matrices = {}, .factor_ranks = {}};
  for (const Parameter<float>& parameter : parameters) {
    if (!is_layer_matrix(parameter.info.role)) continue;
    profile.matrices.push_back(parameter.info);
    profile.factor_ranks.push_back(8);
  }
  OptimizerOptions options;
  options.kind = kind;
  ShardedOptimizer<float> optimizer(mesh, parameters, profile, options);
  Trained trained;
  for (int step = 0; step < kSteps; ++step) {
    model.zero_gradients();
    trained.losses.push_back(model.forward_backward(draw_tokens("tokens", step), draw_tokens("targets", step),
                                                    kSequences, 1.0 / (kSequences * kConfig.sequence), {}));
    optimizer.step({.step = step, .learning_rate = 0.01, .scalar_learning_rate = 0.01});
  }
  for (const Parameter<float>& parameter : parameters) {
    const OnHost<float> weight(parameter.weight);
    const auto all = weight.view().flat();
    trained.weights.emplace_back(all.begin(), all.end());
  }
  return trained;
}

class TrainingOnDevice : public testing::TestWithParam<OptimizerKind> {};

TEST_P(TrainingOnDevice, FollowsTheHost) {
  run_world(1, [](Communicator& world) {
    Transformer<float> host_model(kConfig, world, 1, kSequences);
    const Trained host = train(host_model, world, GetParam());

    const CudaStream stream;
    CudaBlas blas(stream);
    const std::unique_ptr<Device> device = device_on(blas);
    const DeviceScope scope(world, *device);
    DeviceTransformer<float> model(kConfig, world, 1, kSequences, KeptActivations::kAll);
    const Trained found = train(model, world, GetParam());
    EXPECT_EQ(model.graphs(), 1);

    for (std::size_t step = 0; step < host.losses.size(); ++step)
      EXPECT_NEAR(found.losses[step] / host.losses[step], 1, 1e-4) << "step " << step;
    // A step moves a weight by 0.01 or so; of that, rounding of float sums amplified by an
    // orthonormalisation.
    for (std::size_t i = 0; i < host.weights.size(); ++i) {
      for (std::size_t k = 0; k < host.weights[i].size(); ++k)
        ASSERT_NEAR(found.weights[i][k], host.weights[i][k], kSteps * 0.01 * 0.01)
            << model.parameters()[i].info.name;
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Kinds, TrainingOnDevice,
                         testing::Values(OptimizerKind::kDion, OptimizerKind::kMuon, OptimizerKind::kSgd),
                         [](const auto& kind) {
                           return std::string(kind.param == OptimizerKind::kDion   ? "dion"
                                              : kind.param == OptimizerKind::kMuon ? "muon"
                                                                                   : "sgd");
                         });

}  // namespace
}  // namespace lowband
