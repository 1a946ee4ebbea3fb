// Started by mpirun: the communication thread exchanges gradients while the calling thread is in collectives
// of its own, as a tensor-parallel backward pass is. Weights must have the bits of the run without a thread.
// At the end one caller gives up while its thread is in a collective.
#include "collectives/mpi/mpi_world.h"
#include "optimizers/sharded_optimizer.h"
#include "runtime/cpu.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string_view>
#include <thread>

namespace lowband {
namespace {

constexpr Index kRows = 60;
constexpr Index kCols = 40;
constexpr Index kMatrices = 8;
constexpr Index kSteps = 20;

struct Model {
  explicit Model(const ProcessMesh& mesh)
      : rows(kRows / mesh.shape().tensor),
        elements(rows * kCols),
        weights(kMatrices * elements),
        gradients(kMatrices * elements) {
    for (Index i = 0; i < kMatrices; ++i) {
      const ParameterInfo info{
          .name = cat("w", i), .role = Role::kQuery, .rows = kRows, .cols = kCols, .cut = TensorCut::kRows};
      parameters.push_back(
          {info, weights.matrix(i * elements, rows, kCols), gradients.matrix(i * elements, rows, kCols)});
      profile.matrices.push_back(info);
      profile.factor_ranks.push_back(3);
    }
  }
  Index rows, elements;
  Buffer<float> weights, gradients;
  std::vector<Parameter<float>> parameters;
  RankProfile profile{.name = "test", .matrices = {}, .factor_ranks = {}};
};

std::vector<float> train(ProcessMesh& mesh, const OptimizerOptions& options) {
  Model model(mesh);
  ShardedOptimizer<float> optimizer(mesh, model.parameters, model.profile, options);
  Buffer<double> activations(1000);
  for (Index step = 0; step < kSteps; ++step) {
    for (Index i = kMatrices - 1; i >= 0; --i) {
      mesh.tensor().all_reduce(activations.span(), Reduction::kSum, {Purpose::kActivation});
      const RandomStream stream(7, cat("g", i, ".", mesh.world().process()), step);
      for (Index k = 0; k < model.elements; ++k)
        model.gradients[i * model.elements + k] = static_cast<float>(stream.normal(k));
      optimizer.gradient_ready(i);
    }
    optimizer.step({.step = step, .learning_rate = 0.01});
  }
  return {model.weights.data(), model.weights.data() + model.weights.size()};
}

// The last process gives up while its thread waits for the others. Returns the seconds until this process is
// through, or a negative number where it did not learn of it.
double seconds_to_give_up(ProcessMesh& mesh) {
  Model model(mesh);
  auto optimizer = std::make_unique<ShardedOptimizer<float>>(
      mesh, model.parameters, model.profile,
      OptimizerOptions{.clip_norm = 0, .overlap = true, .bucket_elements = kRows * kCols});
  const bool gives_up = mesh.world().process() == mesh.world().size() - 1;
  if (gives_up) optimizer->gradient_ready(kMatrices - 1);
  std::this_thread::sleep_for(std::chrono::milliseconds(gives_up ? 100 : 300));
  const auto begin = std::chrono::steady_clock::now();
  bool failed = false;
  try {
    if (!gives_up) optimizer->step({.learning_rate = 0.01});
  } catch (const PeerFailed& failure) {
    failed =
        std::string_view(failure.what()).find("gave up in the middle of a step") != std::string_view::npos;
  }
  optimizer.reset();
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
  mesh.world().barrier();
  return failed == gives_up ? -1 : taken.count();
}

}  // namespace
}  // namespace lowband

int main() {
  using namespace lowband;
  set_compute_threads(1);
  const MpiWorld mpi;
  const std::unique_ptr<Communicator> world = mpi.world();
  const int tensor = world->size() % 2 == 0 ? 2 : 1;
  for (const OptimizerKind kind : {OptimizerKind::kPowerSgd, OptimizerKind::kDion}) {
    for (const double clip_norm : {0.0, 1.0}) {
      ProcessMesh mesh(*world, {.replica = world->size() / tensor, .tensor = tensor});
      OptimizerOptions options{.kind = kind, .clip_norm = clip_norm, .bucket_elements = kRows * kCols};
      const std::vector<float> expected = train(mesh, options);
      options.overlap = true;
      const std::vector<float> found = train(mesh, options);
      if (std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)) == 0) continue;
      std::printf("[process %d of %d] kind %d, clip_norm %g: the communication thread changed weights\n",
                  world->process(), world->size(), static_cast<int>(kind), clip_norm);
      mpi.abort(1);
    }
  }
  ProcessMesh mesh(*world, {.replica = world->size()});
  double fastest = 1;  // of some, since a busy machine may keep any one waiting
  for (int k = 0; k < 3; ++k) {
    const double seconds = seconds_to_give_up(mesh);
    if (seconds < 0) {
      std::printf("[process %d of %d] did not learn that a caller gave up\n", world->process(),
                  world->size());
      mpi.abort(1);
    }
    fastest = std::min(fastest, seconds);
  }
  if (fastest < 1) return 0;
  std::printf("[process %d of %d] a caller that gave up was waited for\n", world->process(), world->size());
  mpi.abort(1);
}
