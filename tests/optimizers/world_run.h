#pragma once

#include "optimizers/sharded_optimizer.h"
#include "reference.h"

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace lowband::test {

struct TestParameter {
  ParameterInfo info;
  Index factor_rank = 0;  // 0: not a layer matrix; of its blocks, where it has some
};

/// Gradient of global element (row, col) of a parameter for one of the run's data shares at one step.
using GradientFunction =
    std::function<double(const ParameterInfo& info, Index step, int share, Index row, Index col)>;

struct RunPlan {
  MeshShape mesh;
  std::vector<TestParameter> parameters;
  OptimizerOptions options;
  GradientFunction gradient;
  /// Shares of the data; each process averages those of its data-parallel position. A multiple of replica x
  /// shard.
  int shares = 1;
  Index steps = 1;
  double learning_rate = 0.02;
  double scalar_learning_rate = 0.02;
  /// Announced in this order while gradients are filled in; those not among them are filled in before.
  std::vector<Index> announced = {};
  bool diagnose = false;   // every step
  bool on_device = false;  // parameters and states in the memory of CUDA device 0; groups go through the host
  /// Makes the world of the run from the process's own on threads; without it that is the world.
  std::function<std::unique_ptr<Communicator>(Communicator& host)> world = {};
};

/// The whole model after a step, put together from the pieces of all processes.
struct Snapshot {
  std::map<std::string, Dense> weights;
  std::vector<std::map<std::string, Dense>> states;  // of each replica, but for elements of moments
  StepReport report;
  Index factor_bytes = 0;  // counted on the replica axis, over the processes of one replica
  Index dense_bytes = 0;
  std::map<std::string, Index> factor_bytes_of;  // by parameter
  std::map<std::string, Index> dense_bytes_of;
  Index planned_factor_bytes = 0;
  Index planned_dense_bytes = 0;
  Index update_bytes = 0;  // on axis within_replica; equal on all processes
  Index planned_update_bytes = 0;
  std::map<std::string, Index> update_bytes_of;
  std::map<std::string, Index> factor_bytes_on;  // by axis, of process 0
  Index periodic_bytes = 0;
  Index planned_periodic_bytes = 0;
  std::map<int, Index> periodic_bytes_within;  // by process, on axis within_replica
  Index calls = 0;                             // collectives of process 0

  /// Mean over replicas of a state.
  Dense mean(const std::string& name) const;
};

/// Runs the optimizer on `mesh.processes()` threads. After every step it checks that all processes which hold
/// the same piece of a weight, or of Q, hold the same bits, and that all reports agree.
template <class Real>
std::vector<Snapshot> run(const RunPlan& plan);

/// Initial weight of a run.
Dense initial_weight(const ParameterInfo& info);
/// The gradient that a group of shares averages to, in double.
Dense gradient_of(const GradientFunction& gradient, const ParameterInfo& info, Index step, int first_share,
                  int shares);

/// Noise of mean 0 and variance 1: a sum of four uniform numbers, a function of its arguments alone.
double cheap_noise(const std::string& name, Index step, Index share, Index row, Index col);

/// Half common to all shares, and noise of each share.
double noisy_gradient(const ParameterInfo& info, Index step, int share, Index row, Index col);

/// The ranks of the matrices of a parameter: its own, or what their shapes allow of it.
void add_ranks(RankProfile& profile, const TestParameter& test);

/// Heads, a fused projection of two interleaved groups, halves, columns, and a block of one row.
std::vector<TestParameter> blocked_parameters();

/// Matrices of all shapes and cuts: tall, wide, square, odd, a single row or column, full and low ranks; then
/// an embedding and a norm gain.
std::vector<TestParameter> assorted_parameters();

}  // namespace lowband::test
