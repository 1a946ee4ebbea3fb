#include "tests/collectives/factors/exchange_cases.h"

#include "collectives/factors/factor_exchange.h"
#include "collectives/local/local_world.h"
#include "runtime/linalg.h"
#include "runtime/random.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace lowband {
namespace {

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

// ---- meshes

struct Mesh {
  int replicas, shards, tensors;
  int replica, shard, tensor;  // of this process
  std::unique_ptr<Communicator> across_replicas, across_shards, across_tensors, within;
  FactorGroups groups() const { return {across_replicas.get(), within.get()}; }
};

// process = tensor + T (shard + F replica)
Mesh make_mesh(Communicator& world, int replicas, int shards, int tensors) {
  const int p = world.process();
  Mesh mesh{replicas, shards,  tensors, p / (shards * tensors), p / tensors % shards, p % tensors, nullptr,
            nullptr,  nullptr, nullptr};
  mesh.across_replicas = world.split(mesh.tensor + tensors * mesh.shard, p, "replica");
  mesh.across_shards = world.split(mesh.tensor + tensors * mesh.replica, p, "shard");
  mesh.across_tensors = world.split(mesh.shard + shards * mesh.replica, p, "tensor");
  mesh.within = world.split(mesh.replica, p, "within_replica");
  return mesh;
}

void on_every_mesh(Communicator& world, const std::function<void(Mesh&)>& body) {
  const int n = world.size();
  for (int replicas = 1; replicas <= n; ++replicas) {
    for (int shards = 1; replicas * shards <= n; ++shards) {
      if (n % (replicas * shards) != 0) continue;
      const int tensors = n / (replicas * shards);
      SCOPED_TRACE(cat("D", replicas, "F", shards, "T", tensors, ", process ", world.process()));
      Mesh mesh = make_mesh(world, replicas, shards, tensors);
      body(mesh);
    }
  }
}

// ---- matrices

struct Matrix {
  std::string name;
  Index a, b, factor_rank;
  bool shard_cuts_a;  // and the tensor axis b, or the other way round
};

// Ranks from one over break-even up to min(a, b); equal shapes at rank one; fewer rows than processes.
const std::vector<Matrix>& matrices() {
  static const std::vector<Matrix> list{
      {"q", 24, 16, 5, true},      {"square", 16, 16, 16, false}, {"gate", 37, 16, 6, true},
      {"down", 31, 13, 13, false}, {"one0", 20, 12, 1, true},     {"one1", 20, 12, 1, true},
      {"one2", 20, 12, 1, true},   {"column", 9, 1, 1, false},    {"tiny", 3, 2, 2, true}};
  return list;
}

struct Span {
  Index begin, end;
  Index size() const { return end - begin; }
};
Span cut(Index extent, int parts, int part) { return {extent * part / parts, extent * (part + 1) / parts}; }
Span a_rows(const Mesh& mesh, const Matrix& m) {
  return m.shard_cuts_a ? cut(m.a, mesh.shards, mesh.shard) : cut(m.a, mesh.tensors, mesh.tensor);
}
Span b_rows(const Mesh& mesh, const Matrix& m) {
  return m.shard_cuts_a ? cut(m.b, mesh.tensors, mesh.tensor) : cut(m.b, mesh.shards, mesh.shard);
}

std::vector<FactorShape> shapes_of(const Mesh& mesh, const std::vector<Matrix>& list) {
  std::vector<FactorShape> shapes;
  for (const Matrix& m : list) {
    Communicator* const shard = mesh.across_shards.get();
    Communicator* const tensor = mesh.across_tensors.get();
    shapes.push_back({.name = m.name,
                      .factor_rank = m.factor_rank,
                      .left_rows = a_rows(mesh, m).size(),
                      .right_rows = b_rows(mesh, m).size(),
                      .across_b = m.shard_cuts_a ? tensor : shard,
                      .across_a = m.shard_cuts_a ? shard : tensor});
  }
  return shapes;
}

// Element of B_i of one replica. Q is a fixed (b, r) matrix. Both are floats, so that float and double runs
// see the same.
using Entries = std::function<double(const Matrix&, int replica, Index row, Index col)>;
double noise(const Matrix& m, int replica, Index row, Index col) {
  return static_cast<float>(RandomStream(3, m.name, replica).normal(row * 64 + col));
}
double q_entry(const Matrix& m, Index row, Index col) {
  return static_cast<float>(RandomStream(4, m.name).normal(row * 64 + col));
}

struct Dense {
  Dense(Index rows_, Index cols_) : rows(rows_), cols(cols_), values(at(rows_ * cols_)) {}
  Index rows, cols;
  std::vector<double> values;
  double& operator()(Index i, Index j) { return values[at(i * cols + j)]; }
  double operator()(Index i, Index j) const { return values[at(i * cols + j)]; }
};

// The factors in float64, by the definition: P from Gram-Schmidt in two sweeps, positive diagonal.
struct Reference {
  Reference(const Matrix& m, int replicas, const Entries& b) : P(m.a, m.factor_rank), R(m.b, m.factor_rank) {
    Dense mean(m.a, m.b);
    for (Index i = 0; i < m.a; ++i) {
      for (Index k = 0; k < m.b; ++k) {
        for (int replica = 0; replica < replicas; ++replica) mean(i, k) += b(m, replica, i, k) / replicas;
      }
    }
    double squares_of_all = 0;
    double smallest = std::numeric_limits<double>::infinity();
    for (Index j = 0; j < m.factor_rank; ++j) {
      for (Index i = 0; i < m.a; ++i) {
        for (Index k = 0; k < m.b; ++k) P(i, j) += mean(i, k) * q_entry(m, k, j);
        squares_of_all += P(i, j) * P(i, j);
      }
      for (int sweep = 0; sweep < 2; ++sweep) {
        for (Index before = 0; before < j; ++before) {
          double dot = 0;
          for (Index i = 0; i < m.a; ++i) dot += P(i, before) * P(i, j);
          for (Index i = 0; i < m.a; ++i) P(i, j) -= dot * P(i, before);
        }
      }
      double squares = 0;
      for (Index i = 0; i < m.a; ++i) squares += P(i, j) * P(i, j);
      smallest = std::min(smallest, std::sqrt(squares));
      for (Index i = 0; i < m.a; ++i) P(i, j) /= std::sqrt(squares);
    }
    condition = std::sqrt(squares_of_all) / smallest;
    for (Index k = 0; k < m.b; ++k) {
      for (Index j = 0; j < m.factor_rank; ++j) {
        for (Index i = 0; i < m.a; ++i) R(k, j) += mean(i, k) * P(i, j);
        largest = std::max(largest, std::abs(R(k, j)));
      }
    }
  }
  Dense P, R;
  double condition = 1;  // ||mean B Q||_F over the smallest diagonal entry of its triangular factor, >= 1
  double largest = 0;    // max |R|
};

// ---- one exchange

template <class Real>
void fill_left(const Mesh& mesh, const Matrix& m, const Entries& b, MatrixView<Real> left) {
  const Span rows = a_rows(mesh, m);
  const Span cols = b_rows(mesh, m);
  for (Index i = 0; i < left.rows; ++i) {
    for (Index j = 0; j < left.cols; ++j) {
      double sum = 0;
      for (Index k = cols.begin; k < cols.end; ++k)
        sum += b(m, mesh.replica, rows.begin + i, k) * q_entry(m, k, j);
      left(i, j) = static_cast<Real>(sum);
    }
  }
}

template <class Real>
void fill_right(const Mesh& mesh, const Matrix& m, const Entries& b, MatrixView<const Real> left,
                MatrixView<Real> right) {
  const Span rows = a_rows(mesh, m);
  const Span cols = b_rows(mesh, m);
  for (Index k = 0; k < right.rows; ++k) {
    for (Index j = 0; j < right.cols; ++j) {
      double sum = 0;
      for (Index i = 0; i < left.rows; ++i)
        sum += b(m, mesh.replica, rows.begin + i, cols.begin + k) * static_cast<double>(left(i, j));
      right(k, j) = static_cast<Real>(sum);
    }
  }
}

constexpr FactorExchangeOptions kKeepOwn{.keep_own_right = true};
constexpr FactorExchangeOptions kRounded{.keep_own_right = true, .wire = FactorWire::kBF16};

template <class Real>
struct Run {
  Run(const Mesh& mesh, const std::vector<Matrix>& list, const FactorExchangeOptions& options,
      std::vector<DenseTensor> dense = {})
      : mesh_(&mesh),
        list_(list),
        exchange(mesh.groups(), shapes_of(mesh, list), std::move(dense), options) {}

  // A matrix that is not finite sends zeros for R, as an optimizer that skips it does.
  void go(const Entries& b) {
    for (std::size_t i = 0; i < list_.size(); ++i)
      fill_left<Real>(*mesh_, list_[i], b, exchange.left(static_cast<Index>(i)));
    exchange.exchange_left();
    for (std::size_t i = 0; i < list_.size(); ++i) {
      const auto index = static_cast<Index>(i);
      if (exchange.factorisation(index) == Factorisation::kNonFinite) {
        std::ranges::fill(exchange.right(index).flat(), Real{0});
      } else {
        fill_right<Real>(*mesh_, list_[i], b, exchange.left(index), exchange.right(index));
      }
    }
    exchange.exchange_right();
  }

  const Mesh* mesh_;
  std::vector<Matrix> list_;
  FactorExchange<Real> exchange;
};

template <class Real>
std::vector<std::uint64_t> bits_of(FactorExchange<Real>& exchange, Index i) {
  std::vector<std::uint64_t> bits;
  const auto add = [&](const void* data, std::size_t bytes) {
    std::uint64_t hash = 14695981039346656037u;  // FNV-1a
    for (std::size_t k = 0; k < bytes; ++k)
      hash = (hash ^ static_cast<const unsigned char*>(data)[k]) * 1099511628211u;
    bits.push_back(hash);
  };
  add(exchange.left(i).data, exchange.left(i).flat().size_bytes());
  add(exchange.right(i).data, exchange.right(i).flat().size_bytes());
  add(exchange.dead(i).data(), exchange.dead(i).size_bytes());
  add(exchange.right_norms(i).data(), exchange.right_norms(i).size_bytes());
  const Factorisation factorisation = exchange.factorisation(i);
  add(&factorisation, sizeof factorisation);
  return bits;
}

// Every replica holds the same bits.
template <class Real>
void expect_equal_replicas(const Mesh& mesh, Run<Real>& run) {
  for (std::size_t i = 0; i < run.list_.size(); ++i) {
    std::vector<Index> own;
    for (const std::uint64_t hash : bits_of(run.exchange, static_cast<Index>(i)))
      own.push_back(static_cast<Index>(hash));
    std::vector<Index> all(own.size() * at(mesh.replicas));
    mesh.across_replicas->all_gather<Index>(
        own, all, std::vector<Index>(at(mesh.replicas), static_cast<Index>(own.size())), {Purpose::kControl});
    for (int replica = 0; replica < mesh.replicas; ++replica)
      EXPECT_TRUE(std::equal(own.begin(), own.end(), all.begin() + replica * static_cast<Index>(own.size())))
          << run.list_[i].name << " differs on replica " << replica;
  }
}

// mean over replicas of own_right = right. Each own_right is rounded to Real once (twice with the error of a
// rounded wire added), the sum of D of them D - 1 times, and R once: (D + 2) u max |own|, per element.
template <class Real>
void expect_conservation(const Mesh& mesh, Run<Real>& run) {
  for (std::size_t i = 0; i < run.list_.size(); ++i) {
    const MatrixView<const Real> own = run.exchange.own_right(static_cast<Index>(i));
    const MatrixView<const Real> mean = run.exchange.right(static_cast<Index>(i));
    std::vector<double> sum(own.flat().begin(), own.flat().end());
    double largest = 0;
    for (const double x : sum) largest = std::max(largest, std::abs(x));
    mesh.across_replicas->all_reduce<double>(sum, Reduction::kSum, {Purpose::kControl});
    mesh.across_replicas->all_reduce<double>(std::span(&largest, 1), Reduction::kMax, {Purpose::kControl});
    const double tolerance =
        (mesh.replicas + 2) * static_cast<double>(std::numeric_limits<Real>::epsilon()) * largest;
    for (Index e = 0; e < own.elements(); ++e) {
      EXPECT_NEAR(sum[at(e)] / mesh.replicas, static_cast<double>(mean.flat()[at(e)]), tolerance)
          << run.list_[i].name << " element " << e;
    }
  }
}

// P differs from the reference by what the rounding of mean B Q, relative error `u` in norm, is blown up to
// when columns are taken apart; R by that and its own sums.
template <class Real>
void expect_reference(const Mesh& mesh, Run<Real>& run, const Entries& b, double u) {
  for (std::size_t i = 0; i < run.list_.size(); ++i) {
    const Matrix& m = run.list_[i];
    const auto index = static_cast<Index>(i);
    SCOPED_TRACE(m.name);
    const Reference reference(m, mesh.replicas, b);
    const double p_error = 4 * u * reference.condition;
    const MatrixView<const Real> left = run.exchange.left(index);
    const Index first_a = a_rows(mesh, m).begin;
    for (Index row = 0; row < left.rows; ++row) {
      for (Index j = 0; j < left.cols; ++j)
        ASSERT_NEAR(static_cast<double>(left(row, j)), reference.P(first_a + row, j), p_error)
            << row << " " << j;
    }
    // |B^T dP| <= ||B|| sqrt(a) |dP|, with ||B|| of a few sqrt(b) for these entries
    const double r_error =
        p_error * std::sqrt(static_cast<double>(m.a)) * 4 * std::sqrt(static_cast<double>(m.b)) +
        u * reference.largest;
    const MatrixView<const Real> right = run.exchange.right(index);
    const Index first_b = b_rows(mesh, m).begin;
    for (Index row = 0; row < right.rows; ++row) {
      for (Index j = 0; j < right.cols; ++j)
        ASSERT_NEAR(static_cast<double>(right(row, j)), reference.R(first_b + row, j), r_error)
            << row << " " << j;
    }
    for (Index j = 0; j < m.factor_rank; ++j) {
      double squares = 0;
      for (Index k = 0; k < m.b; ++k) squares += reference.R(k, j) * reference.R(k, j);
      EXPECT_NEAR(run.exchange.right_norms(index)[at(j)], std::sqrt(squares),
                  r_error * std::sqrt(static_cast<double>(m.b)));
      EXPECT_EQ(run.exchange.dead(index)[at(j)], 0);
    }
    EXPECT_NE(run.exchange.factorisation(index), Factorisation::kZero);
    EXPECT_NE(run.exchange.factorisation(index), Factorisation::kNonFinite);
  }
}

// Relative rounding of a sum over the axes that cut B and over replicas, and of the few operations after it.
template <class Real>
double unit(const Mesh& mesh) {
  return static_cast<double>(std::numeric_limits<Real>::epsilon()) *
         (mesh.replicas + mesh.shards + mesh.tensors + 8);
}
constexpr double kWireUnit = 1.0 / 256;  // bf16 has 8 bits: half of it is the largest relative error

// ---- cases

template <class Real>
void check_against_reference(Communicator& world) {
  on_every_mesh(world, [](Mesh& mesh) {
    Run<Real> run(mesh, matrices(), kKeepOwn);
    // The second exchange sees what the first has left in the buffers.
    for (int time = 0; time < 2; ++time) {
      run.go(noise);
      expect_reference(mesh, run, noise, unit<Real>(mesh));
      expect_conservation(mesh, run);
      expect_equal_replicas(mesh, run);
    }
  });
}
void equals_the_reference_in_double(Communicator& world) { check_against_reference<double>(world); }
void equals_the_reference_in_float(Communicator& world) { check_against_reference<float>(world); }

// On the wire P_i, and P and R once more: three roundings of half a unit, and the float sums between them.
void a_rounded_wire_errs_by_its_roundings(Communicator& world) {
  on_every_mesh(world, [](Mesh& mesh) {
    Run<float> run(mesh, matrices(), kRounded);
    for (int time = 0; time < 2; ++time) {
      run.go(noise);
      // P rounded is no function of the exact P alone; compare where the rounding is not blown up.
      for (std::size_t i = 0; i < run.list_.size(); ++i) {
        const Reference reference(run.list_[i], mesh.replicas, noise);
        if (reference.condition > 16) continue;
        Run<float> alone(mesh, {run.list_[i]}, kRounded);
        alone.go(noise);
        expect_reference(mesh, alone, noise, 1.5 * kWireUnit);
      }
      // Everyone uses numbers that were on the wire, the process that formed them included.
      for (std::size_t i = 0; i < run.list_.size(); ++i) {
        for (const float x : run.exchange.left(static_cast<Index>(i)).flat())
          EXPECT_EQ(x, to_float(to_bfloat16(x)));
        for (const float x : run.exchange.right(static_cast<Index>(i)).flat()) {
          const float sum = x * static_cast<float>(mesh.replicas);
          EXPECT_NEAR(sum, to_float(to_bfloat16(sum)),
                      2 * std::numeric_limits<float>::epsilon() * std::abs(sum));
        }
      }
      expect_conservation(mesh, run);
      expect_equal_replicas(mesh, run);
    }
  });
}

void a_rounded_wire_is_refused_in_double(Communicator& world) {
  on_every_mesh(world,
                [](Mesh& mesh) { EXPECT_THROW(Run<double>(mesh, matrices(), kRounded), InvalidArgument); });
}

template <class Real>
void check_non_finite(Communicator& world, const FactorExchangeOptions& options) {
  on_every_mesh(world, [&](Mesh& mesh) {
    Run<Real> clean(mesh, matrices(), options);
    clean.go(noise);
    for (const double bad :
         {std::numeric_limits<double>::quiet_NaN(), -std::numeric_limits<double>::infinity()}) {
      // One element of one process of one replica.
      const auto entries = [&](const Matrix& m, int replica, Index row, Index col) {
        const bool hit = m.name == "gate" && replica == mesh.replicas - 1 && row == m.a - 1 && col == m.b - 1;
        return hit ? bad : noise(m, replica, row, col);
      };
      Run<Real> run(mesh, matrices(), options);
      run.go(entries);
      for (std::size_t i = 0; i < run.list_.size(); ++i) {
        const auto index = static_cast<Index>(i);
        if (run.list_[i].name == "gate") {
          EXPECT_EQ(run.exchange.factorisation(index), Factorisation::kNonFinite);
        } else {
          EXPECT_EQ(bits_of(run.exchange, index), bits_of(clean.exchange, index)) << run.list_[i].name;
        }
      }
      expect_equal_replicas(mesh, run);
      // Nothing of it stays.
      run.go(noise);
      for (std::size_t i = 0; i < run.list_.size(); ++i)
        EXPECT_EQ(bits_of(run.exchange, static_cast<Index>(i)),
                  bits_of(clean.exchange, static_cast<Index>(i)));
    }
  });
}
void one_bad_element_is_seen_by_all(Communicator& world) {
  check_non_finite<double>(world, kKeepOwn);
  check_non_finite<float>(world, kKeepOwn);
  check_non_finite<float>(world, kRounded);
}

void one_replica_with_zeros_does_not_act_alone(Communicator& world) {
  on_every_mesh(world, [](Mesh& mesh) {
    if (mesh.replicas == 1) return;
    const auto entries = [](const Matrix& m, int replica, Index row, Index col) {
      return replica == 0 ? 0.0 : noise(m, replica, row, col);
    };
    Run<double> run(mesh, matrices(), kKeepOwn);
    run.go(entries);
    expect_reference(mesh, run, entries, unit<double>(mesh));
    expect_conservation(mesh, run);
    expect_equal_replicas(mesh, run);
    if (mesh.replica != 0) return;
    for (std::size_t i = 0; i < run.list_.size(); ++i) {
      for (const double x : run.exchange.own_right(static_cast<Index>(i)).flat()) EXPECT_EQ(x, 0);
    }
  });
}

void zero_stays_zero_with_every_column_dead(Communicator& world) {
  on_every_mesh(world, [](Mesh& mesh) {
    for (const FactorExchangeOptions& options : {kKeepOwn, kRounded}) {
      Run<float> run(mesh, matrices(), options);
      run.go(noise);
      run.go([](const Matrix&, int, Index, Index) { return 0.0; });
      for (std::size_t i = 0; i < run.list_.size(); ++i) {
        const auto index = static_cast<Index>(i);
        EXPECT_EQ(run.exchange.factorisation(index), Factorisation::kZero);
        EXPECT_EQ(std::ranges::count(run.exchange.dead(index), 1), run.list_[i].factor_rank);
        for (const float x : run.exchange.left(index).flat()) EXPECT_EQ(x, 0);
        for (const float x : run.exchange.right(index).flat()) EXPECT_EQ(x, 0);
        for (const float x : run.exchange.own_right(index).flat()) EXPECT_EQ(x, 0);
        for (const double x : run.exchange.right_norms(index)) EXPECT_EQ(x, 0);
      }
    }
  });
}

// B of rank two: what is left of the third column and those after it is rounding.
void dead_columns_are_zero_and_known_to_all(Communicator& world) {
  on_every_mesh(world, [](Mesh& mesh) {
    const auto entries = [](const Matrix& m, int, Index row, Index col) {
      return noise(m, 0, row, 60) * noise(m, 1, col, 61) + noise(m, 2, row, 62) * noise(m, 3, col, 63);
    };
    Run<double> run(mesh, {matrices()[0], matrices()[2], matrices()[3]}, kKeepOwn);
    run.go(entries);
    expect_equal_replicas(mesh, run);
    for (Index i = 0; i < 3; ++i) {
      const std::span<const std::uint8_t> dead = run.exchange.dead(i);
      for (Index j = 0; j < static_cast<Index>(dead.size()); ++j) {
        EXPECT_EQ(dead[at(j)], j >= 2) << i << " column " << j;
        if (j < 2) continue;
        for (Index row = 0; row < run.exchange.left(i).rows; ++row)
          EXPECT_EQ(run.exchange.left(i)(row, j), 0);
        EXPECT_EQ(run.exchange.right_norms(i)[at(j)], 0);
      }
    }
  });
}

void equal_layers_at_rank_one_do_not_mix(Communicator& world) {
  on_every_mesh(world, [](Mesh& mesh) {
    std::vector<Matrix> layers;
    for (int k = 0; k < 7; ++k) layers.push_back({cat("layer", k), 20, 12, 1, true});
    for (const FactorExchangeOptions& options : {kKeepOwn, kRounded}) {
      Run<float> together(mesh, layers, options);
      together.go(noise);
      for (std::size_t k = 0; k < layers.size(); ++k) {
        Run<float> alone(mesh, {layers[k]}, options);
        alone.go(noise);
        // R is summed in even parts, but every part in the same order of replicas.
        EXPECT_EQ(bits_of(alone.exchange, 0), bits_of(together.exchange, static_cast<Index>(k)))
            << layers[k].name;
      }
    }
  });
}

double dense_entry(std::size_t tensor, int replica, Index e) {
  return static_cast<double>((replica + 1) * (e % 97 + 1) + 1000 * static_cast<Index>(tensor));
}
const std::vector<DenseTensor>& dense_tensors() {
  static const std::vector<DenseTensor> list{{"embed", 5003}, {"nothing", 0}, {"norm", 1}, {"gain", 17}};
  return list;
}

// Integers: sums are exact.
template <class Real>
void check_dense(Mesh& mesh, const std::vector<Matrix>& list, const FactorExchangeOptions& options) {
  Run<Real> run(mesh, list, options, dense_tensors());
  for (std::size_t k = 0; k < dense_tensors().size(); ++k) {
    Buffer<Real> values(dense_tensors()[k].elements);
    for (Index e = 0; e < dense_tensors()[k].elements; ++e)
      values[e] = static_cast<Real>(dense_entry(k, mesh.replica, e));
    run.exchange.put_dense(static_cast<Index>(k), values.line());
  }
  run.go(noise);
  for (std::size_t k = 0; k < dense_tensors().size(); ++k) {
    Buffer<Real> values(dense_tensors()[k].elements);
    run.exchange.get_dense(static_cast<Index>(k), values.line());
    for (Index e = 0; e < dense_tensors()[k].elements; ++e) {
      double sum = 0;
      for (int replica = 0; replica < mesh.replicas; ++replica) sum += dense_entry(k, replica, e);
      ASSERT_EQ(static_cast<double>(values[e]), sum) << dense_tensors()[k].name << " element " << e;
    }
  }
  // The factors do not notice.
  Run<Real> alone(mesh, list, options);
  alone.go(noise);
  for (std::size_t i = 0; i < list.size(); ++i)
    EXPECT_EQ(bits_of(run.exchange, static_cast<Index>(i)), bits_of(alone.exchange, static_cast<Index>(i)));
  Buffer<Real> wrong(3);
  EXPECT_THROW(run.exchange.put_dense(0, wrong.line()), InvalidArgument);
  EXPECT_THROW(run.exchange.get_dense(0, wrong.line()), InvalidArgument);
}

void dense_tensors_are_summed_beside_the_factors(Communicator& world) {
  on_every_mesh(world, [](Mesh& mesh) {
    check_dense<double>(mesh, matrices(), kKeepOwn);
    check_dense<float>(mesh, matrices(), kRounded);
  });
}

void no_matrices_are_legal(Communicator& world) {
  on_every_mesh(world, [](Mesh& mesh) {
    check_dense<float>(mesh, {}, kKeepOwn);
    check_dense<float>(mesh, {}, kRounded);
    Run<float> nothing(mesh, {}, kKeepOwn);
    nothing.go(noise);
  });
}

double sum_over(Communicator& group, double x) {
  group.all_reduce<double>(std::span(&x, 1), Reduction::kSum, {Purpose::kActivation});
  return x;
}

template <class Real>
void check_bytes(Mesh& mesh, const FactorExchangeOptions& options, Index wire_bytes) {
  Run<Real> run(mesh, matrices(), options, dense_tensors());
  Communicator& replica = *mesh.across_replicas;
  Ledger& ledger = replica.ledger();
  for (const double scale : {1.0, 0.0}) {  // what is sent does not depend on values
    ledger.begin_step();
    run.go([scale](const Matrix& m, int r, Index row, Index col) { return scale * noise(m, r, row, col); });
    const TransferTotals factor = ledger.step_sum("replica", Purpose::kFactor);
    const TransferTotals dense = ledger.step_sum("replica", Purpose::kDense);
    const TransferTotals control = ledger.step_sum("replica", Purpose::kControl);
    const TransferTotals inner_control = ledger.step_sum("within_replica", Purpose::kControl);
    const auto by_parameter = ledger.step_parameters();

    Index elements = 0;
    Index outcomes = 0;
    Index at_home = 0;  // bytes that orthonormalise what lives here: a maximum and two triangles each
    Index columns = 0;
    for (std::size_t i = 0; i < matrices().size(); ++i) {
      const Matrix& m = matrices()[i];
      elements += m.factor_rank * (m.a + m.b);
      outcomes += 1 + m.factor_rank;
      columns += m.factor_rank;
      if (run.exchange.home(static_cast<Index>(i)) == mesh.replica)
        at_home += 8 * (1 + m.factor_rank * (m.factor_rank + 1));
      // Summed over the processes of a replica
      EXPECT_EQ(
          sum_over(*mesh.within, static_cast<double>(by_parameter.at({"replica", Purpose::kFactor, m.name}))),
          static_cast<double>(wire_bytes * m.factor_rank * (m.a + m.b)))
          << m.name;
      EXPECT_FALSE(by_parameter.contains({"replica", Purpose::kDense, m.name}));
    }
    EXPECT_EQ(sum_over(*mesh.within, static_cast<double>(factor.payload_bytes)),
              static_cast<double>(wire_bytes * elements));
    Index dense_elements = 0;
    for (const DenseTensor& tensor : dense_tensors()) {
      EXPECT_EQ(by_parameter.at({"replica", Purpose::kDense, tensor.name}),
                static_cast<Index>(sizeof(Real)) * tensor.elements);
      dense_elements += tensor.elements;
    }
    EXPECT_EQ(dense.payload_bytes, static_cast<Index>(sizeof(Real)) * dense_elements);
    EXPECT_EQ(control.payload_bytes, wire_bytes * outcomes);
    EXPECT_EQ(inner_control.payload_bytes, mesh.within->size() > 1 ? at_home + 8 * columns : 0);

    // As two ring all-reduces: 2 (D - 1) times the buffer, over all processes of the axis.
    EXPECT_NEAR(sum_over(replica, factor.modelled_wire_bytes),
                2.0 * (mesh.replicas - 1) * static_cast<double>(factor.payload_bytes), 1e-6);
    EXPECT_NEAR(sum_over(replica, dense.modelled_wire_bytes),
                2.0 * (mesh.replicas - 1) * static_cast<double>(dense.payload_bytes), 1e-6);
    // What was handed over is known of whole transfers, in which all three ride.
    EXPECT_EQ(sum_over(replica, static_cast<double>(factor.transport_bytes + dense.transport_bytes +
                                                    control.transport_bytes)),
              2.0 * (mesh.replicas - 1) *
                  static_cast<double>(factor.payload_bytes + dense.payload_bytes + control.payload_bytes));
  }
}

void bytes_are_those_of_two_ring_all_reduces(Communicator& world) {
  on_every_mesh(world, [](Mesh& mesh) {
    check_bytes<double>(mesh, kKeepOwn, 8);
    check_bytes<float>(mesh, kKeepOwn, 4);
    check_bytes<float>(mesh, kRounded, 2);
  });
}

// Hash of all results on all meshes, by process.
std::vector<std::uint64_t> fingerprint(Communicator& world) {
  std::vector<std::uint64_t> bits;
  on_every_mesh(world, [&](Mesh& mesh) {
    for (const FactorExchangeOptions& options : {kKeepOwn, kRounded}) {
      Run<float> run(mesh, matrices(), options);
      run.go(noise);
      for (Index i = 0; i < static_cast<Index>(run.list_.size()); ++i) {
        for (const std::uint64_t hash : bits_of(run.exchange, i)) bits.push_back(hash);
      }
    }
  });
  return bits;
}

void bits_are_those_of_threads_as_processes(Communicator& world) {
  const std::vector<std::uint64_t> own = fingerprint(world);
  std::vector<std::uint64_t> of_threads;
  run_world(world.size(), [&](Communicator& threads) {
    const std::vector<std::uint64_t> bits = fingerprint(threads);
    if (threads.process() == world.process()) of_threads = bits;
  });
  EXPECT_EQ(own, of_threads);
}

// Six matrices of 700 KiB and more in bfloat16 travel in two waves, each of them alone in one: sums, bases
// and what is known of the columns are the same bits.
void waves_change_no_bits(Communicator& world) {
  constexpr Index kLeftRows = 5600, kRightRows = 90, kFactorRank = 64, kMatrices = 6;
  const auto alone = world.split(world.process(), 0, "alone");
  std::vector<FactorShape> shapes;
  for (Index i = 0; i < kMatrices; ++i) {
    shapes.push_back({.name = cat("m", i),
                      .factor_rank = kFactorRank,
                      .left_rows = kLeftRows,
                      .right_rows = kRightRows,
                      .across_b = alone.get(),
                      .across_a = alone.get()});
  }
  // Numbers between -1 and 1; one matrix of zeros, one with equal columns, one with a NaN on one process.
  const auto fill = [&](MatrixView<float> view, Index i, Index salt) {
    for (Index e = 0; e < view.elements(); ++e) {
      auto bits = static_cast<std::uint64_t>(((i * 2 + salt) * 64 + world.process()) * view.elements() + e);
      bits = (bits ^ bits >> 31U) * 0x9e37'79b9'7f4a'7c15U;
      bits = (bits ^ bits >> 29U) * 0xbf58'476d'1ce4'e5b9U;
      view.data[e] = i == 1 ? 0 : static_cast<float>(static_cast<std::int64_t>(bits)) * 0x1p-63F;
    }
    if (i == 4) {
      for (Index row = 0; row < view.rows; ++row) view(row, 9) = view(row, 7);
    }
    if (i == 5 && world.process() == 0) view(3, 3) = std::numeric_limits<float>::quiet_NaN();
  };
  for (const FactorExchangeOptions& options : {FactorExchangeOptions{}, {.wire = FactorWire::kBF16}}) {
    const FactorGroups groups{.replica = &world, .within_replica = alone.get()};
    FactorExchange<float> together(groups, shapes, {}, options);
    world.ledger().begin_step();
    for (Index i = 0; i < kMatrices; ++i) fill(together.left(i), i, 0), fill(together.right(i), i, 1);
    together.exchange_left();
    together.exchange_right();
    // P in two halves of two waves, R in two halves.
    const TransferTotals factor = world.ledger().step_sum(world.axis(), Purpose::kFactor);
    EXPECT_EQ(factor.calls, world.size() > 1 ? 6 : 4);
    EXPECT_EQ(factor.payload_bytes, kMatrices * kFactorRank * (kLeftRows + kRightRows) *
                                        (options.wire == FactorWire::kBF16 ? 2 : 4));
    for (Index i = 0; i < kMatrices; ++i) {
      SCOPED_TRACE(cat("matrix ", i));
      FactorExchange<float> single(groups, {shapes[at(i)]}, {}, options);
      fill(single.left(0), i, 0), fill(single.right(0), i, 1);
      single.exchange_left();
      single.exchange_right();
      EXPECT_EQ(together.factorisation(i), single.factorisation(0));
      EXPECT_TRUE(std::ranges::equal(together.dead(i), single.dead(0)));
      const auto same_bits = [](MatrixView<const float> a, MatrixView<const float> b) {
        return std::memcmp(a.data, b.data, at(a.elements()) * sizeof(float)) == 0;
      };
      EXPECT_TRUE(same_bits(together.left(i), single.left(0))) << "P";
      EXPECT_TRUE(same_bits(together.right(i), single.right(0))) << "R";
    }
    EXPECT_EQ(together.factorisation(0), Factorisation::kCholesky);
    EXPECT_EQ(together.factorisation(1), Factorisation::kZero);
    EXPECT_EQ(together.factorisation(5), Factorisation::kNonFinite);
    EXPECT_EQ(std::ranges::count(together.dead(4), 1), 1);
  }
}

void every_matrix_has_one_home_that_all_know(Communicator& world) {
  on_every_mesh(world, [&](Mesh& mesh) {
    Run<float> run(mesh, matrices(), kKeepOwn);
    std::vector<Index> homes;
    for (Index i = 0; i < static_cast<Index>(matrices().size()); ++i) {
      homes.push_back(run.exchange.home(i));
      EXPECT_LT(homes.back(), mesh.replicas);
    }
    std::vector<Index> largest = homes;
    world.all_reduce<Index>(largest, Reduction::kMax, {Purpose::kControl});
    EXPECT_EQ(homes, largest);
  });
}

void own_right_must_have_been_asked_for(Communicator& world) {
  on_every_mesh(world, [](Mesh& mesh) {
    Run<float> run(mesh, matrices(), {});
    run.go(noise);
    expect_reference(mesh, run, noise, unit<float>(mesh));
    EXPECT_THROW(run.exchange.own_right(0), InvalidArgument);
  });
}

void processes_of_two_replicas_are_not_one(Communicator& world) {
  on_every_mesh(world, [&](Mesh& mesh) {
    if (mesh.replicas == 1) return;
    const FactorGroups mistaken{mesh.across_replicas.get(), &world};
    EXPECT_THROW(FactorExchange<float>(mistaken, shapes_of(mesh, matrices()), {}, {}), InvalidArgument);
  });
}

void a_rank_above_the_rows_is_refused_by_all(Communicator& world) {
  on_every_mesh(world, [](Mesh& mesh) {
    std::vector<Matrix> list = matrices();
    list[0].factor_rank = list[0].a + 1;
    try {
      Run<float> run(mesh, list, kKeepOwn);
      ADD_FAILURE() << "nothing thrown";
    } catch (const InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find("factor rank of q: found 25, expected at most its 24 rows"),
                std::string::npos)
          << error.what();
    }
  });
}

void times_add_up_until_they_are_reset(Communicator& world) {
  on_every_mesh(world, [](Mesh& mesh) {
    Run<float> run(mesh, matrices(), kRounded);
    run.go(noise);
    const ExchangeTimes times = run.exchange.times();
    for (const double seconds : {times.pack, times.reduce_scatter, times.orthonormalise, times.all_gather,
                                 times.unpack, times.within_replica})
      EXPECT_GT(seconds, 0);
    run.exchange.reset_times();
    EXPECT_EQ(run.exchange.times().orthonormalise, 0);
  });
}

constexpr ExchangeCase kCases[] = {
    {"equals_the_reference_in_double", equals_the_reference_in_double},
    {"equals_the_reference_in_float", equals_the_reference_in_float},
    {"a_rounded_wire_errs_by_its_roundings", a_rounded_wire_errs_by_its_roundings},
    {"a_rounded_wire_is_refused_in_double", a_rounded_wire_is_refused_in_double},
    {"one_bad_element_is_seen_by_all", one_bad_element_is_seen_by_all},
    {"one_replica_with_zeros_does_not_act_alone", one_replica_with_zeros_does_not_act_alone},
    {"zero_stays_zero_with_every_column_dead", zero_stays_zero_with_every_column_dead},
    {"dead_columns_are_zero_and_known_to_all", dead_columns_are_zero_and_known_to_all},
    {"equal_layers_at_rank_one_do_not_mix", equal_layers_at_rank_one_do_not_mix},
    {"dense_tensors_are_summed_beside_the_factors", dense_tensors_are_summed_beside_the_factors},
    {"no_matrices_are_legal", no_matrices_are_legal},
    {"bytes_are_those_of_two_ring_all_reduces", bytes_are_those_of_two_ring_all_reduces},
    {"bits_are_those_of_threads_as_processes", bits_are_those_of_threads_as_processes},
    {"waves_change_no_bits", waves_change_no_bits},
    {"every_matrix_has_one_home_that_all_know", every_matrix_has_one_home_that_all_know},
    {"own_right_must_have_been_asked_for", own_right_must_have_been_asked_for},
    {"processes_of_two_replicas_are_not_one", processes_of_two_replicas_are_not_one},
    {"a_rank_above_the_rows_is_refused_by_all", a_rank_above_the_rows_is_refused_by_all},
    {"times_add_up_until_they_are_reset", times_add_up_until_they_are_reset},
};

}  // namespace

std::span<const ExchangeCase> exchange_cases() { return kCases; }

}  // namespace lowband
