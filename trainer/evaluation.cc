#include "trainer/trainer_state.h"

#include <array>

namespace lowband {

template <class Real>
double Trainer<Real>::State::validation_loss() {
  const Timeline::Range range(&timeline, "validation", 0);
  const auto validation_begin = Clock::now();
  const Index wanted = config.validation().sequences();
  const Index count = wanted == 0 ? validation_set->blocks() : wanted;
  const Index per_micro_batch = sequences_per_micro_batch(config), sequence = model_shape.sequence;
  double loss_sum = 0;
  // Sequence i belongs to data-parallel position i mod data_size.
  for (Index next = mesh->data_index(); next < count;) {
    Index rows = 0;
    for (; rows < per_micro_batch && next < count; ++rows, next += mesh->data_size()) {
      const auto offset = static_cast<std::size_t>(rows * sequence),
                 extent = static_cast<std::size_t>(sequence);
      validation_set->block(next, std::span(tokens).subspan(offset, extent),
                            std::span(targets).subspan(offset, extent));
    }
    const auto extent = static_cast<std::size_t>(rows * sequence);
    loss_sum += model->loss(std::span(tokens).first(extent), std::span(targets).first(extent), rows);
  }
  std::array<double, 1> sum{loss_sum / mesh->shape().tensor};
  world.all_reduce<double>(sum, Reduction::kSum, {Purpose::kControl});
  const double loss = sum[0] / static_cast<double>(count * sequence);

  final_validation = loss;
  if (!best_validation || loss < *best_validation) {
    best_validation = loss;
    best_validation_step = step;
  }
  if (record) {
    ValidationRecord line;
    line.set_step(step);
    line.set_loss(loss);
    line.set_tokens(count * sequence);
    line.set_seconds(seconds_since(validation_begin));
    record->write(line);
    say(cat("step ", step, ": validation loss ", loss, " nats per token"));
  }
  return loss;
}

template double Trainer<float>::State::validation_loss();
template double Trainer<double>::State::validation_loss();

}  // namespace lowband
