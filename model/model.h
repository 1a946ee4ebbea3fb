#pragma once

#include "collectives/communicator.h"
#include "sharding/parameter.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

namespace lowband {

/// LLaMA-style decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied or untied head.
struct ModelConfig {
  Index vocabulary = 256;
  Index width = 256;
  Index layers = 4;
  Index heads = 8;
  Index kv_heads = 8;
  Index head_dim = 32;
  Index ffn_width = 704;
  Index sequence = 256;  // tokens of one sequence
  double rope_base = 10000.0;
  double norm_epsilon = 1e-5;
  bool tied_head = true;
};

/// Checks every field; throws InvalidArgument, for example
/// "model.heads: found 6, expected a multiple of mesh.tensor = 4".
void validate(const ModelConfig& config, int tensor_processes);

/// Checks a micro-batch; throws InvalidArgument for a wrong size or an id outside the vocabulary.
void validate_batch(const ModelConfig& config, Index max_sequences, std::span<const std::int32_t> tokens,
                    std::span<const std::int32_t> targets, Index sequences);

/// All parameters in a fixed order, with Hugging Face's LLaMA names and shapes. Allocates nothing.
std::vector<ParameterInfo> parameter_table(const ModelConfig& config);

/// Payload bytes of the tensor axis for one micro-batch of `tokens` tokens, forward and backward.
/// (4 layers + 2) all-reduces of tokens x width, and one all-gather of 3 numbers per token and process.
Index activation_payload_bytes(const ModelConfig& config, Index tokens, int tensor_processes,
                               Index element_bytes);

/// The model as one process of a tensor group holds it, wherever it computes.
template <class Real>
class Model {
 public:
  Model() = default;
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;
  virtual ~Model() = default;

  virtual const ModelConfig& config() const = 0;
  /// Contiguous, in the order of parameter_table().
  virtual std::span<Parameter<Real>> parameters() = 0;

  virtual void zero_gradients() = 0;

  /// Adds gradient_scale * d(sum of token losses) to the gradients; returns the sum of token losses (nats).
  ///
  /// `gradient_ready(i)`, which may be empty, is called once for every i in decreasing order, as soon as the
  /// gradient of parameters()[i] is complete for this micro-batch (on a device: enqueued).
  /// Shapes: tokens and targets are (sequences, config.sequence), row-major.
  /// Collective: the tensor group, equal tokens and targets.
  /// Throws: InvalidArgument for a wrong size or an id outside the vocabulary, on all processes, before
  /// anything is sent.
  virtual double forward_backward(std::span<const std::int32_t> tokens, std::span<const std::int32_t> targets,
                                  Index sequences, double gradient_scale,
                                  const std::function<void(Index)>& gradient_ready) = 0;

  /// Sum of token losses (nats) without gradients. Otherwise like `forward_backward`.
  virtual double loss(std::span<const std::int32_t> tokens, std::span<const std::int32_t> targets,
                      Index sequences) = 0;

  /// Bytes of weights (and of copies that products read) and gradients; of all activations and scratch.
  virtual Index parameter_bytes() const = 0;
  virtual Index activation_bytes() const = 0;
};

/// How a model computes where its communicator has a device; not read elsewhere.
struct DeviceModelOptions {
  DType products = DType::kBF16;       // or kF32: of weights and activations in products
  bool recompute_activations = false;  // backward computes each layer once more, from its input
  bool measured_plans = false;         // products by the algorithm that is fastest here, see CudaBlas
};

/// A Transformer, or where `tensor` has a device (collectives/communicator.h) a DeviceTransformer on it.
/// Initial values are the same.
///
/// Collective: all processes of `tensor`, equal arguments. Ownership: borrows `tensor` and its device.
/// Throws: as the constructors of these. Defined for float and double; double not on a device.
template <class Real>
std::unique_ptr<Model<Real>> make_model(const ModelConfig& config, Communicator& tensor, std::uint64_t seed,
                                        Index max_sequences, const DeviceModelOptions& on_device);

}  // namespace lowband
