// The transformer on the device against the host's in double, from the same weights.
#include "collectives/local/local_world.h"
#include "collectives/process_device.h"
#include "model/cuda/device_transformer.h"
#include "model/transformer.h"
#include "runtime/copy.h"
#include "runtime/cuda/kernels.h"
#include "runtime/cuda/stream_device.h"
#include "runtime/random.h"
#include "tests/runtime/cuda/device_checks.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <vector>

namespace lowband {
namespace {

using namespace test;

constexpr ModelConfig kConfig{.vocabulary = 61,
                              .width = 40,
                              .layers = 2,
                              .heads = 4,
                              .kv_heads = 2,
                              .head_dim = 16,
                              .ffn_width = 51,
                              .sequence = 37,
                              .norm_epsilon = 1e-3,
                              .tied_head = true};

struct Batch {
  Index sequences;
  std::vector<std::int32_t> tokens, targets;
};
Batch draw_batch(const ModelConfig& config, Index sequences, std::uint64_t seed) {
  const RandomStream stream(seed, "batch");
  Batch batch{.sequences = sequences, .tokens = {}, .targets = {}};
  for (Index i = 0; i < 2 * sequences * config.sequence; ++i) {
    const auto id = static_cast<std::int32_t>(stream.bits(i) % static_cast<std::uint64_t>(config.vocabulary));
    (i % 2 == 0 ? batch.tokens : batch.targets).push_back(id);
  }
  return batch;
}

// Weights with which every part matters: matrices N(0, 1 / fan-in), gains around 1; of the global element.
std::vector<float> lively(const ParameterInfo& info, const Communicator& tensor, Index rows, Index cols) {
  const MatrixLayout layout(info.rows, info.cols, info.cut, tensor.size(), 1);
  const Index row0 = layout.tensor_rows(tensor.process()).begin;
  const Index col0 = layout.tensor_cols(tensor.process()).begin;
  const RandomStream stream(11, info.name);
  std::vector<float> weight;
  for (Index e = 0; e < rows * cols; ++e) {
    const double z = stream.normal((row0 + e / cols) * info.cols + col0 + e % cols);
    weight.push_back(static_cast<float>(info.role == Role::kNorm        ? 1 + 0.2 * z
                                        : info.role == Role::kEmbedding ? 0.5 * z
                                                                        : z / std::sqrt(info.cols)));
  }
  return weight;
}

std::vector<float> on_host(MatrixView<float> a) {
  const OnHost<float> copy(a);
  return {copy.view().data, copy.view().data + a.elements()};
}

// A device on a stream, as that of a group.
struct OnStream {
  OnStream(Communicator& group, const CudaStream& stream)
      : blas(stream), device(device_on(blas)), scope(group, *device) {}
  CudaBlas blas;
  std::unique_ptr<Device> device;
  DeviceScope scope;
};

// Two micro-batches of different sizes, the gradients of both together.
template <class T>
void check_model(const ModelConfig& config, int processes, KeptActivations kept, double tolerance) {
  run_world(processes, [&](Communicator& tensor) {
    const CudaStream stream;
    Transformer<double> host(config, tensor, 1, 2);
    const OnStream here(tensor, stream);
    DeviceTransformer<T> device(config, tensor, 1, 2, kept);
    expect(host.parameters().size() == device.parameters().size(), "other parameters");
    for (std::size_t i = 0; i < host.parameters().size(); ++i) {
      Parameter<double>& p = host.parameters()[i];
      const Parameter<float>& own = device.parameters()[i];
      expect(p.info.name == own.info.name && p.weight.rows == own.weight.rows &&
                 p.weight.cols == own.weight.cols,
             own.info.name, ": another shape");
      // Initial values are those of the host, rounded.
      std::vector<float> initial(p.weight.data, p.weight.data + p.weight.elements());
      expect_near(on_host(own.weight), initial, 0, own.info.name);
      const std::vector<float> weight = lively(p.info, tensor, p.weight.rows, p.weight.cols);
      std::copy(weight.begin(), weight.end(), p.weight.data);
      copy<float>({weight.data(), p.weight.rows, p.weight.cols}, own.weight);
    }
    std::vector<Index> order;
    for (const Index sequences : {Index{2}, Index{1}}) {
      const Batch batch = draw_batch(config, sequences, static_cast<std::uint64_t>(sequences));
      const double expected = host.forward_backward(batch.tokens, batch.targets, sequences, 0.5, {});
      order.clear();
      const double found = device.forward_backward(batch.tokens, batch.targets, sequences, 0.5,
                                                   [&](Index parameter) { order.push_back(parameter); });
      expect(std::abs(found / expected - 1) <= tolerance, "the loss is ", found, ", expected ", expected);
      expect(device.loss(batch.tokens, batch.targets, sequences) == found,
             "without gradients the loss has other bits");
    }
    const auto count = static_cast<Index>(host.parameters().size());
    expect(static_cast<Index>(order.size()) == count, order.size(), " gradients became ready");
    for (Index i = 0; i < count; ++i)
      expect(order[static_cast<std::size_t>(i)] == count - 1 - i, "gradients became ready out of order");
    // In the norm over the parameter: |found - expected| <= tolerance |expected|.
    for (std::size_t i = 0; i < host.parameters().size(); ++i) {
      const Parameter<double>& p = host.parameters()[i];
      const std::vector<float> found = on_host(device.parameters()[i].gradient);
      double off = 0, all = 0;
      for (Index e = 0; e < p.gradient.elements(); ++e) {
        const double wanted = p.gradient.data[e];
        const double difference = static_cast<double>(found[static_cast<std::size_t>(e)]) - wanted;
        off += difference * difference;
        all += wanted * wanted;
      }
      expect(off <= tolerance * tolerance * all, p.info.name, ": the gradient is off by ",
             std::sqrt(off / all), " of itself, at most ", tolerance);
    }
    device.zero_gradients();
    for (const Parameter<float>& p : device.parameters())
      expect_near(on_host(p.gradient), std::vector<float>(static_cast<std::size_t>(p.gradient.elements())), 0,
                  "a gradient of zero");
  });
}

// Between input and loss some twenty products follow one another, and as many on the way back; the errors of
// their inputs, 2^-24 or 2^-9 of each element at most, have random signs, and weights are lively enough to
// pass them on undamped: sqrt(40) of them, and a factor of some 3 for what softmax and norms add. In float
// the sums, of up to 64 terms, are rounded as often: sqrt(64) roundings more for each.
constexpr double kFloatTolerance = 20 * 0x1p-24 * 8;
constexpr double kHalfTolerance = 20 * 0x1p-9;

void float_model_is_that_of_the_host(const CudaStream&) {
  check_model<float>(kConfig, 1, KeptActivations::kAll, kFloatTolerance);
  ModelConfig untied = kConfig;
  untied.tied_head = false;
  check_model<float>(untied, 1, KeptActivations::kLayerInputs, kFloatTolerance);
}

void float_model_on_two_processes_is_that_of_the_host(const CudaStream&) {
  check_model<float>(kConfig, 2, KeptActivations::kAll, kFloatTolerance);
  check_model<float>(kConfig, 2, KeptActivations::kLayerInputs, kFloatTolerance);
}

void half_model_is_that_of_the_host(const CudaStream&) {
  check_model<BFloat16>(kConfig, 1, KeptActivations::kAll, kHalfTolerance);
  check_model<BFloat16>(kConfig, 2, KeptActivations::kLayerInputs, kHalfTolerance);
}

// What is computed again has the bits that it had.
void computing_layers_again_changes_no_bit(const CudaStream& stream) {
  run_world(1, [&](Communicator& tensor) {
    const OnStream here(tensor, stream);
    std::vector<std::vector<float>> gradients;
    std::vector<Index> bytes;
    for (const KeptActivations kept : {KeptActivations::kAll, KeptActivations::kLayerInputs}) {
      DeviceTransformer<BFloat16> model(kConfig, tensor, 1, 2, kept);
      const Batch batch = draw_batch(kConfig, 2, 3);
      model.forward_backward(batch.tokens, batch.targets, 2, 1, {});
      std::vector<float> all;
      for (const Parameter<float>& p : model.parameters()) {
        for (const float x : on_host(p.gradient)) all.push_back(x);
      }
      gradients.push_back(all);
      bytes.push_back(model.memory().activations);
    }
    expect_near(gradients[1], gradients[0], 0, "gradients");
    expect(bytes[1] < bytes[0], "keeping less takes ", bytes[1], " bytes, keeping all ", bytes[0]);
  });
}

// Enqueued call by call; and first so, then recorded, then replayed for other tokens, weights and scales of
// the gradient: one graph for each number of sequences.
void a_replayed_step_has_the_bits_of_an_enqueued_one(const CudaStream& stream) {
  run_world(1, [&](Communicator& tensor) {
    const OnStream here(tensor, stream);
    std::vector<std::vector<float>> gradients;
    std::vector<std::vector<double>> losses;
    for (const bool replayed : {false, true}) {
      DeviceTransformer<BFloat16> model(kConfig, tensor, 1, 2, KeptActivations::kAll);
      std::function<void(Index)> ready;
      if (!replayed) ready = [](Index) {};
      losses.emplace_back();
      for (std::uint64_t seed = 0; seed < 6; ++seed) {
        const Index sequences = 1 + static_cast<Index>(seed % 2);
        const Batch batch = draw_batch(kConfig, sequences, seed);
        const double scale = 0.25 * static_cast<double>(seed + 1);
        losses.back().push_back(model.forward_backward(batch.tokens, batch.targets, sequences, scale, ready));
        for (const Parameter<float>& p : model.parameters())
          accumulate(-0.01F, p.gradient.data, 1, p.weight.data, nullptr, p.weight.elements(), stream);
      }
      expect(model.graphs() == (replayed ? 2 : 0), model.graphs(), " graphs");
      gradients.emplace_back();
      for (const Parameter<float>& p : model.parameters()) {
        for (const float x : on_host(p.gradient)) gradients.back().push_back(x);
      }
    }
    expect_near(losses[1], losses[0], 0, "losses");
    expect_near(gradients[1], gradients[0], 0, "gradients");
    const double first = losses[0][0], last = losses[0][4];  // of one sequence
    expect(std::abs(first / last - 1) > 0.001, "the weights moved nothing");
  });
}

void what_cannot_be_is_refused(const CudaStream& stream) {
  run_world(1, [&](Communicator& tensor) {
    const OnStream here(tensor, stream);
    const auto refused = [&](const auto& attempt, const std::string& why) {
      try {
        attempt();
      } catch (const InvalidArgument& error) {
        const std::string text = error.what();
        return expect(text.find(why) != std::string::npos, text);
      }
      throw CheckFailed(why);
    };
    ModelConfig odd = kConfig;
    odd.head_dim = 24;
    refused([&] { DeviceTransformer<float>(odd, tensor, 1, 2, KeptActivations::kAll); },
            "model.head_dim: found 24, expected a multiple of 16 up to 128 on a device");
    DeviceTransformer<float> model(kConfig, tensor, 1, 1, KeptActivations::kAll);
    const Batch batch = draw_batch(kConfig, 2, 3);
    refused([&] { model.loss(batch.tokens, batch.targets, 2); }, "sequences: found 2, expected 1 to 1");
    const std::vector<std::int32_t> ids(static_cast<std::size_t>(kConfig.sequence), 61);
    refused([&] { model.loss(ids, ids, 1); }, "tokens[0]: found id 61");
  });
}

constexpr DeviceCheck kChecks[] = {
    {"float_model_is_that_of_the_host", float_model_is_that_of_the_host},
    {"float_model_on_two_processes_is_that_of_the_host", float_model_on_two_processes_is_that_of_the_host},
    {"half_model_is_that_of_the_host", half_model_is_that_of_the_host},
    {"computing_layers_again_changes_no_bit", computing_layers_again_changes_no_bit},
    {"a_replayed_step_has_the_bits_of_an_enqueued_one", a_replayed_step_has_the_bits_of_an_enqueued_one},
    {"what_cannot_be_is_refused", what_cannot_be_is_refused},
};

}  // namespace
}  // namespace lowband

int main() { return lowband::test::run_device_checks(lowband::kChecks); }
