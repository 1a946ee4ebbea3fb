#include "collectives/agreement.h"
#include "runtime/copy.h"
#include "trainer/byte_plan.h"
#include "trainer/config/schedule.h"
#include "trainer/data/content_hash.h"
#include "trainer/trainer_state.h"

#include <array>
#include <cmath>
#include <functional>

#include <google/protobuf/text_format.h>

namespace lowband {
namespace {

/// A loss that is not finite for so many steps will not be again. Fewer than the steps between two
/// checkpoints of any sensible run, so that a good one is still there.
constexpr Index kNonFiniteStepsAllowed = 5;

}  // namespace

// With the last micro-batch gradients are complete, and nothing here touches them again: from the moment that
// the optimizer is told they are its own. It is told where it can begin with them: not in a step that is
// recorded, which writes them first.
template <class Real>
double Trainer<Real>::State::accumulate_gradients() {
  const Timeline::Range range(&timeline, "forward_backward", 0);
  const Index per_micro_batch = sequences_per_micro_batch(config), sequence = model_shape.sequence;
  const double gradient_scale = 1.0 / static_cast<double>(sequences_per_process() * sequence);
  model->zero_gradients();
  // Sample numbers count over the whole run, so that the batch of a step does not depend on the layout.
  Index sample = step * config.batch().sequences_per_step() + mesh->data_index() * sequences_per_process();
  double loss_sum = 0;
  for (Index micro_batch = 0; micro_batch < micro_batches_per_step(config); ++micro_batch) {
    for (Index row = 0; row < per_micro_batch; ++row, ++sample) {
      const auto offset = static_cast<std::size_t>(row * sequence),
                 count = static_cast<std::size_t>(sequence);
      train_set->sample(sample, std::span(tokens).subspan(offset, count),
                        std::span(targets).subspan(offset, count));
    }
    std::function<void(Index)> gradient_ready;
    if (config.optimizer().overlap() && micro_batch + 1 == micro_batches_per_step(config) && !dumps_step())
      gradient_ready = [this](Index parameter) { optimizer->gradient_ready(parameter); };
    loss_sum += model->forward_backward(tokens, targets, per_micro_batch, gradient_scale, gradient_ready);
  }
  return loss_sum;
}

template <class Real>
auto Trainer<Real>::State::take_step() -> StepSums {
  const auto step_begin = Clock::now();
  const Timeline::Range range(&timeline, cat("step ", step), 0);
  world.ledger().begin_step(step + 1);
  const double loss_sum = accumulate_gradients();
  StepOutcome outcome;
  outcome.forward_backward_seconds = seconds_since(step_begin);
  if (dumps_step()) dump_gradients();

  const double factor = learning_rate_factor(config.schedule(), step);
  outcome.learning_rate = factor * config.optimizer().learning_rate();
  const Index diagnosed_interval = config.diagnostics().interval_steps();
  const bool diagnose = diagnosed_interval > 0 && (step + 1) % diagnosed_interval == 0;
  {
    const Timeline::Range optimizer_range(&timeline, "optimizer", 0);
    outcome.report =
        optimizer->step({step, outcome.learning_rate, factor * scalar_learning_rate(config), diagnose});
  }
  const StepSums sums = outcome.sums = agree_on_step(loss_sum, diagnose);
  ++step;
  outcome.seconds = seconds_since(step_begin);
  step_seconds += outcome.seconds;
  optimizer_seconds += outcome.report.seconds;
  exchange_seconds += outcome.report.communication_seconds;
  exposed_seconds += outcome.report.exposed_seconds;
  last_loss = sums.loss;
  factor_bytes += sums.factor_bytes;
  dense_bytes += sums.dense_bytes;
  if (progress) show_step(outcome);
  if (record) {
    record_step(outcome);
    if (diagnose) record_diagnostics(outcome.report);
  }
  non_finite_steps = std::isfinite(sums.loss) ? 0 : non_finite_steps + 1;
  if (non_finite_steps == kNonFiniteStepsAllowed) {
    throw AgreedFailure(cat("step ", step, ": found no finite loss for ", non_finite_steps,
                            " steps, expected the run to recover; checkpoints are left as they are, a lower "
                            "optimizer.learning_rate may help"));
  }
  return sums;
}

template <class Real>
void Trainer<Real>::State::dump_gradients() {
  const Timeline::Range range(&timeline, "dump", 0);
  std::string config_text;
  google::protobuf::TextFormat::PrintToString(config, &config_text);
  dump->write(step, optimizer->state(), config_text);
}

template <class Real>
auto Trainer<Real>::State::agree_on_step(double loss_sum, bool diagnosed) -> StepSums {
  // Losses add up over data-parallel processes; the T processes of a tensor group hold the same one. Bytes
  // add up over the processes of a replica, and every replica counts the same. Byte counts are exact in a
  // double (< 2^53).
  const Ledger& ledger = world.ledger();
  const auto counted = [&](Purpose purpose) {
    return static_cast<double>(ledger.step_sum("replica", purpose).payload_bytes);
  };
  double replica_axis_bytes = 0;
  for (const Purpose purpose : kPurposes) replica_axis_bytes += counted(purpose);
  const auto update_bytes =
      static_cast<double>(ledger.step_sum("within_replica", Purpose::kUpdate).payload_bytes);
  const bool stop = session.stop_requested != nullptr && session.stop_requested->load();
  std::array<double, kStepSums> sums{loss_sum / mesh->shape().tensor,
                                     stop ? 1.0 : 0.0,
                                     counted(Purpose::kFactor),
                                     counted(Purpose::kDense),
                                     counted(Purpose::kPeriodic),
                                     replica_axis_bytes,
                                     update_bytes};
  world.all_reduce<double>(sums, Reduction::kSum, {Purpose::kControl});
  const auto of_a_replica = [&](double sum) { return static_cast<Index>(sum) / mesh->shape().replica; };
  const StepSums result{.loss = sums[0] / static_cast<double>(tokens_per_step()),
                        .stop = sums[1] > 0,
                        .factor_bytes = of_a_replica(sums[2]),
                        .dense_bytes = of_a_replica(sums[3]),
                        .periodic_bytes = of_a_replica(sums[4]),
                        .replica_axis_bytes = of_a_replica(sums[5])};
  const auto expect_planned = [&](std::string_view what, Index found, Index planned) {
    if (found == planned) return;
    throw Error(cat("step ", step, ": found ", found, " bytes of ", what, " counted, expected ", planned,
                    " as planned"));
  };
  const StepBytes planned = optimizer->planned().of(step);
  expect_planned("factors", result.factor_bytes, planned.factor);
  expect_planned("dense tensors", result.dense_bytes, planned.dense);
  expect_planned("diagnostics", result.periodic_bytes, diagnosed ? optimizer->planned_periodic_bytes() : 0);
  expect_planned("signs of matrices", static_cast<Index>(sums[6]), world.size() * planned.update);
  return result;
}

template <class Real>
void Trainer<Real>::State::check_replicas_agree() {
  std::uint64_t hash = 0;  // of all weights, each seeded with that of those before it
  for (const auto& parameter : model->parameters()) {
    hash = content_hash(std::as_bytes(OnHost<Real>(parameter.weight).view().flat()), hash);
  }
  // Everybody sees every hash, so that everybody stops, not the processes of the differing piece alone.
  const auto processes = static_cast<std::size_t>(world.size());
  const auto mine = static_cast<Index>(hash);
  std::vector<Index> hashes(processes), ones(processes, 1);
  world.all_gather<Index>({&mine, 1}, hashes, ones, {Purpose::kPeriodic});
  const auto pieces = static_cast<std::size_t>(mesh->within_replica().size());
  for (std::size_t process = pieces; process < processes; ++process) {
    const std::size_t original = process % pieces;  // the process of replica 0 that holds the same piece
    if (hashes[process] == hashes[original]) continue;
    throw Error(cat("replicas differ after step ", step, ": found weight hash ",
                    hash_text(static_cast<std::uint64_t>(hashes[process])), " on process ", process,
                    ", expected ", hash_text(static_cast<std::uint64_t>(hashes[original])), " as on process ",
                    original));
  }
}

template auto Trainer<float>::State::take_step() -> StepSums;
template auto Trainer<double>::State::take_step() -> StepSums;
template void Trainer<float>::State::check_replicas_agree();
template void Trainer<double>::State::check_replicas_agree();

}  // namespace lowband
