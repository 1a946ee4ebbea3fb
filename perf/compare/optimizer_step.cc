// lowband's side of optimizer_step_vs_torch.py: one process, one thread, float32.
//
//   optimizer_step FOLDER LAYERS
//
// Writes FOLDER/shapes (rows and columns of the matrices of the first LAYERS layers of preset rank166m),
// prints "ready" and takes commands, one a line, from standard input. Element k of all matrices, one after
// the other, is read off the numbers in FOLDER/tile: of the weights 0.02 x tile[k mod size], of the gradients
// of step s tile[(k + 104729 (s + 1)) mod size].
//
//   machine       what measure_machine() found, in the order of its members
//   start KIND R  a ShardedOptimizer (adamw, dion, muon; R: factor rank of dion) on a mesh of one process,
//   new
//                 weights; dion's Q of all matrices go to FOLDER/q
//   step          one step; seconds and processor seconds of Optimizer::step
//   weights       all weights go to FOLDER/weights
//   iteration R   a cached power iteration with R columns of all matrices as a step of Spectra runs it:
//                 M <- mu M + G and both products in one pass, orthonormalisation, M^T U; seconds
//   separate R    the same with M <- mu M + G in a pass of its own; seconds
//   products R    both products of a further iteration, M V and M^T U, of all matrices: in one pass, followed
//                 by a triangular solution; seconds

#include "collectives/factors/factor_exchange.h"
#include "collectives/local/local_world.h"
#include "model/transformer.h"
#include "optimizers/sharded_optimizer.h"
#include "perf/compare/machine.h"
#include "runtime/cpu.h"
#include "runtime/linalg.h"
#include "runtime/low_rank.h"
#include "trainer/config/presets.h"
#include "trainer/config/run_config.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <memory>
#include <sstream>

namespace lowband {
namespace {

constexpr double kLearningRate = 0.01;
constexpr float kWeightScale = 0.02F;
constexpr float kMu = 0.95F;

std::vector<ParameterInfo> layer_matrices(Index layers) {
  constexpr Index kMatricesOfLayer = 7;
  const RunConfig config = parse_run_config(preset_text("rank166m"), "rank166m");
  std::vector<ParameterInfo> matrices;
  for (const ParameterInfo& info : parameter_table(model_config(config))) {
    if (is_layer_matrix(info.role)) matrices.push_back(info);
  }
  const Index all = std::ssize(matrices) / kMatricesOfLayer;
  LB_EXPECTS(layers >= 1 && layers <= all, "LAYERS: found ", layers, ", expected 1 .. ", all);
  matrices.resize(static_cast<std::size_t>(layers * kMatricesOfLayer));
  return matrices;
}

Buffer<float> read_tile(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  Buffer<float> values(static_cast<Index>(std::filesystem::file_size(path) / sizeof(float)));
  file.read(reinterpret_cast<char*>(values.data()), values.size() * 4);
  if (!file) throw IoError(cat("cannot read ", path.string()));
  return values;
}

OptimizerOptions options_for(const std::string& kind) {
  OptimizerOptions options;
  options.clip_norm = 0;
  options.clip_estimator = NormEstimator::kTrueNorm;
  if (kind == "adamw" || kind == "adamw_clipped") {
    options.kind = OptimizerKind::kAdamW;
    options.clip_norm = kind == "adamw" ? 0 : 1;
  } else if (kind == "dion") {
    options.kind = OptimizerKind::kDion;
  } else if (kind == "muon") {
    options.kind = OptimizerKind::kMuon;
    options.sign = SignPolynomial::kNewtonSchulz5;
  } else {
    throw InvalidArgument(
        cat("start: found optimizer \"", kind, "\", expected adamw, adamw_clipped, dion or muon"));
  }
  return options;
}

template <class Body>
std::string timed(Body body) {
  const auto begin = std::chrono::steady_clock::now();
  const std::clock_t cpu_begin = std::clock();
  body();
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
  return cat(elapsed.count(), " ", static_cast<double>(std::clock() - cpu_begin) / CLOCKS_PER_SEC);
}

class Side {
 public:
  Side(std::filesystem::path folder, Index layers, Communicator& world)
      : folder_(std::move(folder)),
        mesh_(world, {}),
        world_(&world),
        matrices_(layer_matrices(layers)),
        tile_(read_tile(folder_ / "tile")) {
    std::ofstream shapes(folder_ / "shapes");
    Index elements = 0;
    for (const ParameterInfo& info : matrices_) {
      shapes << info.rows << " " << info.cols << "\n";
      elements += info.elements();
    }
    weights_ = Buffer<float>(elements);
    gradients_ = Buffer<float>(elements);
    Index offset = 0;
    for (const ParameterInfo& info : matrices_) {
      parameters_.push_back({info, weights_.matrix(offset, info.rows, info.cols),
                             gradients_.matrix(offset, info.rows, info.cols)});
      offset += info.elements();
    }
  }

  std::string answer(const std::string& line) {
    std::istringstream words(line);
    std::string command, kind;
    Index factor_rank = 0;
    words >> command;
    if (command == "machine") {
      const Machine m = measure_machine();
      return cat(m.read, " ", m.update, " ", m.accumulate, " ", m.write, " ", m.float_flops, " ",
                 m.double_flops);
    }
    if (command == "start") {
      words >> kind >> factor_rank;
      start(kind, factor_rank);
      return "0";
    }
    if (command == "step") {
      fill(gradients_, step_ + 1);
      const StepInfo info{.step = step_++, .learning_rate = kLearningRate, .scalar_learning_rate = 0};
      return timed([&] { optimizer_->step(info); });
    }
    if (command == "weights") {
      std::ofstream file(folder_ / "weights", std::ios::binary);
      write(file, weights_.span());
      return "0";
    }
    if (command == "iteration" || command == "separate") {
      words >> factor_rank;
      return iteration(factor_rank, command == "iteration");
    }
    if (command == "products") {
      words >> factor_rank;
      return products(factor_rank);
    }
    throw InvalidArgument(cat("optimizer_step: found command \"", line, "\""));
  }

 private:
  void start(const std::string& kind, Index factor_rank) {
    fill(weights_, 0);
    for (float& w : weights_.span()) w *= kWeightScale;
    RankProfile profile;
    if (kind == "dion") {
      std::vector<Index> ranks(matrices_.size(), factor_rank);
      profile = {.name = "uniform", .matrices = matrices_, .factor_ranks = std::move(ranks)};
    }
    optimizer_.reset();
    optimizer_ = std::make_unique<ShardedOptimizer<float>>(mesh_, parameters_, profile, options_for(kind));
    step_ = 0;
    std::ofstream file(folder_ / "q", std::ios::binary);
    for (const StateTensor<float>& tensor : optimizer_->state()) {
      if (tensor.name.ends_with(".Q")) write(file, tensor.value.flat());
    }
  }

  std::string iteration(Index factor_rank, bool fused) {
    std::vector<FactorShape> shapes;
    Index largest = 0;
    for (const ParameterInfo& info : matrices_) {
      largest = std::max(largest, info.cols);
      shapes.push_back({.name = info.name,
                        .factor_rank = factor_rank,
                        .left_rows = info.rows,
                        .right_rows = info.cols,
                        .across_b = world_,
                        .across_a = world_,
                        .right_follows = true});
    }
    FactorExchange<float> exchange({.replica = world_, .within_replica = world_}, shapes, {}, {});
    Buffer<float> v(largest * factor_rank);
    std::copy_n(tile_.data(), v.size(), v.data());
    fill(weights_, 0);  // M
    fill(gradients_, 1);
    const auto iterate = [&] {
      for (std::size_t i = 0; i < parameters_.size(); ++i) {
        const auto at = static_cast<Index>(i);
        const Parameter<float>& p = parameters_[i];
        const MatrixView<const float> cached = v.matrix(0, p.info.cols, factor_rank);
        if (fused) {
          accumulate_and_multiply_there_and_back<float>(1, p.gradient, kMu, p.weight, cached,
                                                        exchange.left(at), exchange.right(at));
        } else {
          accumulate<float>(1, p.gradient, kMu, p.weight);
          multiply_there_and_back<float>(p.weight, cached, exchange.left(at), exchange.right(at));
        }
      }
      exchange.exchange_left();
      for (Index i = 0; i < std::ssize(parameters_); ++i) {
        if (!exchange.right_followed(i))
          multiply<float>(Op::kTranspose, parameters_[static_cast<std::size_t>(i)].weight, exchange.left(i),
                          exchange.right(i));
      }
      exchange.exchange_right();
    };
    iterate();  // touches the memory of the exchange, which an optimizer keeps
    return timed(iterate);
  }

  std::string products(Index factor_rank) {
    fill(gradients_, 1);
    Index largest = 0;
    for (const ParameterInfo& info : matrices_) largest = std::max({largest, info.rows, info.cols});
    Buffer<float> v(largest * factor_rank), u(largest * factor_rank);
    std::copy_n(tile_.data(), v.size(), v.data());
    Buffer<float> z(largest * factor_rank);
    Buffer<double> triangle(factor_rank * factor_rank);
    for (Index j = 0; j < factor_rank; ++j) triangle[j * factor_rank + j] = 1;
    const auto multiply_all = [&] {
      for (const Parameter<float>& p : parameters_) {
        const MatrixView<float> back = z.matrix(0, p.info.cols, factor_rank);
        multiply_there_and_back<float>(p.gradient, v.matrix(0, p.info.cols, factor_rank),
                                       u.matrix(0, p.info.rows, factor_rank), back);
        solve_upper_right<float>(back, triangle.matrix(0, factor_rank, factor_rank));
      }
    };
    multiply_all();  // a further iteration of a step finds nothing that still has to be written back
    return timed(multiply_all);
  }

  void fill(Buffer<float>& to, Index turn) const {
    Index from = 104729 * turn % tile_.size();
    for (Index k = 0; k < to.size();) {
      const Index count = std::min(tile_.size() - from, to.size() - k);
      std::copy_n(tile_.data() + from, count, to.data() + k);
      k += count;
      from = 0;
    }
  }

  static void write(std::ofstream& file, std::span<const float> values) {
    file.write(reinterpret_cast<const char*>(values.data()),
               static_cast<std::streamsize>(values.size_bytes()));
    if (!file) throw IoError("optimizer_step: cannot write into FOLDER");
  }

  std::filesystem::path folder_;
  ProcessMesh mesh_;
  Communicator* world_;
  std::vector<ParameterInfo> matrices_;
  Buffer<float> tile_, weights_, gradients_;
  std::vector<Parameter<float>> parameters_;
  std::unique_ptr<ShardedOptimizer<float>> optimizer_;
  Index step_ = 0;
};

}  // namespace
}  // namespace lowband

int main(int argc, char** argv) {
  lowband::ensure_fast_blas_kernels(argv);
  if (argc != 3) {
    std::cerr << "usage: optimizer_step FOLDER LAYERS\n";
    return 64;
  }
  try {
    lowband::set_compute_threads(1);
    lowband::run_world(1,
                       [&](lowband::Communicator& world) {
                         lowband::Side side(argv[1], std::atoll(argv[2]), world);
                         std::cout << "ready" << std::endl;
                         for (std::string line; std::getline(std::cin, line);)
                           std::cout << side.answer(line) << std::endl;
                       },
                       {.total_deadline = std::chrono::hours(24)});
  } catch (const lowband::Error& error) {
    std::cerr << "optimizer_step: " << error.what() << "\n";
    return 1;
  }
}
