#pragma once

#include "collectives/communicator.h"
#include "model/cuda/device_memory.h"
#include "model/model.h"
#include "runtime/cuda/blas.h"

#include <memory>

namespace lowband {

/// The model on the device of its communicator. T: BFloat16, or float; the type of weights and activations in
/// products. Master weights, gradients, the residual stream and its gradient, logits and all sums are float.
///
/// Initial values are those of `Transformer<float>` for the same seed.
/// Determinism: the same bits in every run, unless plans are measured. Ranges of the timeline of `tensor`:
/// every phase as it is enqueued, with the bytes of the tensors that it writes; a step that is replayed is
/// one range.
template <class T>
class DeviceTransformer final : public Model<float> {
 public:
  /// Allocates all memory, for micro-batches of up to `max_sequences`.
  ///
  /// Collective: all processes of `tensor`, equal arguments; a group of one is not called. Computes on
  /// `tensor.device()`, in the order of its work. Ownership: borrows `tensor` and the device.
  /// Throws: InvalidArgument, see validate(); when head_dim is not a multiple of 16 up to 128; and when
  /// `tensor` has no CUDA device. CudaError with the plan, before anything is allocated, when the device has
  /// less memory than it needs.
  DeviceTransformer(const ModelConfig& config, Communicator& tensor, std::uint64_t seed, Index max_sequences,
                    KeptActivations kept, PlanChoice plans = PlanChoice::kHeuristic);
  ~DeviceTransformer() override;

  const ModelConfig& config() const override;
  std::span<Parameter<float>> parameters() override;

  /// Enqueued.
  void zero_gradients() override;

  /// `gradient_ready(i)` is called when what completes gradient i is enqueued. Waits for the loss, once,
  /// after backward is enqueued. On one process and without `gradient_ready` a step becomes one CUDA graph
  /// when its number of sequences comes for the second time.
  double forward_backward(std::span<const std::int32_t> tokens, std::span<const std::int32_t> targets,
                          Index sequences, double gradient_scale,
                          const std::function<void(Index)>& gradient_ready) override;
  /// Waits for it.
  double loss(std::span<const std::int32_t> tokens, std::span<const std::int32_t> targets,
              Index sequences) override;

  Index parameter_bytes() const override { return memory().weights + memory().gradients; }
  Index activation_bytes() const override { return memory().activations + memory().workspace; }

  /// CUDA graphs recorded so far: at most one for each number of sequences.
  Index graphs() const;

  /// What was allocated on the device: that of plan_device_memory.
  const DeviceMemory& memory() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace lowband
