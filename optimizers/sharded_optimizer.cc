#include "optimizers/sharded_optimizer.h"

#include "runtime/copy.h"
#include "runtime/numbers.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

namespace lowband {
namespace {

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

constexpr double kNoLimit = std::numeric_limits<double>::infinity();

}  // namespace

template <class Real>
ShardedOptimizer<Real>::ShardedOptimizer(ProcessMesh& mesh, std::span<Parameter<Real>> parameters,
                                         const RankProfile& profile, const OptimizerOptions& options)
    : mesh_(&mesh),
      parameters_(parameters),
      options_((validate(options), options)),
      stage_of_(parameters.size()),
      announced_(parameters.size()) {
  std::vector<ParameterInfo> infos;
  for (const Parameter<Real>& parameter : parameters) {
    const ParameterInfo& info = infos.emplace_back(parameter.info);
    LB_EXPECTS(info.blocks.empty() || (has_matrix_optimizer(options.kind) && is_layer_matrix(info.role)),
               "blocks of ", info.name, ": found ", info.blocks.ranges.size(),
               ", expected none of what is updated element by element");
    for (const MatrixView<Real>& view : {parameter.weight, parameter.gradient})
      LB_EXPECTS(view.device == mesh.world().device(), "optimizer: weight or gradient of ", info.name,
                 ": found in the memory of ", place_name(view.device), ", expected ",
                 place_name(mesh.world().device()), ", the device of its communicator");
  }
  Device* const device = mesh.world().device();
  LB_EXPECTS(device == nullptr || kOnDevices<Real>, "optimizer: found parameters of doubles on ",
             place_name(device), ", expected float");
  const Ranks ranks =
      exchanges_factors(options.kind) ? ranks_by_parameter(profile, infos) : Ranks(infos.size());
  const bool dion_factors =
      options.kind == OptimizerKind::kDion &&
      std::ranges::any_of(ranks, [](const auto& of_matrices) { return !of_matrices.empty(); });
  LB_EXPECTS(options.clip_estimator != NormEstimator::kTrueNorm || !dion_factors || mesh.shape().replica == 1,
             "optimizer.clip_estimator: found true_norm with factors exchanged between mesh.replica = ",
             mesh.shape().replica,
             " replicas, expected sketch: no process holds the mean gradient whose norm is asked for");
  norm_parts_ = Buffer<double>(
      options.clip_estimator == NormEstimator::kSketch && dion_factors ? 1 + GradientSketch::kBuckets : 1,
      device);
  norm_squares_ = Buffer<double>(3, device);
  norm_and_scale_ = Buffer<double>(2, device);
  clip(kNoLimit, norm_squares_.line(), 1, norm_and_scale_.line());

  Communicator& world = mesh.world();
  if (options.overlap) {
    own_world_ = world.split(0, world.process(), world.axis());
    own_mesh_.emplace(*own_world_, mesh.shape());
  }
  alone_ = exchange_mesh().world().split(world.process(), 0, "process");
  make_buckets(ranks);
  planned_ = PlannedTraffic(infos, ranks, mesh.shape(), options, dtype_of<Real>);
  if (options.overlap) thread_.emplace();
}

template <class Real>
ShardedOptimizer<Real>::~ShardedOptimizer() {
  if (thread_ && !thread_->idle()) own_world_->abort("its caller gave up in the middle of a step");
}

// From the last parameter to the first, as the backward pass completes them.
template <class Real>
void ShardedOptimizer<Real>::make_buckets(const Ranks& ranks) {
  std::vector<Member> members;
  Index elements = 0;
  for (Index i = static_cast<Index>(parameters_.size()) - 1; i >= 0; --i) {
    members.push_back(
        {.parameter = i,
         .is_matrix = has_matrix_optimizer(options_.kind) && is_layer_matrix(parameters_[at(i)].info.role),
         .factor_ranks = ranks[at(i)]});
    stage_of_[at(i)] = static_cast<Index>(stages_.size());
    elements += parameters_[at(i)].info.elements();
    if (i > 0 && !(options_.overlap && elements >= options_.bucket_elements)) continue;
    std::ranges::reverse(members);
    Stage stage;
    stage.bucket =
        std::make_unique<Bucket<Real>>(exchange_mesh(), *mesh_, *alone_, parameters_, members, options_);
    stage.missing = static_cast<Index>(members.size());
    stages_.push_back(std::move(stage));
    members.clear();
    elements = 0;
  }
}

template <class Real>
void ShardedOptimizer<Real>::expect_unannounced(std::string_view call, Index parameter) const {
  LB_EXPECTS(parameter >= 0 && parameter < static_cast<Index>(parameters_.size()), call, ": found ",
             parameter, ", expected a parameter of 0 .. ", static_cast<Index>(parameters_.size()) - 1);
  LB_EXPECTS(!announced_[at(parameter)], call, ": found ", parameters_[at(parameter)].info.name,
             " after it was announced, expected it before, once in a step");
}

template <class Real>
void ShardedOptimizer<Real>::rebind(Index parameter, Real* weight, Real* gradient) {
  expect_unannounced("rebind", parameter);
  parameters_[at(parameter)].weight.data = weight;
  parameters_[at(parameter)].gradient.data = gradient;
  Bucket<Real>& bucket = *stages_[at(stage_of_[at(parameter)])].bucket;
  const auto member = std::ranges::find(bucket.members(), parameter, &Member::parameter);
  bucket.rebind(member - bucket.members().begin(), weight, gradient);
}

template <class Real>
void ShardedOptimizer<Real>::gradient_ready(Index parameter) {
  expect_unannounced("gradient_ready", parameter);
  announced_[at(parameter)] = true;
  --stages_[at(stage_of_[at(parameter)])].missing;
  if (thread_ && (next_step_ || !exchange_follows_the_step(options_.kind)))
    start_announced(next_step_.value_or(0));
}

template <class Real>
void ShardedOptimizer<Real>::start_announced(Index step) {
  for (Stage& stage : stages_) {
    if (stage.missing > 0) return;
    if (stage.started) continue;
    stage.started = true;
    start(stage, "exchange", [bucket = stage.bucket.get(), step] { bucket->exchange_gradients(step); });
  }
}

template <class Real>
void ShardedOptimizer<Real>::start(Stage& stage, std::string_view what, std::function<void()> exchange) {
  Timeline* const timeline = exchange_mesh().world().timeline();
  const std::string name = cat(what, " of bucket ", &stage - stages_.data());
  const auto traced = [timeline, name, exchange = std::move(exchange)] {
    const Timeline::Range range(timeline, name, 0);
    exchange();
  };
  if (thread_) {
    stage.task = thread_->submit(traced);
  } else {
    traced();
  }
}

template <class Real>
void ShardedOptimizer<Real>::wait_for(const Stage& stage) {
  if (!thread_) return;
  const Ledger& ledger = own_world_->ledger();
  const Timeline::Range range(own_world_->timeline(), "wait for the communication thread", 0);
  const double before = ledger.seconds_inside(thread_->id());
  thread_->wait(stage.task);
  waited_seconds_ += ledger.seconds_inside(thread_->id()) - before;
}

template <class Real>
PendingReport ShardedOptimizer<Real>::step(const StepInfo& info) {
  const auto begin = std::chrono::steady_clock::now();
  const Ledger& ledger = mesh_->world().ledger();
  const double caller_before = ledger.seconds_inside(std::this_thread::get_id());
  waited_seconds_ = 0;
  StepReport report;

  LB_EXPECTS(!exchange_follows_the_step(options_.kind) || !stages_.front().started || info.step == next_step_,
             "step: found step ", info.step, " with gradients announced, expected step ",
             next_step_.value_or(0), " after step ", next_step_.value_or(0) - 1);
  for (Stage& stage : stages_) stage.missing = 0;
  start_announced(info.step);
  const bool clips = options_.clip_norm > 0;
  if (clips) find_norm(info.step);
  const MatrixView<const double> clip_scale = norm_and_scale_.matrix(1, 1, 1);  // 1 where nothing clips
  if (Bucket<Real>::factors_wait(options_)) {
    for (Stage& stage : stages_) {
      start(stage, "factors", [bucket = stage.bucket.get(), clip_scale, step = info.step] {
        bucket->exchange_factors(clip_scale, step);
      });
    }
  }

  std::optional<Diagnosis<Real>> diagnosis;
  if (info.diagnose) diagnosis.emplace(*mesh_);
  std::vector<typename Bucket<Real>::LaterOutcome> outcomes;
  for (Stage& stage : stages_) {
    wait_for(stage);
    outcomes.push_back(stage.bucket->update(clip_scale, info, diagnosis ? &*diagnosis : nullptr));
    start(stage, "weights", [bucket = stage.bucket.get()] { bucket->gather_weights(); });
  }
  if (!clips) find_norm(info.step);
  if (diagnosis) diagnose(report, *diagnosis);
  for (Stage& stage : stages_) {
    wait_for(stage);
    stage.started = false;
    stage.missing = static_cast<Index>(stage.bucket->members().size());
  }
  announced_.assign(announced_.size(), false);
  next_step_ = info.step + 1;

  // Of the caller all; of the thread also what ran before the step began, beside the backward pass.
  const double caller_seconds = ledger.seconds_inside(std::this_thread::get_id()) - caller_before;
  const double thread_seconds = thread_ ? ledger.seconds_inside(thread_->id()) : 0;
  report.communication_seconds = caller_seconds + thread_seconds - reported_seconds_;
  report.exposed_seconds = caller_seconds + waited_seconds_;
  reported_seconds_ = thread_seconds;
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();

  const Arriving<double> norm_and_scale(norm_and_scale_.line());  // the last to arrive
  const auto over = [norm_and_scale] { return norm_and_scale.over(); };
  PendingReport pending(
      std::move(report), over,
      [mesh = &exchange_mesh(), norm_and_scale, outcomes = std::move(outcomes)](StepReport& found) {
        found.gradient_norm = norm_and_scale.get()[0];
        mesh->throw_if_broken();
        found.clip_scale = norm_and_scale.get()[1];
        for (const auto& of_bucket : outcomes) {
          const auto outcome = of_bucket();
          found.skipped_matrices += outcome.skipped_matrices;
          found.skipped_other += outcome.skipped_other;
          found.dead_columns += outcome.dead_columns;
          found.householder_fallbacks += outcome.householder_fallbacks;
        }
      });
  if (mesh_->world().device() == nullptr) pending.get();
  return pending;
}

// In the order of parameters, while buckets go from the last to the first.
template <class Real>
void ShardedOptimizer<Real>::diagnose(StepReport& report, Diagnosis<Real>& diagnosis) const {
  const std::vector<MatrixDiagnostics> found = diagnosis.finish();
  auto next = found.begin();
  for (const Stage& stage : stages_) {
    const auto end = next + stage.bucket->diagnosed_matrices();
    report.diagnostics.insert(report.diagnostics.begin(), next, end);
    next = end;
  }
}

// The square of the norm of the mean gradient, from one sum over all processes, formed bucket by bucket while
// later ones are exchanged:
//   dense:    what every process adds for its pieces
//   matrices: PowerSGD and its relatives apply P R^T, whose norm everybody knows. For Dion sketches add over
//             pieces and replicas to the sketch of D F mean G; the exact norm, where there is one replica,
//             adds over pieces.
template <class Real>
void ShardedOptimizer<Real>::find_norm(Index step) {
  const bool sketches = norm_parts_.size() > 1;
  const MatrixView<double> exact = norm_parts_.matrix(0, 1, 1),
                           buckets = norm_parts_.matrix(1, 1, norm_parts_.size() - 1);
  const auto square_of = [&](Index k) { return norm_squares_.matrix(k, 1, 1); };
  zero(norm_parts_.line());
  zero(norm_squares_.line());
  std::optional<GradientSketch> sketch;
  if (sketches) sketch.emplace(buckets, options_.seed, step);
  for (const Stage& stage : stages_) {
    wait_for(stage);
    if (sketch) stage.bucket->add_to(*sketch);
    stage.bucket->add_sum_of_squares(options_.kind == OptimizerKind::kDion && !sketches, exact);
    if (exchanges_factors(options_.kind) && options_.kind != OptimizerKind::kDion)
      stage.bucket->add_decompressed_sum_of_squares(square_of(1));
  }
  mesh_->world().all_reduce(norm_parts_.span(), Reduction::kSum, {Purpose::kControl});
  copy<double>(exact, square_of(0));
  if (sketches) add_squares(buckets, square_of(2));
  const double limit = options_.clip_norm > 0 ? options_.clip_norm : kNoLimit;
  clip(limit, norm_squares_.line(), std::pow(mesh_->data_size(), 2), norm_and_scale_.line());
}

template <class Real>
std::vector<StateTensor<Real>> ShardedOptimizer<Real>::state() {
  std::vector<StateTensor<Real>> tensors;
  for (const bool matrices : {true, false}) {
    for (auto stage = stages_.rbegin(); stage != stages_.rend(); ++stage) {
      for (StateTensor<Real>& tensor :
           matrices ? stage->bucket->matrix_state() : stage->bucket->elementwise_state())
        tensors.push_back(std::move(tensor));
    }
  }
  return tensors;
}

template <class Real>
Index ShardedOptimizer<Real>::planned_periodic_bytes() const {
  Index elements = 0;
  for (const Stage& stage : stages_) elements += stage.bucket->diagnosed_elements();
  return elements * dtype_bytes(dtype_of<Real>);
}

template class ShardedOptimizer<float>;
template class ShardedOptimizer<double>;

}  // namespace lowband
