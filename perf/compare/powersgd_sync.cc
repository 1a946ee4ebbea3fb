// lowband's side of powersgd_sync_vs_torch.py: one thread, float32, under mpirun.
//
//   mpirun -n 2 powersgd_sync FOLDER
//
// Writes FOLDER/shapes (rows and columns of the layer matrices of preset rank166m) and takes commands, one a
// line, from the pipe FOLDER/command.<process>; answers go to FOLDER/answer.<process>. All processes get the
// same commands. The gradient of process p in step s is read off the numbers in FOLDER/tile:
// element k of all matrices, one after the other, is tile[(k + 7919 p + 104729 s) mod size].
//
//   bandwidth     bytes per second of y <- y + a x from memory, all processes at once
//   start R       PowerSGD state for factor rank R: residual zero, Q drawn
//   write I NAME  gradient, Q and residual of matrix I into FOLDER/NAME.{d,q,e}.<process>
//   dense         one all-reduce of the gradient, in buckets of FOLDER/buckets (elements, one a line)
//   factors       one synchronisation; the gradient becomes D
// The last two answer with the seconds and the processor seconds they took.

#include "collectives/factors/factor_exchange.h"
#include "collectives/mpi/mpi_world.h"
#include "model/transformer.h"
#include "runtime/cpu.h"
#include "runtime/low_rank.h"
#include "runtime/random.h"
#include "runtime/vector_kernels.h"
#include "trainer/config/presets.h"
#include "trainer/config/run_config.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <memory>
#include <optional>
#include <sstream>

namespace lowband {
namespace {

using Clock = std::chrono::steady_clock;

std::vector<ParameterInfo> layer_matrices() {
  const RunConfig config = parse_run_config(preset_text("rank166m"), "rank166m");
  std::vector<ParameterInfo> matrices;
  for (const ParameterInfo& info : parameter_table(model_config(config))) {
    if (is_layer_matrix(info.role)) matrices.push_back(info);
  }
  return matrices;
}

template <class T>
std::vector<T> read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<T> values(std::filesystem::file_size(path) / sizeof(T));
  file.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(T)));
  if (!file) throw IoError(cat("cannot read ", path.string()));
  return values;
}

void write_matrix(const std::filesystem::path& path, MatrixView<const float> m) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(m.data), m.elements() * 4);
  if (!file) throw IoError(cat("cannot write ", path.string()));
}

/// PowerSGD's synchronisation (algorithms.md 2.9, local residual) of all matrices, each B (a x b, a >= b) is
/// the matrix or its transpose:
///   S_i = G_i + e_i ;  P = orth(mean S_i Q) ;  R_i = S_i^T P ;  R = mean R_i ;
///   G_i <- P R^T ;  e_i <- S_i - P R_i^T ;  Q <- R.
class PowerSgd {
 public:
  PowerSgd(const std::vector<ParameterInfo>& matrices, Index factor_rank, Communicator& world,
           Communicator& self, Index elements)
      : matrices_(matrices),
        residual_(elements),
        exchange_({.replica = &world, .within_replica = &self}, shapes(matrices, factor_rank, self), {},
                  {.keep_own_right = true}) {
    for (const ParameterInfo& info : matrices) {
      const Index b = std::min(info.rows, info.cols);
      const RandomStream stream(1, info.name + ".Q");
      Buffer<float>& q = q_.emplace_back(b * factor_rank);
      for (Index k = 0; k < q.size(); ++k) q[k] = static_cast<float>(stream.normal(k));
    }
  }

  void synchronise(Buffer<float>& gradient) {
    for_matrices([&](Index i, Index offset, const ParameterInfo& info) {
      accumulate_and_multiply<float>(1, gradient.matrix(offset, info.rows, info.cols), residual(offset, info),
                                     left_op(info), q(i), exchange_.left(i));
    });
    exchange_.exchange_left();
    for_matrices([&](Index i, Index offset, const ParameterInfo& info) {
      multiply<float>(right_op(info), residual(offset, info), exchange_.left(i), exchange_.right(i));
    });
    exchange_.exchange_right();
    for_matrices([&](Index i, Index offset, const ParameterInfo& info) {
      decompress<float>(pair(info, exchange_.left(i), exchange_.right(i)),
                        pair(info, exchange_.left(i), exchange_.own_right(i)),
                        gradient.matrix(offset, info.rows, info.cols), residual(offset, info));
      const MatrixView<const float> r = exchange_.right(i);
      std::memcpy(q(i).data, r.data, static_cast<std::size_t>(r.elements()) * 4);
    });
  }

  MatrixView<float> q(Index i) {
    Buffer<float>& buffer = q_[static_cast<std::size_t>(i)];
    const Index b = std::min(at(i).rows, at(i).cols);
    return buffer.matrix(0, b, buffer.size() / b);
  }
  MatrixView<float> residual(Index offset, const ParameterInfo& info) {
    return residual_.matrix(offset, info.rows, info.cols);
  }
  const ExchangeTimes& times() const { return exchange_.times(); }
  void reset_times() { exchange_.reset_times(); }

 private:
  static bool tall(const ParameterInfo& info) { return info.rows >= info.cols; }
  static Op left_op(const ParameterInfo& info) { return tall(info) ? Op::kNone : Op::kTranspose; }
  static Op right_op(const ParameterInfo& info) { return tall(info) ? Op::kTranspose : Op::kNone; }
  static FactorPair<float> pair(const ParameterInfo& info, MatrixView<const float> p,
                                MatrixView<const float> r) {
    return tall(info) ? FactorPair<float>{p, r} : FactorPair<float>{r, p};
  }
  static std::vector<FactorShape> shapes(const std::vector<ParameterInfo>& matrices, Index factor_rank,
                                         Communicator& self) {
    std::vector<FactorShape> shapes;
    for (const ParameterInfo& info : matrices) {
      shapes.push_back({.name = info.name,
                        .factor_rank = factor_rank,
                        .left_rows = std::max(info.rows, info.cols),
                        .right_rows = std::min(info.rows, info.cols),
                        .across_b = &self,
                        .across_a = &self});
    }
    return shapes;
  }
  const ParameterInfo& at(Index i) const { return matrices_[static_cast<std::size_t>(i)]; }
  template <class Body>
  void for_matrices(Body body) {
    Index offset = 0;
    for (std::size_t i = 0; i < matrices_.size(); ++i) {
      body(static_cast<Index>(i), offset, matrices_[i]);
      offset += matrices_[i].elements();
    }
  }

  const std::vector<ParameterInfo>& matrices_;
  Buffer<float> residual_;
  std::vector<Buffer<float>> q_;
  FactorExchange<float> exchange_;
};

class Side {
 public:
  Side(const std::filesystem::path& folder, Communicator& world)
      : folder_(folder), world_(world), self_(world.split(world.process(), 0, "self")) {
    for (const ParameterInfo& info : matrices_) elements_ += info.elements();
    gradient_ = Buffer<float>(elements_);
    if (world.process() == 0) {
      std::ofstream shapes(folder / "shapes.part");
      for (const ParameterInfo& info : matrices_) shapes << info.rows << " " << info.cols << "\n";
      shapes.close();
      std::filesystem::rename(folder / "shapes.part", folder / "shapes");
    }
  }

  void serve() {
    std::ifstream commands(folder_ / cat("command.", world_.process()));
    std::ofstream answers(folder_ / cat("answer.", world_.process()));
    answers << std::setprecision(9);
    for (std::string line; std::getline(commands, line);) {
      std::istringstream words(line);
      std::string command;
      words >> command;
      if (command == "bandwidth") {
        answers << bandwidth();
      } else if (command == "dense") {
        answers << timed([&] { dense(); });
      } else if (command == "start") {
        Index factor_rank = 0;
        words >> factor_rank;
        state_.reset();
        state_.emplace(matrices_, factor_rank, world_, *self_, elements_);
        step_ = 0;
        answers << factor_rank;
      } else if (command == "factors") {
        state_->reset_times();
        answers << timed([&] { state_->synchronise(gradient_); });
        const ExchangeTimes& t = state_->times();
        answers << " " << t.reduce_scatter + t.all_gather << " " << t.orthonormalise << " "
                << t.pack + t.unpack;
      } else if (command == "write") {
        Index matrix = 0;
        std::string name;
        words >> matrix >> name;
        write(matrix, name);
        answers << matrix;
      } else {
        throw InvalidArgument(cat("powersgd_sync: found command \"", line, "\""));
      }
      answers << std::endl;
    }
  }

 private:
  // Fresh gradient, then everybody together.
  template <class Body>
  std::string timed(Body body) {
    if (tile_.empty()) tile_ = read_file<float>(folder_ / "tile");
    const auto size = static_cast<Index>(tile_.size());
    Index from = (7919 * world_.process() + 104729 * step_++) % size;
    for (Index k = 0; k < elements_;) {
      const Index count = std::min(size - from, elements_ - k);
      std::copy_n(tile_.begin() + from, count, gradient_.data() + k);
      k += count;
      from = 0;
    }
    world_.barrier();
    const auto begin = Clock::now();
    const std::clock_t cpu_begin = std::clock();
    body();
    const std::chrono::duration<double> elapsed = Clock::now() - begin;
    return cat(elapsed.count(), " ", static_cast<double>(std::clock() - cpu_begin) / CLOCKS_PER_SEC);
  }

  void dense() {
    if (buckets_.empty()) {
      std::ifstream file(folder_ / "buckets");
      for (Index elements = 0; file >> elements;) buckets_.push_back(elements);
    }
    Index offset = 0;
    for (const Index elements : buckets_) {
      world_.all_reduce(gradient_.span(offset, elements), Reduction::kSum, {Purpose::kDense});
      offset += elements;
    }
    LB_EXPECTS(offset == elements_, "buckets: found ", offset, " elements in all, expected ", elements_);
  }

  double bandwidth() {
    constexpr Index kElements = Index{16} << 20;  // 64 MiB each, twice a large last-level cache
    Buffer<float> x(kElements), y(kElements);
    double best = 0;
    for (int repetition = 0; repetition < 5; ++repetition) {
      world_.barrier();
      const auto begin = Clock::now();
      vector_kernels<float>().axpy(0.5F, x.data(), y.data(), kElements);
      const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
      best = std::max(best, 12.0 * static_cast<double>(kElements) / seconds);
    }
    return best;
  }

  void write(Index matrix, const std::string& name) {
    Index offset = 0;
    for (Index i = 0; i < matrix; ++i) offset += matrices_[static_cast<std::size_t>(i)].elements();
    const ParameterInfo& info = matrices_[static_cast<std::size_t>(matrix)];
    const auto path = [&](const char* what) { return folder_ / cat(name, ".", what, ".", world_.process()); };
    write_matrix(path("d"), gradient_.matrix(offset, info.rows, info.cols));
    if (!state_) return;
    write_matrix(path("q"), state_->q(matrix));
    write_matrix(path("e"), state_->residual(offset, info));
  }

  std::filesystem::path folder_;
  Communicator& world_;
  std::unique_ptr<Communicator> self_;
  std::vector<ParameterInfo> matrices_ = layer_matrices();
  Index elements_ = 0;
  Index step_ = 0;
  std::vector<float> tile_;
  std::vector<Index> buckets_;
  Buffer<float> gradient_;
  std::optional<PowerSgd> state_;
};

}  // namespace
}  // namespace lowband

int main(int argc, char** argv) {
  lowband::ensure_fast_blas_kernels(argv);
  if (argc != 2) {
    std::cerr << "usage: powersgd_sync FOLDER, under mpirun\n";
    return 64;
  }
  try {
    lowband::set_compute_threads(1);
    // Between two commands the processes wait at their pipes; within one, this long at most.
    const lowband::MpiWorld mpi(std::chrono::seconds(60));
    try {
      const auto world = mpi.world();
      lowband::Side(argv[1], *world).serve();
    } catch (const std::exception& error) {
      std::cerr << "powersgd_sync: " << error.what() << std::endl;
      mpi.abort(1);
    }
  } catch (const lowband::Error& error) {
    std::cerr << "powersgd_sync: " << error.what() << "\n";
    return 1;
  }
}
