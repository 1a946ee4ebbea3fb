#pragma once

#include "model/model.h"

#include <memory>

namespace lowband {

/// The model on the host.
///
/// Initial values: N(0, 0.02) keyed by (seed, name, global element index), residual projections scaled by
/// 1/sqrt(2 layers), norm gains 1; therefore equal for every T.
template <class Real>
class Transformer final : public Model<Real> {
 public:
  /// Allocates all memory: for micro-batches of up to `max_sequences` and the present compute_threads().
  ///
  /// Collective: all processes of `tensor`, equal arguments.
  /// Ownership: borrows `tensor`.
  /// Throws: InvalidArgument, see validate().
  Transformer(const ModelConfig& config, Communicator& tensor, std::uint64_t seed, Index max_sequences);
  ~Transformer() override;

  const ModelConfig& config() const override;
  std::span<Parameter<Real>> parameters() override;
  void zero_gradients() override;
  double forward_backward(std::span<const std::int32_t> tokens, std::span<const std::int32_t> targets,
                          Index sequences, double gradient_scale,
                          const std::function<void(Index)>& gradient_ready) override;
  double loss(std::span<const std::int32_t> tokens, std::span<const std::int32_t> targets,
              Index sequences) override;
  Index parameter_bytes() const override;
  Index activation_bytes() const override;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace lowband
