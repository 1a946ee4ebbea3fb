#include "model/transformer.h"

#include "collectives/local/local_world.h"
#include "runtime/cpu.h"
#include "runtime/random.h"
#include "tests/model/finite_differences.h"
#include "tests/model/naive_model.h"

#include <algorithm>
#include <cstring>
#include <mutex>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lowband {
namespace {

using finite_differences::expect_gradient;
using finite_differences::relative_frobenius;

struct Batch {
  Index sequences;
  std::vector<std::int32_t> tokens, targets;
};

Batch draw_batch(const ModelConfig& config, Index sequences, std::uint64_t seed = 5) {
  const RandomStream stream(seed, "batch");
  Batch batch{.sequences = sequences, .tokens = {}, .targets = {}};
  const auto id = [&](Index i) {
    return static_cast<std::int32_t>(stream.bits(i) % static_cast<std::uint64_t>(config.vocabulary));
  };
  for (Index i = 0; i < sequences * config.sequence; ++i) {
    batch.tokens.push_back(id(2 * i));
    batch.targets.push_back(id(2 * i + 1));
  }
  return batch;
}

// Replaces the small initial values by weights with which every part of the model matters: matrices N(0, 1 /
// fan-in), gains around 1. A function of the global element, so equal for every split.
template <class Real>
void set_lively_weights(Transformer<Real>& model, const Communicator& tensor) {
  for (Parameter<Real>& p : model.parameters()) {
    const MatrixLayout layout(p.info.rows, p.info.cols, p.info.cut, tensor.size(), 1);
    const Index row0 = layout.tensor_rows(tensor.process()).begin,
                col0 = layout.tensor_cols(tensor.process()).begin;
    const RandomStream stream(11, p.info.name);
    for (Index i = 0; i < p.weight.rows; ++i) {
      for (Index j = 0; j < p.weight.cols; ++j) {
        const double z = stream.normal((row0 + i) * p.info.cols + col0 + j);
        const double fan_in = static_cast<double>(p.info.cols);
        p.weight(i, j) = static_cast<Real>(p.info.role == Role::kNorm        ? 1 + 0.2 * z
                                           : p.info.role == Role::kEmbedding ? 0.5 * z
                                                                             : z / std::sqrt(fan_in));
      }
    }
  }
}

// Loss and gradients of one step as the whole group sees them.
struct StepResult {
  double loss = 0;
  naive::Weights weights, gradients;  // gathered
};

// Copies this process's piece into the global matrix.
template <class Real>
void place(const ParameterInfo& info, const MatrixLayout& layout, int process, MatrixView<Real> piece,
           std::vector<double>& global) {
  global.resize(static_cast<std::size_t>(info.elements()));
  const Index row0 = layout.tensor_rows(process).begin, col0 = layout.tensor_cols(process).begin;
  for (Index i = 0; i < piece.rows; ++i) {
    for (Index j = 0; j < piece.cols; ++j)
      global[static_cast<std::size_t>((row0 + i) * info.cols + col0 + j)] = static_cast<double>(piece(i, j));
  }
}

template <class Real>
void gather(Transformer<Real>& model, const Communicator& tensor, StepResult& shared, std::mutex& mutex) {
  const std::lock_guard lock(mutex);
  for (const Parameter<Real>& p : model.parameters()) {
    const MatrixLayout layout(p.info.rows, p.info.cols, p.info.cut, tensor.size(), 1);
    place(p.info, layout, tensor.process(), p.weight, shared.weights[p.info.name]);
    place(p.info, layout, tensor.process(), p.gradient, shared.gradients[p.info.name]);
  }
}

using Decorate = std::function<std::unique_ptr<Communicator>(Communicator&)>;

// One step on `processes` tensor processes; `decorate` may put a communicator in front of the real one.
template <class Real>
StepResult run_step(const ModelConfig& config, int processes, Index sequences,
                    const Decorate& decorate = {}) {
  StepResult result;
  std::mutex mutex;
  const Batch batch = draw_batch(config, sequences);
  run_world(processes, [&](Communicator& world) {
    const auto decorated = decorate ? decorate(world) : nullptr;
    Communicator& tensor = decorated ? *decorated : world;
    Transformer<Real> model(config, tensor, 1, sequences);
    set_lively_weights(model, tensor);
    model.zero_gradients();
    const double scale = 1.0 / static_cast<double>(batch.tokens.size());
    const double loss = model.forward_backward(batch.tokens, batch.targets, sequences, scale, {});
    gather(model, tensor, result, mutex);
    if (tensor.process() == 0) result.loss = loss;
  });
  return result;
}

double largest_gradient_difference(const StepResult& a, const StepResult& b) {
  double largest = 0;
  for (const auto& [name, gradient] : b.gradients)
    largest = std::max(largest, relative_frobenius(a.gradients.at(name), gradient));
  return largest;
}

// No size is a multiple of 16 lanes; vocabulary and feed-forward width are cut unevenly for every T > 1.
ModelConfig small_config() {
  return {.vocabulary = 29,
          .width = 21,
          .layers = 2,
          .heads = 4,
          .kv_heads = 4,
          .head_dim = 6,
          .ffn_width = 35,
          .sequence = 7,
          .rope_base = 100.0};
}
ModelConfig grouped_config() {
  ModelConfig config = small_config();
  config.heads = 6, config.kv_heads = 2;
  return config;
}
ModelConfig untied_config() {
  ModelConfig config = small_config();
  config.tied_head = false;
  return config;
}
ModelConfig three_config() {
  ModelConfig config = small_config();
  config.heads = 3, config.kv_heads = 3, config.head_dim = 10;
  return config;
}

// ---- one process ----

TEST(Transformer, LossEqualsTheNaiveModel) {
  for (const ModelConfig& config : {small_config(), grouped_config(), untied_config(), three_config()}) {
    const StepResult step = run_step<double>(config, 1, 3);
    const Batch batch = draw_batch(config, 3);
    const double expected = naive::Model(config, step.weights).loss(batch.tokens, batch.targets);
    EXPECT_NEAR(step.loss / expected, 1.0, 1e-13);
  }
}

TEST(Transformer, LossEqualsTheNaiveModelOverSeveralQueryBlocks) {
  ModelConfig config = small_config();
  config.sequence = 150;
  const StepResult step = run_step<double>(config, 1, 1);
  const Batch batch = draw_batch(config, 1);
  EXPECT_NEAR(step.loss / naive::Model(config, step.weights).loss(batch.tokens, batch.targets), 1.0, 1e-13);
}

TEST(Transformer, GradientsEqualFiniteDifferences) {
  for (ModelConfig config : {grouped_config(), untied_config()}) {
    config.vocabulary = 11, config.width = 10, config.ffn_width = 9, config.sequence = 5;
    const Batch batch = draw_batch(config, 2);
    run_world(1, [&](Communicator& tensor) {
      Transformer<double> model(config, tensor, 1, 2);
      set_lively_weights(model, tensor);
      model.zero_gradients();
      const double scale = 0.1;
      model.forward_backward(batch.tokens, batch.targets, 2, scale, {});
      for (Parameter<double>& p : model.parameters()) {
        expect_gradient(p.info.name, p.weight.flat(), p.gradient.flat(),
                        [&] { return scale * model.loss(batch.tokens, batch.targets, 2); });
      }
    });
  }
}

TEST(Transformer, TwoMicroBatchesEqualOneBatch) {
  const ModelConfig config = grouped_config();
  const Batch batch = draw_batch(config, 5);
  run_world(1, [&](Communicator& tensor) {
    Transformer<double> whole(config, tensor, 1, 5), parts(config, tensor, 1, 3);
    set_lively_weights(whole, tensor);
    set_lively_weights(parts, tensor);
    const double loss = whole.forward_backward(batch.tokens, batch.targets, 5, 0.5, {});
    const std::span tokens(batch.tokens), targets(batch.targets);
    const auto cut = static_cast<std::size_t>(3 * config.sequence);
    double sum = parts.forward_backward(tokens.first(cut), targets.first(cut), 3, 0.5, {});
    sum += parts.forward_backward(tokens.subspan(cut), targets.subspan(cut), 2, 0.5, {});
    EXPECT_NEAR(sum / loss, 1.0, 1e-14);
    for (std::size_t i = 0; i < whole.parameters().size(); ++i) {
      EXPECT_LE(
          relative_frobenius(parts.parameters()[i].gradient.flat(), whole.parameters()[i].gradient.flat()),
          1e-13)
          << whole.parameters()[i].info.name;
    }
    // And zero_gradients starts anew.
    whole.zero_gradients();
    for (const auto& p : whole.parameters()) EXPECT_EQ(p.gradient(0, 0), 0) << p.info.name;
  });
}

TEST(Transformer, GradientsAreReadyOnceInReverseOrderAndComplete) {
  for (const bool tied : {true, false}) {
    ModelConfig config = small_config();
    config.tied_head = tied;
    const Batch batch = draw_batch(config, 2);
    run_world(1, [&](Communicator& tensor) {
      Transformer<double> model(config, tensor, 1, 2);
      std::vector<Index> order;
      std::vector<std::vector<double>> seen(model.parameters().size());
      model.forward_backward(batch.tokens, batch.targets, 2, 1.0, [&](Index i) {
        order.push_back(i);
        const auto gradient = model.parameters()[static_cast<std::size_t>(i)].gradient.flat();
        seen[static_cast<std::size_t>(i)].assign(gradient.begin(), gradient.end());
      });
      ASSERT_EQ(order.size(), model.parameters().size());
      EXPECT_TRUE(std::is_sorted(order.rbegin(), order.rend()));
      for (std::size_t i = 0; i < seen.size(); ++i) {
        const auto gradient = model.parameters()[i].gradient.flat();
        EXPECT_TRUE(std::equal(gradient.begin(), gradient.end(), seen[i].begin()))
            << model.parameters()[i].info.name;
      }
    });
  }
}

TEST(Transformer, ResultsDoNotDependOnTheNumberOfThreads) {
  ModelConfig config = grouped_config();
  config.sequence = 70;
  const Batch batch = draw_batch(config, 3);
  run_world(1, [&](Communicator& tensor) {
    std::vector<std::vector<float>> gradients;
    std::vector<double> losses;
    for (const int threads : {1, 2}) {
      set_compute_threads(threads);
      if (compute_threads() != threads) GTEST_SKIP() << "built without OpenMP";
      Transformer<float> model(config, tensor, 1, 3);
      set_lively_weights(model, tensor);
      losses.push_back(model.forward_backward(batch.tokens, batch.targets, 3, 1.0, {}));
      auto& all = gradients.emplace_back();
      for (const auto& p : model.parameters()) {
        const auto gradient = p.gradient.flat();
        all.insert(all.end(), gradient.begin(), gradient.end());
      }
    }
    set_compute_threads(1);
    EXPECT_EQ(losses[0], losses[1]);
    EXPECT_EQ(gradients[0], gradients[1]);
  });
}

TEST(Transformer, RefusesTokensOutsideTheVocabulary) {
  const ModelConfig config = small_config();
  run_world(2, [&](Communicator& tensor) {
    Transformer<float> model(config, tensor, 1, 2);
    const auto message = [&](auto change) -> std::string {
      Batch batch = draw_batch(config, 2);
      change(batch);
      try {
        model.forward_backward(batch.tokens, batch.targets, batch.sequences, 1.0, {});
      } catch (const InvalidArgument& error) {
        return error.what();
      }
      return "accepted";
    };
    EXPECT_EQ(message([](Batch& b) { b.tokens[3] = 29; }),
              "tokens[3]: found id 29, expected 0 to model.vocabulary - 1 = 28");
    EXPECT_EQ(message([](Batch& b) { b.targets[0] = -1; }),
              "targets[0]: found id -1, expected 0 to model.vocabulary - 1 = 28");
    EXPECT_EQ(message([](Batch& b) { b.targets.pop_back(); }),
              "targets: found 13 ids, expected 2 sequences of 7");
    EXPECT_EQ(message([](Batch& b) { b.sequences = 3; }), "sequences: found 3, expected 1 to 2");
    EXPECT_EQ(message([](Batch&) {}), "accepted");  // refused on every process alike: the group is not broken
  });
}

// ---- initial values ----

TEST(Transformer, InitialValuesHaveTheirDeviationAndDoNotDependOnTheSplit) {
  ModelConfig config{.vocabulary = 256,
                     .width = 64,
                     .layers = 2,
                     .heads = 4,
                     .kv_heads = 4,
                     .head_dim = 16,
                     .ffn_width = 172,
                     .sequence = 8,
                     .tied_head = false};
  const auto initial = [&](int processes) {
    StepResult result;
    std::mutex mutex;
    run_world(processes, [&](Communicator& tensor) {
      Transformer<float> model(config, tensor, 1234, 1);
      gather(model, tensor, result, mutex);
    });
    return result.weights;
  };
  const naive::Weights whole = initial(1);
  EXPECT_EQ(whole, initial(2));
  EXPECT_EQ(whole, initial(4));
  for (const ParameterInfo& info : parameter_table(config)) {
    const auto& w = whole.at(info.name);
    if (info.role == Role::kNorm) {
      EXPECT_THAT(w, testing::Each(1.0));
      continue;
    }
    double squares = 0;
    for (const double v : w) squares += v * v;
    const bool residual = info.role == Role::kOutput || info.role == Role::kDown;
    // 4096 or more draws: their deviation is off by 1.1 % (one sigma) at most; 5 sigma.
    EXPECT_NEAR(std::sqrt(squares / static_cast<double>(w.size())) / (residual ? 0.02 / 2.0 : 0.02), 1.0,
                0.055)
        << info.name;
  }
}

// ---- several tensor processes ----

struct SplitCase {
  const char* name;
  ModelConfig config;
  int processes;
};
std::vector<SplitCase> split_cases() {
  ModelConfig two_tokens = small_config();
  two_tokens.sequence = 2;
  return {{"two", small_config(), 2},     {"four", small_config(), 4},
          {"three", three_config(), 3},   {"grouped", grouped_config(), 2},
          {"untied", untied_config(), 2}, {"untied_four", untied_config(), 4},
          {"two_tokens", two_tokens, 2}};
}

TEST(TensorParallel, EqualsOneProcessInDouble) {
  for (const SplitCase& c : split_cases()) {
    const StepResult one = run_step<double>(c.config, 1, 3),
                     many = run_step<double>(c.config, c.processes, 3);
    EXPECT_EQ(one.weights, many.weights) << c.name;
    EXPECT_NEAR(many.loss / one.loss, 1.0, 1e-12) << c.name;
    for (const auto& [name, gradient] : one.gradients)
      EXPECT_LE(relative_frobenius(many.gradients.at(name), gradient), 1e-12) << c.name << " " << name;
  }
}

TEST(TensorParallel, EqualsOneProcessInFloat) {
  for (const SplitCase& c : split_cases()) {
    const StepResult one = run_step<double>(c.config, 1, 3), many = run_step<float>(c.config, c.processes, 3);
    EXPECT_NEAR(many.loss / one.loss, 1.0, 1e-6) << c.name;
    for (const auto& [name, gradient] : one.gradients)
      EXPECT_LE(relative_frobenius(many.gradients.at(name), gradient), 5e-6) << c.name << " " << name;
  }
}

// What every process holds whole must be the same bits everywhere: losses, and the gradients of the gains.
TEST(TensorParallel, ReplicatedResultsAreBitIdentical) {
  const ModelConfig config = three_config();
  const Batch batch = draw_batch(config, 2);
  std::mutex mutex;
  std::vector<std::vector<float>> replicated;
  run_world(3, [&](Communicator& tensor) {
    Transformer<float> model(config, tensor, 1, 2);
    set_lively_weights(model, tensor);
    const double loss = model.forward_backward(batch.tokens, batch.targets, 2, 0.1, {});
    std::vector<float> mine;
    for (const auto& p : model.parameters()) {
      if (p.info.cut == TensorCut::kNone)
        mine.insert(mine.end(), p.gradient.data, p.gradient.data + p.gradient.cols);
    }
    mine.resize(mine.size() + 2);
    std::memcpy(&mine[mine.size() - 2], &loss, sizeof loss);
    const std::lock_guard lock(mutex);
    replicated.push_back(mine);
  });
  EXPECT_EQ(replicated[0], replicated[1]);
  EXPECT_EQ(replicated[0], replicated[2]);
}

TEST(TensorParallel, LedgerCountsExactlyThePlannedBytes) {
  for (const int processes : {1, 2, 4}) {
    const ModelConfig config = small_config();
    const Batch batch = draw_batch(config, 3);
    run_world(processes, [&](Communicator& tensor) {
      Transformer<float> model(config, tensor, 1, 4);
      const Index before = tensor.ledger().total_sum(tensor.axis(), Purpose::kActivation).payload_bytes;
      EXPECT_EQ(before, 0);
      tensor.ledger().begin_step();
      model.forward_backward(batch.tokens, batch.targets, 3, 1.0, {});
      const TransferTotals moved = tensor.ledger().step_sum(tensor.axis(), Purpose::kActivation);
      EXPECT_EQ(moved.payload_bytes, activation_payload_bytes(config, 3 * config.sequence, processes, 4));
      EXPECT_EQ(moved.calls, 4 * config.layers + 2 + 1);
      EXPECT_EQ(tensor.ledger().step_sum().payload_bytes, moved.payload_bytes);
    });
  }
}

// ---- mutations ----

// Passes everything on to another communicator, except the dropped-th collective: there every process keeps
// its own.
class DroppingCommunicator : public Communicator {
 public:
  DroppingCommunicator(Communicator& real, Index dropped)
      : Communicator(real.process(), real.size(), real.axis(), std::make_shared<Ledger>(), real.deadline()),
        real_(real),
        dropped_(dropped) {}
  std::string_view backend() const override { return "dropping"; }

 private:
  Index do_all_reduce(const Call& call, void* data) override {
    if (calls_++ == dropped_) return 0;
    real_.all_reduce(std::span(static_cast<double*>(data), static_cast<std::size_t>(call.elements)),
                     call.reduction, {call.purpose});
    return 0;
  }
  Index do_all_gather(const Call& call, const void* send, void* receive,
                      std::span<const Index> counts) override {
    const auto own = static_cast<std::size_t>(counts[static_cast<std::size_t>(process())]);
    const std::span<const double> part(static_cast<const double*>(send), own);
    const std::span<double> whole(static_cast<double*>(receive), static_cast<std::size_t>(call.elements));
    if (calls_++ == dropped_) {
      std::ranges::fill(whole, 0.0);
      std::ranges::copy(part, whole.begin() + static_cast<std::ptrdiff_t>(own) * process());
      return 0;
    }
    real_.all_gather(part, whole, counts, {call.purpose});
    return 0;
  }
  // The model uses none of these.
  Index do_reduce_scatter(const Call&, const void*, void*, std::span<const Index>) override { std::abort(); }
  Index do_all_to_all(const Call&, const void*, void*, std::span<const Index>) override { std::abort(); }
  Index do_broadcast(const Call&, void*) override { std::abort(); }
  void do_barrier(const Call&) override { std::abort(); }
  std::unique_ptr<Communicator> do_split(std::span<const int>, std::string) override { std::abort(); }
  Determinism do_set_determinism(Determinism) override { std::abort(); }
  void do_abort(std::string_view reason) override { real_.abort(reason); }

  Communicator& real_;
  Index dropped_;
  Index calls_ = 0;
};

TEST(TensorParallel, DroppingAnySingleCollectiveIsNoticed) {
  for (const ModelConfig& config : {small_config(), untied_config()}) {
    const StepResult one = run_step<double>(config, 1, 2);
    const Index collectives = 4 * config.layers + 2 + 1;
    const auto dropping = [](Index dropped) -> Decorate {
      return [dropped](Communicator& real) -> std::unique_ptr<Communicator> {
        return std::make_unique<DroppingCommunicator>(real, dropped);
      };
    };
    // The decorator itself changes nothing.
    const StepResult intact = run_step<double>(config, 2, 2, dropping(-1));
    EXPECT_LE(std::abs(intact.loss / one.loss - 1), 1e-12);
    EXPECT_LE(largest_gradient_difference(intact, one), 1e-12);
    for (Index dropped = 0; dropped < collectives; ++dropped) {
      const StepResult broken = run_step<double>(config, 2, 2, dropping(dropped));
      const double loss_difference = std::abs(broken.loss / one.loss - 1);
      const double gradient_difference = largest_gradient_difference(broken, one);
      // Nine orders of magnitude above what the comparison with one process allows.
      EXPECT_GT(std::max(loss_difference, gradient_difference), 1e-3)
          << "collective " << dropped << " was dropped";
    }
  }
}

}  // namespace
}  // namespace lowband
