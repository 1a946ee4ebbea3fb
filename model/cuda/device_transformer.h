#pragma once

#include "collectives/communicator.h"
#include "model/cuda/device_memory.h"
#include "model/transformer.h"
#include "runtime/cuda/blas.h"
#include "runtime/cuda/matrix.h"
#include "sharding/parameter.h"

#include <functional>
#include <memory>
#include <span>

namespace lowband {

/// A parameter in device memory, as one process holds it: its tensor-axis piece of weight and gradient.
struct DeviceParameter {
  ParameterInfo info;
  DeviceMatrix<float> weight;    // (piece rows, piece cols), contiguous
  DeviceMatrix<float> gradient;  // same shape, contiguous
};

/// `Transformer` on a device. T: BFloat16, or float; the type of weights and activations in products. Master
/// weights, gradients, the residual stream and its gradient, logits and all sums are float.
///
/// Initial values are those of `Transformer<float>` for the same seed.
/// Determinism: the same bits in every run. Stream: that of `blas`. Ranges of the timeline of `tensor`: every
/// phase as it is enqueued, with the bytes of the tensors that it writes; a step that is replayed is one
/// range.
template <class T>
class DeviceTransformer {
 public:
  /// Allocates all memory, for micro-batches of up to `max_sequences`.
  ///
  /// Collective: all processes of `tensor`, equal arguments. Over NCCL it moves device memory; over another
  /// backend copies on the host. A group of one is not called. Ownership: borrows `tensor` and `blas`.
  /// Throws: InvalidArgument, see validate(); and when head_dim is not a multiple of 16 up to 128. CudaError
  /// with the plan, before anything is allocated, when the device has less memory than it needs.
  DeviceTransformer(const ModelConfig& config, Communicator& tensor, std::uint64_t seed, Index max_sequences,
                    KeptActivations kept, CudaBlas& blas);
  ~DeviceTransformer();
  DeviceTransformer(DeviceTransformer&&) noexcept;

  const ModelConfig& config() const;
  std::span<const DeviceParameter> parameters() const;

  /// Enqueued.
  void zero_gradients();

  /// As `Transformer::forward_backward`; `gradient_ready(i)` is called when what completes gradient i is
  /// enqueued. Waits for the loss, once, after backward is enqueued. On one process and without
  /// `gradient_ready` a step becomes one CUDA graph when its number of sequences comes for the second time.
  double forward_backward(std::span<const std::int32_t> tokens, std::span<const std::int32_t> targets,
                          Index sequences, double gradient_scale,
                          const std::function<void(Index)>& gradient_ready);

  /// Sum of token losses (nats) without gradients. Waits for it.
  double loss(std::span<const std::int32_t> tokens, std::span<const std::int32_t> targets, Index sequences);

  /// CUDA graphs recorded so far: at most one for each number of sequences.
  Index graphs() const;

  /// What was allocated on the device: that of plan_device_memory.
  const DeviceMemory& memory() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace lowband
