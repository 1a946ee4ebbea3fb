#pragma once

#include "collectives/communicator.h"
#include "sharding/parameter.h"

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

/// The model as one process of a tensor group holds it.
///
/// Initial values: N(0, 0.02) keyed by (seed, name, global element index), residual projections scaled by
/// 1/sqrt(2 layers), norm gains 1; therefore equal for every T.
template <class Real>
class Transformer {
 public:
  /// Allocates all memory: for micro-batches of up to `max_sequences` and the present compute_threads().
  ///
  /// Collective: all processes of `tensor`, equal arguments.
  /// Ownership: borrows `tensor`.
  /// Throws: InvalidArgument, see validate().
  Transformer(const ModelConfig& config, Communicator& tensor, std::uint64_t seed, Index max_sequences);
  ~Transformer();
  Transformer(Transformer&&) noexcept;

  const ModelConfig& config() const;
  std::span<Parameter<Real>> parameters();

  void zero_gradients();

  /// Adds gradient_scale * d(sum of token losses) to the gradients; returns the sum of token losses (nats).
  ///
  /// `gradient_ready(i)`, which may be empty, is called once for every i in decreasing order, as soon as the
  /// gradient of parameters()[i] is complete for this micro-batch.
  /// Shapes: tokens and targets are (sequences, config.sequence), row-major.
  /// Collective: the tensor group, equal tokens and targets.
  /// Throws: InvalidArgument for a wrong size or an id outside the vocabulary, on all processes, before
  /// anything is sent.
  double forward_backward(std::span<const std::int32_t> tokens, std::span<const std::int32_t> targets,
                          Index sequences, double gradient_scale,
                          const std::function<void(Index)>& gradient_ready);

  /// Sum of token losses (nats) without gradients. Otherwise like `forward_backward`.
  double loss(std::span<const std::int32_t> tokens, std::span<const std::int32_t> targets, Index sequences);

  /// Bytes of the weights, and as many again for the gradients; bytes of all activations and scratch.
  Index parameter_bytes() const;
  Index activation_bytes() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace lowband
