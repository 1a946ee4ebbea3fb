#include "optimizers/bucket.h"

#include "optimizers/dion.h"
#include "optimizers/power_sgd.h"
#include "runtime/linalg.h"

#include <cmath>
#include <limits>
#include <type_traits>

namespace lowband {
namespace {

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

template <class Real>
std::vector<Parameter<Real>> selected(std::span<const Parameter<Real>> parameters,
                                      const std::vector<Member>& members) {
  std::vector<Parameter<Real>> selection;
  selection.reserve(members.size());
  for (const Member& member : members) selection.push_back(parameters[at(member.parameter)]);
  return selection;
}

std::vector<Index> positions(const std::vector<Member>& members, bool matrices) {
  std::vector<Index> positions;
  for (std::size_t i = 0; i < members.size(); ++i) {
    if ((members[i].factor_rank > 0) == matrices) positions.push_back(static_cast<Index>(i));
  }
  return positions;
}

std::vector<bool> are_matrices(const std::vector<Member>& members) {
  std::vector<bool> flags;
  flags.reserve(members.size());
  for (const Member& member : members) flags.push_back(member.factor_rank > 0);
  return flags;
}

template <class Real>
std::vector<typename AdamW<Real>::Parameter> adamw_parameters(const std::vector<Parameter<Real>>& parameters,
                                                              const std::vector<Index>& dense,
                                                              const ShardExchange<Real>& shards) {
  std::vector<typename AdamW<Real>::Parameter> pieces;
  for (const Index i : dense) {
    const ParameterInfo& info = parameters[at(i)].info;
    pieces.push_back({info.name, shards.gradient(i).elements(), info.role != Role::kNorm});
  }
  return pieces;
}

/// Every element and its square are finite. Counting in integers as wide as the elements is what compilers
/// make a vector loop of: 1.7 ms for 12.6 million floats instead of 11 with a bool.
template <class Real>
bool is_usable_gradient(MatrixView<const Real> gradient) {
  using Flags = std::conditional_t<sizeof(Real) == 4, std::int32_t, std::int64_t>;
  const Real limit = std::sqrt(std::numeric_limits<Real>::max());
  Flags unusable = 0;
  for (const Real g : gradient.flat()) unusable |= !(std::abs(g) <= limit);
  return unusable == 0;
}

}  // namespace

template <class Real>
Bucket<Real>::Bucket(ProcessMesh& mesh, Communicator& alone, std::span<const Parameter<Real>> parameters,
                     std::vector<Member> members, const OptimizerOptions& options)
    : mesh_(&mesh),
      options_(options),
      members_(std::move(members)),
      parameters_(selected(parameters, members_)),
      matrices_(positions(members_, true)),
      dense_(positions(members_, false)),
      shards_(mesh, parameters_, are_matrices(members_)),
      adamw_(adamw_parameters(parameters_, dense_, shards_), options),
      unusable_(static_cast<Index>(members_.size())),
      pieces_(matrices_.size()) {
  std::vector<LayerMatrix> definitions;
  for (const Index i : matrices_) definitions.push_back({info(i), members_[at(i)].factor_rank});
  std::vector<DenseTensor> tensors;
  for (const Index i : dense_) tensors.push_back({info(i).name, shards_.gradient(i).elements()});
  if (factors_wait(options)) {
    dense_exchange_.emplace(
        FactorGroups{.replica = &mesh.replica(), .within_replica = &mesh.within_replica()},
        std::vector<FactorShape>{}, tensors, FactorExchangeOptions{});
    tensors.clear();
  }
  if (options.kind == OptimizerKind::kPowerSgd) {
    factored_ = std::make_unique<PowerSgd<Real>>(mesh, alone, definitions, tensors, options);
  } else {
    factored_ = std::make_unique<Dion<Real>>(mesh, alone, definitions, tensors, options);
  }
}

template <class Real>
void Bucket<Real>::exchange_gradients() {
  shards_.reduce_gradients();
  agree_on_usable_gradients();
  for (std::size_t k = 0; k < matrices_.size(); ++k) {
    const Index i = matrices_[k];
    pieces_[k] = {.gradient = shards_.gradient(i), .weight = shards_.weight(i), .skipped = !is_usable(i)};
  }
  for (std::size_t k = 0; k < dense_.size(); ++k) {
    const std::span<const Real> gradient = shards_.gradient(dense_[k]).flat();
    dense_exchange_ ? dense_exchange_->put_dense(static_cast<Index>(k), gradient)
                    : factored_->put_rider(static_cast<Index>(k), gradient);
  }
  if (dense_exchange_) {
    dense_exchange_->exchange_left();
  } else {
    factored_->exchange(pieces_, Real{1} / static_cast<Real>(mesh_->shape().shard));
  }
  for (std::size_t k = 0; k < dense_.size(); ++k) {
    const std::span<Real> gradient = shards_.gradient(dense_[k]).flat();
    dense_exchange_ ? dense_exchange_->get_dense(static_cast<Index>(k), gradient)
                    : factored_->get_rider(static_cast<Index>(k), gradient);
  }
}

template <class Real>
void Bucket<Real>::exchange_factors(double clip_scale) {
  factored_->exchange(pieces_, static_cast<Real>(clip_scale / mesh_->shape().shard));
}

template <class Real>
void Bucket<Real>::agree_on_usable_gradients() {
  for (Index i = 0; i < unusable_.size(); ++i) unusable_[i] = !is_usable_gradient<Real>(shards_.gradient(i));
  mesh_->world().all_reduce(unusable_.span(), Reduction::kMax, {Purpose::kControl});
}

// Sums over D F processes, of which the mean is wanted. Dense parameters: every replica holds them, so
// replica 0 speaks for all; likewise tensor position 0 for what the tensor axis does not cut. Matrices: there
// is one replica.
template <class Real>
double Bucket<Real>::sum_of_squares(bool of_matrices) const {
  const MeshPosition& position = mesh_->position();
  double squares = 0;
  if (position.replica == 0) {
    for (const Index i : dense_) {
      const bool counted_elsewhere = info(i).cut == TensorCut::kNone && position.tensor > 0;
      if (is_usable(i) && !counted_elsewhere) squares += lowband::sum_of_squares<Real>(shards_.gradient(i));
    }
  }
  for (const Index i : matrices_) {
    if (of_matrices && is_usable(i)) squares += lowband::sum_of_squares<Real>(shards_.gradient(i));
  }
  return squares / std::pow(mesh_->data_size(), 2);
}

template <class Real>
void Bucket<Real>::add_to(GradientSketch& sketch) const {
  for (const Index i : matrices_) {
    const auto [row, col] = shards_.matrix_origin(i);
    if (is_usable(i)) sketch.add<Real>(info(i).name, shards_.gradient(i), row, col);
  }
}

template <class Real>
typename Bucket<Real>::Outcome Bucket<Real>::update(double update_scale, const StepInfo& step,
                                                    Diagnosis<Real>* diagnosis) {
  Outcome outcome;
  for (std::size_t k = 0; k < dense_.size(); ++k) {
    const Index i = dense_[k];
    outcome.skipped_other += unusable_[i];
    if (!is_usable(i)) continue;
    adamw_.update(static_cast<Index>(k), shards_.gradient(i).flat(), shards_.weight(i).flat(),
                  static_cast<Real>(update_scale / mesh_->data_size()),
                  is_layer_matrix(info(i).role) ? step.learning_rate : step.scalar_learning_rate);
  }
  for (const Index i : matrices_) outcome.skipped_matrices += unusable_[i];
  const auto factored = factored_->update(pieces_, static_cast<Real>(update_scale), step, diagnosis);
  outcome.dead_columns = factored.dead_columns;
  outcome.householder_fallbacks = factored.householder_fallbacks;
  return outcome;
}

template <class Real>
std::vector<StateTensor<Real>> Bucket<Real>::matrix_state() {
  std::vector<StateTensor<Real>> tensors;
  for (Index k = 0; k < factored_->size(); ++k) {
    for (StateTensor<Real>& tensor : factored_->state(k)) tensors.push_back(std::move(tensor));
  }
  return tensors;
}

template <class Real>
Index Bucket<Real>::dense_elements() const {
  Index elements = factored_->dense_elements();
  for (const Index i : dense_)
    elements += info(i).elements() * (info(i).cut == TensorCut::kNone ? mesh_->shape().tensor : 1);
  return elements;
}

template class Bucket<float>;
template class Bucket<double>;

}  // namespace lowband
