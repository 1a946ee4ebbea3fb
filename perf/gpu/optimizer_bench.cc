// lowband's side of run_all's optimizers: steps of one optimizer over the matrices of the model of 166
// million parameters, in the memory of one device.
//
//   optimizer_bench dion|muon FACTOR_RANK LAYERS STEPS
//
// Prints a JSON line: seconds of every step by the wall clock, the device waited for; and `check`, the sum of
// squares of all weights after the first two steps, from numbers that torch is given as well.
#include "collectives/local/local_world.h"
#include "optimizers/sharded_optimizer.h"
#include "runtime/copy.h"
#include "runtime/linalg.h"

#include <chrono>
#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

namespace lowband {
namespace {

constexpr int kWarmUp = 3;
constexpr Index kWidth = 768, kFfn = 2048;

// Element k of input `which`, as device_bench.
Buffer<float> input(Index elements, Index which) {
  constexpr Index kPrime = 2'147'483'647;
  Buffer<float> x(elements);
  for (Index k = 0; k < elements; ++k) {
    const Index shifted = (k + 1'000'003 * (which + 1)) % kPrime;
    const Index once = shifted * shifted % kPrime;
    const Index twice = once * once % kPrime;
    x[k] = static_cast<float>(static_cast<double>(twice) / static_cast<double>(kPrime) - 0.5);
  }
  return x;
}

std::vector<ParameterInfo> matrices(Index layers) {
  std::vector<ParameterInfo> infos;
  for (Index layer = 0; layer < layers; ++layer) {
    const auto add = [&](const char* name, Role role, Index rows, Index cols) {
      infos.push_back({.name = cat(layer, ".", name), .role = role, .rows = rows, .cols = cols});
    };
    add("q", Role::kQuery, kWidth, kWidth);
    add("k", Role::kKey, kWidth, kWidth);
    add("v", Role::kValue, kWidth, kWidth);
    add("o", Role::kOutput, kWidth, kWidth);
    add("gate", Role::kGate, kFfn, kWidth);
    add("up", Role::kUp, kFfn, kWidth);
    add("down", Role::kDown, kWidth, kFfn);
  }
  return infos;
}

// Weights are zeros at first, so that their squares are those of two updates. Input 2 i is the gradient of
// matrix i, 2 i + 1 its first right factor.
void bench(Communicator& alone, OptimizerKind kind, Index factor_rank, Index layers, int steps) {
  const std::unique_ptr<Device> device = open_device();
  alone.set_device(device.get());
  ProcessMesh mesh(alone, {});
  OptimizerOptions options;
  options.kind = kind;
  options.clip_norm = 0;
  options.mu = 0.95;
  options.weight_decay = 0.01;

  std::vector<Buffer<float>> storage;
  std::vector<Parameter<float>> parameters;
  RankProfile profile{.name = "uniform", .matrices = matrices(layers), .factor_ranks = {}};
  for (const ParameterInfo& info : profile.matrices) {
    profile.factor_ranks.push_back(factor_rank);
    storage.emplace_back(info.elements(), device.get());
    storage.emplace_back(info.elements(), device.get());
    copy<float>(input(info.elements(), 2 * std::ssize(parameters)).line(), storage.back().line());
    parameters.push_back({info, storage[storage.size() - 2].matrix(0, info.rows, info.cols),
                          storage.back().matrix(0, info.rows, info.cols)});
  }
  ShardedOptimizer<float> optimizer(mesh, parameters, profile, options);
  for (const StateTensor<float>& tensor : optimizer.state()) {
    if (!tensor.name.ends_with(".Q")) continue;
    const std::string name = tensor.name.substr(0, tensor.name.size() - 2);
    Index i = 0;
    while (profile.matrices[static_cast<std::size_t>(i)].name != name) ++i;
    copy<float>(input(tensor.value.elements(), 2 * i + 1).line(), tensor.value.line());
  }

  double check = 0;
  std::vector<double> seconds;
  for (int step = 0; step < kWarmUp + steps; ++step) {
    device->synchronize();
    const auto begin = std::chrono::steady_clock::now();
    optimizer.step({.step = step, .learning_rate = 0.01, .scalar_learning_rate = 0.01});
    device->synchronize();
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - begin;
    if (step >= kWarmUp) seconds.push_back(passed.count());
    if (step != 1) continue;
    for (const Parameter<float>& parameter : parameters) check += sum_of_squares<float>(parameter.weight);
  }
  std::printf("{\"name\": \"optimizer\", \"check\": %.9g, \"seconds\": [", check);
  for (std::size_t i = 0; i < seconds.size(); ++i) std::printf("%s%.9g", i == 0 ? "" : ", ", seconds[i]);
  std::printf("]}\n");
}

int run(const std::vector<std::string>& words) {
  LB_EXPECTS(words.size() == 4 && (words[0] == "dion" || words[0] == "muon"), "optimizer_bench: found ",
             words.size(), " words, expected dion|muon FACTOR_RANK LAYERS STEPS");
  const OptimizerKind kind = words[0] == "dion" ? OptimizerKind::kDion : OptimizerKind::kMuon;
  run_world(1, [&](Communicator& alone) {
    bench(alone, kind, std::stoll(words[1]), std::stoll(words[2]), std::stoi(words[3]));
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
