#include "trainer/replay/replay_account.h"

#include "optimizers/planned_traffic.h"
#include "runtime/json.h"

#include <algorithm>

namespace lowband {
namespace {

std::string json_line(const ReplayLine& line) { return to_json(line) + "\n"; }

}  // namespace

ReplayAccount::ReplayAccount(const ReplayStart& start, const ReplayPlan& plan, const std::string& output) {
  ReplayLine line;
  *line.mutable_start() = start;
  lines_ = json_line(line);
  summary_.set_folder(start.folder());
  summary_.set_output(output);
  summary_.set_optimizer(start.optimizer());
  summary_.set_profile(start.profile());
  summary_.set_replicas(start.replica());
  summary_.set_first_step(start.first_step());
  summary_.set_planned_factor_bytes(start.planned_factor_bytes());
  summary_.set_planned_dense_bytes(start.planned_dense_bytes());
  summary_.set_dense_gradient_bytes(start.dense_gradient_bytes());
  for (std::size_t l = 0; l < plan.profile.matrices.size(); ++l) {
    const ParameterInfo& info = plan.profile.matrices[l];
    ReplaySummary::Matrix& matrix = *summary_.add_matrices();
    matrix.set_name(info.name);
    matrix.set_rows(info.rows);
    matrix.set_cols(info.cols);
    const std::vector<Index> factor_rank{plan.profile.factor_ranks[l]};
    matrix.set_factor_rank(factor_rank.front());
    const PlannedTraffic traffic({&info, 1}, {&factor_rank, 1}, mesh_shape(plan.config),
                                 optimizer_options(plan.config), computed_dtype(plan.config));
    const StepBytes sent = traffic.mean(plan.steps.first, plan.steps.first + plan.steps.count);
    matrix.set_planned_bytes(sent.factor + sent.dense);
  }
}

void ReplayAccount::add(const ReplayStep& step) {
  ReplayLine line;
  *line.mutable_step() = step;
  lines_ += json_line(line);
  summary_.set_steps(summary_.steps() + 1);
  summary_.set_counted_factor_bytes(summary_.counted_factor_bytes() + step.counted_factor_bytes());
  summary_.set_counted_dense_bytes(summary_.counted_dense_bytes() + step.counted_dense_bytes());
  summary_.set_counted_periodic_bytes(summary_.counted_periodic_bytes() + step.counted_periodic_bytes());
  if (step.matrices().empty()) return;
  for (int l = 0; l < step.matrices_size(); ++l) add(step.matrices(l), *summary_.mutable_matrices(l));
  summary_.set_diagnosed_steps(summary_.diagnosed_steps() + 1);
}

void ReplayAccount::add(const ReplayedMatrix& found, ReplaySummary::Matrix& sum) const {
  const double before = static_cast<double>(summary_.diagnosed_steps());
  const double energy = found.captured_energy();
  sum.set_mean_captured_energy((before * sum.mean_captured_energy() + energy) / (before + 1));
  sum.set_least_captured_energy(before == 0 ? energy : std::min(sum.least_captured_energy(), energy));
  sum.set_last_captured_energy(energy);
  sum.set_last_drift(found.drift());
  sum.set_largest_mass_leak(std::max(sum.largest_mass_leak(), found.mass_leak()));
  sum.set_dead_columns(sum.dead_columns() + found.dead_columns());
}

void ReplayAccount::finish(const std::string& weight_hash, double seconds) {
  summary_.set_weight_hash(weight_hash);
  summary_.set_seconds(seconds);
  double elements = 0, energy = 0;
  for (const ReplaySummary::Matrix& matrix : summary_.matrices()) {
    const double size = static_cast<double>(matrix.rows() * matrix.cols());
    elements += size;
    energy += size * matrix.mean_captured_energy();
  }
  if (summary_.diagnosed_steps() > 0) summary_.set_mean_captured_energy(energy / elements);
  ReplayLine line;
  *line.mutable_summary() = summary_;
  lines_ += json_line(line);
}

}  // namespace lowband
