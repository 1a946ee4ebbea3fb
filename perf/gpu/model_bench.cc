// lowband's side of the second part of run_all: training steps of the model of 166 million parameters on one
// device.
//
//   model_bench SEQUENCES STEPS FACTOR_RANK [WEIGHTS]
//
// A step is everything between a batch on the host and new weights: forward, backward, and Dion at one rank,
// or with rank 0 AdamW; the loss is waited for. Prints a JSON line: seconds of every step, by the wall clock;
// loss for a token and the sum of squares of its gradient before the first of them; bytes of device memory.
// WEIGHTS: a file for the initial weights, float, one parameter behind the other, with which torch is held to
// the same loss and gradient.
#include "collectives/local/local_world.h"
#include "collectives/process_device.h"
#include "model/cuda/device_transformer.h"
#include "optimizers/sharded_optimizer.h"
#include "runtime/bfloat16.h"
#include "runtime/copy.h"
#include "runtime/cuda/stream_device.h"
#include "runtime/error.h"
#include "runtime/linalg.h"

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

namespace lowband {
namespace {

constexpr ModelConfig kConfig{.vocabulary = 50257,
                              .width = 768,
                              .layers = 18,
                              .heads = 6,
                              .kv_heads = 6,
                              .head_dim = 128,
                              .ffn_width = 2048,
                              .sequence = 1024};
constexpr int kWarmUp = 3;  // called, recorded, replayed
constexpr double kEta = 3e-4;

// Token i of batch `which`: squares modulo the prime 2^31 - 1, twice over, modulo the vocabulary.
std::int32_t token(Index i, Index which) {
  constexpr Index kPrime = 2'147'483'647;
  const Index shifted = (i + 1'000'003 * (which + 1)) % kPrime;
  const Index once = shifted * shifted % kPrime;
  return static_cast<std::int32_t>(once * once % kPrime % kConfig.vocabulary);
}

double sum_of_squares_of_gradients(Model<float>& model) {
  double all = 0;
  for (const Parameter<float>& p : model.parameters()) all += sum_of_squares<float>(p.gradient);
  return all;
}

void write_weights(Model<float>& model, const std::string& path) {
  std::ofstream file(path, std::ios::binary);
  for (const Parameter<float>& p : model.parameters()) {
    const OnHost<float> weight(p.weight);
    file.write(reinterpret_cast<const char*>(weight.view().data),
               static_cast<std::streamsize>(p.weight.elements() * Index{sizeof(float)}));
  }
  file.close();
  if (!file) throw IoError(cat(path, ": cannot be written"));
}

void bench(Communicator& alone, Index sequences, int steps, Index factor_rank, const std::string& weights) {
  const CudaStream stream;
  CudaBlas blas(stream);
  const std::unique_ptr<Device> device = device_on(blas);
  const DeviceScope scope(alone, *device);
  DeviceTransformer<BFloat16> model(kConfig, alone, 1, sequences, KeptActivations::kAll,
                                    PlanChoice::kMeasured);
  ProcessMesh mesh(alone, {});
  const std::span<Parameter<float>> parameters = model.parameters();
  OptimizerOptions options;
  options.kind = factor_rank > 0 ? OptimizerKind::kDion : OptimizerKind::kAdamW;
  options.clip_norm = 0;
  options.adamw_beta1 = 0.9;
  options.adamw_beta2 = 0.95;
  options.adamw_epsilon = 1e-8;
  options.weight_decay = 0.1;
  RankProfile profile{.name = "uniform", .matrices = {}, .factor_ranks = {}};
  for (const Parameter<float>& parameter : parameters) {
    if (factor_rank == 0 || !is_layer_matrix(parameter.info.role)) continue;
    profile.matrices.push_back(parameter.info);
    profile.factor_ranks.push_back(factor_rank);
  }
  ShardedOptimizer<float> optimizer(mesh, parameters, profile, options);
  Index state_bytes = 0;
  for (const StateTensor<float>& tensor : optimizer.state())
    state_bytes += tensor.value.elements() * Index{sizeof(float)};
  if (!weights.empty()) write_weights(model, weights);
  const Index tokens = sequences * kConfig.sequence;
  std::vector<std::int32_t> inputs, targets;
  const auto forward_backward = [&](Index batch) {
    inputs.clear(), targets.clear();
    for (Index i = 0; i < tokens; ++i) {
      inputs.push_back(token(i, batch));
      targets.push_back(token(i + 1, batch));
    }
    model.zero_gradients();
    const double scale = 1 / static_cast<double>(tokens);
    return model.forward_backward(inputs, targets, sequences, scale, {}) * scale;
  };
  const double loss = forward_backward(0);
  const double squares = sum_of_squares_of_gradients(model);
  std::vector<double> seconds;
  double last = 0;
  for (int i = 0; i < kWarmUp + steps; ++i) {
    stream.synchronize();
    const auto begin = std::chrono::steady_clock::now();
    last = forward_backward(i % 4);
    optimizer.step({.step = i, .learning_rate = kEta, .scalar_learning_rate = kEta});
    stream.synchronize();
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - begin;
    if (i >= kWarmUp) seconds.push_back(passed.count());
  }
  const DeviceMemory& memory = model.memory();
  std::printf(
      "{\"name\": \"model\", \"sequences\": %lld, \"tokens\": %lld, \"loss\": %.9g, \"gradient_squares\": "
      "%.9g, "
      "\"last_loss\": %.9g, \"graphs\": %lld, \"bytes\": {\"weights\": %lld, \"gradients\": %lld, "
      "\"activations\": "
      "%lld, \"workspace\": %lld, \"optimizer\": %lld}, \"seconds\": [",
      static_cast<long long>(sequences), static_cast<long long>(tokens), loss, squares, last,
      static_cast<long long>(model.graphs()), static_cast<long long>(memory.weights),
      static_cast<long long>(memory.gradients), static_cast<long long>(memory.activations),
      static_cast<long long>(memory.workspace), static_cast<long long>(state_bytes));
  for (std::size_t i = 0; i < seconds.size(); ++i) std::printf("%s%.9g", i == 0 ? "" : ", ", seconds[i]);
  std::printf("]}\n");
}

int run(const std::vector<std::string>& words) {
  LB_EXPECTS(words.size() == 3 || words.size() == 4, "model_bench: found ", words.size(),
             " words, expected SEQUENCES STEPS FACTOR_RANK [WEIGHTS]");
  run_world(1, [&](Communicator& alone) {
    bench(alone, std::stoll(words[0]), std::stoi(words[1]), std::stoll(words[2]),
          words.size() == 4 ? words[3] : "");
  });
  return 0;
}

}  // namespace
}  // namespace lowband

int main(int argc, char** argv) {
  try {
    return lowband::run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
