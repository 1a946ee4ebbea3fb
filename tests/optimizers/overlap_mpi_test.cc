// Started by mpirun: the communication thread exchanges gradients while the calling thread is in collectives
// of its own, as a tensor-parallel backward pass is. Weights must have the bits of the run without a thread.
#include "collectives/mpi/mpi_world.h"
#include "optimizers/sharded_optimizer.h"
#include "runtime/cpu.h"

#include <cstdio>
#include <cstring>

namespace lowband {
namespace {

constexpr Index kRows = 60;
constexpr Index kCols = 40;
constexpr Index kMatrices = 8;
constexpr Index kSteps = 20;

std::vector<float> train(ProcessMesh& mesh, const OptimizerOptions& options) {
  const Index rows = kRows / mesh.shape().tensor;
  const Index elements = rows * kCols;
  Buffer<float> weights(kMatrices * elements);
  Buffer<float> gradients(kMatrices * elements);
  std::vector<Parameter<float>> parameters;
  RankProfile profile{.name = "test", .matrices = {}, .factor_ranks = {}};
  for (Index i = 0; i < kMatrices; ++i) {
    const ParameterInfo info{
        .name = cat("w", i), .role = Role::kQuery, .rows = kRows, .cols = kCols, .cut = TensorCut::kRows};
    parameters.push_back(
        {info, weights.matrix(i * elements, rows, kCols), gradients.matrix(i * elements, rows, kCols)});
    profile.matrices.push_back(info);
    profile.factor_ranks.push_back(3);
  }
  ShardedOptimizer<float> optimizer(mesh, parameters, profile, options);
  Buffer<double> activations(1000);
  for (Index step = 0; step < kSteps; ++step) {
    for (Index i = kMatrices - 1; i >= 0; --i) {
      mesh.tensor().all_reduce(activations.span(), Reduction::kSum, {Purpose::kActivation});
      const RandomStream stream(7, cat("g", i, ".", mesh.world().process()), step);
      for (Index k = 0; k < elements; ++k) gradients[i * elements + k] = static_cast<float>(stream.normal(k));
      optimizer.gradient_ready(i);
    }
    optimizer.step({.step = step, .learning_rate = 0.01});
  }
  return {weights.data(), weights.data() + weights.size()};
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
  return 0;
}
