#include "optimizers/sharded_optimizer.h"

#include "runtime/linalg.h"

#include <chrono>
#include <cmath>
#include <limits>

namespace lowband {
namespace {

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

/// Positions of the parameters that Dion treats, or of the others.
template <class Real>
std::vector<Index> positions(std::span<const Parameter<Real>> parameters, OptimizerKind kind, bool matrices) {
  std::vector<Index> selected;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const bool is_matrix = kind == OptimizerKind::kDion && is_layer_matrix(parameters[i].info.role);
    if (is_matrix == matrices) selected.push_back(static_cast<Index>(i));
  }
  return selected;
}

std::vector<bool> flags(std::size_t size, const std::vector<Index>& set) {
  std::vector<bool> flags(size);
  for (const Index i : set) flags[at(i)] = true;
  return flags;
}

template <class Real>
std::vector<DionMatrix> dion_matrices(std::span<const Parameter<Real>> parameters,
                                      const std::vector<Index>& matrices, const RankProfile& profile) {
  LB_EXPECTS(profile.matrices.size() == profile.factor_ranks.size(), "rank profile ", profile.name,
             ": found ", profile.factor_ranks.size(), " ranks for ", profile.matrices.size(), " matrices");
  std::map<std::string, Index> factor_ranks;
  for (std::size_t i = 0; i < profile.matrices.size(); ++i)
    factor_ranks[profile.matrices[i].name] = profile.factor_ranks[i];
  std::vector<DionMatrix> definitions;
  for (const Index i : matrices) {
    const ParameterInfo& info = parameters[at(i)].info;
    const auto factor_rank = factor_ranks.find(info.name);
    LB_EXPECTS(factor_rank != factor_ranks.end(), "rank profile ", profile.name, ": found no rank for ",
               info.name, ", expected one for every layer matrix");
    definitions.push_back({info, factor_rank->second});
    factor_ranks.erase(factor_rank);
  }
  LB_EXPECTS(factor_ranks.empty(), "rank profile ", profile.name, ": found a rank for ",
             factor_ranks.begin()->first, ", expected layer matrices of the model only");
  return definitions;
}

template <class Real>
std::vector<typename AdamW<Real>::Parameter> adamw_parameters(std::span<const Parameter<Real>> parameters,
                                                              const std::vector<Index>& dense,
                                                              const DenseExchange<Real>& exchange) {
  std::vector<typename AdamW<Real>::Parameter> pieces;
  for (const Index i : dense) {
    const ParameterInfo& info = parameters[at(i)].info;
    pieces.push_back({info.name, exchange.gradient(i).elements(), info.role != Role::kNorm});
  }
  return pieces;
}

/// Every element and its square are finite.
template <class Real>
bool is_usable_gradient(MatrixView<const Real> gradient) {
  const Real limit = std::sqrt(std::numeric_limits<Real>::max());
  bool usable = true;
  for (const Real g : gradient.flat()) usable &= std::abs(g) <= limit;
  return usable;
}

}  // namespace

template <class Real>
ShardedOptimizer<Real>::ShardedOptimizer(ProcessMesh& mesh, std::span<Parameter<Real>> parameters,
                                         const RankProfile& profile, const OptimizerOptions& options)
    : mesh_(&mesh),
      parameters_(parameters),
      options_((validate(options), options)),
      matrices_(positions<Real>(parameters, options.kind, true)),
      dense_(positions<Real>(parameters, options.kind, false)),
      exchange_(mesh, parameters, flags(parameters.size(), matrices_)),
      adamw_(adamw_parameters<Real>(parameters, dense_, exchange_), options),
      dion_(mesh,
            options.kind == OptimizerKind::kDion ? dion_matrices<Real>(parameters, matrices_, profile)
                                                 : std::vector<DionMatrix>{},
            options),
      norm_parts_(options.clip_estimator == NormEstimator::kSketch && !matrices_.empty()
                      ? 1 + GradientSketch::kBuckets
                      : 1),
      unusable_(static_cast<Index>(parameters.size())),
      pieces_(matrices_.size()) {
  LB_EXPECTS(
      options.clip_estimator != NormEstimator::kTrueNorm || matrices_.empty() || mesh.shape().replica == 1,
      "optimizer.clip_estimator: found true_norm with factors exchanged between mesh.replica = ",
      mesh.shape().replica,
      " replicas, expected sketch: no process holds the mean gradient whose norm is asked for");
}

template <class Real>
StepReport ShardedOptimizer<Real>::step(const StepInfo& info) {
  const auto begin = std::chrono::steady_clock::now();
  StepReport report;
  exchange_.reduce_over_shards();
  agree_on_usable_gradients(report);
  exchange_.reduce_over_replicas();
  report.gradient_norm = gradient_norm(info.step);
  if (options_.clip_norm > 0 && report.gradient_norm > options_.clip_norm)
    report.clip_scale = options_.clip_norm / report.gradient_norm;
  update_dense(info, report.clip_scale);
  update_matrices(info, report.clip_scale, report);
  exchange_.gather_weights();
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return report;
}

template <class Real>
void ShardedOptimizer<Real>::agree_on_usable_gradients(StepReport& report) {
  for (Index i = 0; i < unusable_.size(); ++i)
    unusable_[i] = !is_usable_gradient<Real>(exchange_.gradient(i));
  mesh_->world().all_reduce(unusable_.span(), Reduction::kMax, {Purpose::kControl});
  for (const Index i : matrices_) report.skipped_matrices += unusable_[i];
  for (const Index i : dense_) report.skipped_other += unusable_[i];
}

// ||mean G||^2 = sum over matrices ||mean G||^2 + sum over dense parameters, from one sum over all processes:
//   matrices: sketches add over pieces and replicas to the sketch of D F mean G; the exact norm, where
//   replicas
//             hold equal gradients or there is one, adds over pieces
//   dense:    every replica holds D F mean G already, so replica 0 speaks for all; likewise tensor position 0
//             for parameters that the tensor axis does not cut
template <class Real>
double ShardedOptimizer<Real>::gradient_norm(Index step) {
  const MeshPosition& position = mesh_->position();
  double exact = 0;
  if (position.replica == 0) {
    for (const Index i : dense_) {
      const bool counted_elsewhere = parameters_[at(i)].info.cut == TensorCut::kNone && position.tensor > 0;
      if (is_usable(i) && !counted_elsewhere) exact += sum_of_squares<Real>(exchange_.gradient(i));
    }
  }
  if (sketches()) {
    GradientSketch sketch(norm_parts_.span(1, GradientSketch::kBuckets), options_.seed, step);
    for (const Index i : matrices_) {
      const auto [row, col] = exchange_.matrix_origin(i);
      if (is_usable(i)) sketch.add<Real>(parameters_[at(i)].info.name, exchange_.gradient(i), row, col);
    }
  } else {
    for (const Index i : matrices_) {
      if (is_usable(i)) exact += sum_of_squares<Real>(exchange_.gradient(i));
    }
  }
  norm_parts_[0] = exact;
  mesh_->world().all_reduce(norm_parts_.span(), Reduction::kSum, {Purpose::kControl});
  double squares = norm_parts_[0];
  if (sketches()) squares += estimated_sum_of_squares(norm_parts_.span(1, GradientSketch::kBuckets));
  return std::sqrt(squares) / static_cast<double>(mesh_->data_size());
}

template <class Real>
void ShardedOptimizer<Real>::update_dense(const StepInfo& info, double clip_scale) {
  const Real scale = static_cast<Real>(clip_scale / static_cast<double>(mesh_->data_size()));
  for (std::size_t k = 0; k < dense_.size(); ++k) {
    const Index i = dense_[k];
    if (!is_usable(i)) continue;
    const bool is_matrix = is_layer_matrix(parameters_[at(i)].info.role);
    adamw_.update(static_cast<Index>(k), exchange_.gradient(i).flat(), exchange_.weight(i).flat(), scale,
                  is_matrix ? info.learning_rate : info.scalar_learning_rate);
  }
}

template <class Real>
void ShardedOptimizer<Real>::update_matrices(const StepInfo& info, double clip_scale, StepReport& report) {
  for (std::size_t k = 0; k < matrices_.size(); ++k) {
    const Index i = matrices_[k];
    pieces_[k] = {.gradient = exchange_.gradient(i), .weight = exchange_.weight(i), .skipped = !is_usable(i)};
  }
  const Real scale = static_cast<Real>(clip_scale / static_cast<double>(mesh_->shape().shard));
  dion_.step(pieces_, scale, info, report);
}

template <class Real>
std::vector<StateTensor<Real>> ShardedOptimizer<Real>::state() {
  std::vector<StateTensor<Real>> tensors = dion_.state();
  for (StateTensor<Real>& tensor : adamw_.state()) tensors.push_back(std::move(tensor));
  return tensors;
}

template <class Real>
Index ShardedOptimizer<Real>::planned_factor_bytes() const {
  return dion_.factor_elements() * dtype_bytes(dtype_of<Real>);
}

template <class Real>
Index ShardedOptimizer<Real>::planned_dense_bytes() const {
  return exchange_.dense_elements() * dtype_bytes(dtype_of<Real>);
}

template class ShardedOptimizer<float>;
template class ShardedOptimizer<double>;

}  // namespace lowband
