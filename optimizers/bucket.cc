#include "optimizers/bucket.h"

#include "optimizers/acp_sgd.h"
#include "optimizers/dion.h"
#include "optimizers/dion2.h"
#include "optimizers/galore.h"
#include "optimizers/muon.h"
#include "optimizers/muonbp.h"
#include "optimizers/normuon.h"
#include "optimizers/power_sgd.h"
#include "optimizers/spec_gd.h"
#include "optimizers/spectra.h"
#include "runtime/copy.h"
#include "runtime/linalg.h"
#include "runtime/numbers.h"
#include "runtime/passes.h"

#include <cmath>
#include <functional>
#include <iterator>

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

template <class Predicate>
std::vector<Index> positions(const std::vector<Member>& members, Predicate predicate) {
  std::vector<Index> positions;
  for (std::size_t i = 0; i < members.size(); ++i) {
    if (std::invoke(predicate, members[i])) positions.push_back(static_cast<Index>(i));
  }
  return positions;
}

std::vector<bool> are_matrices(const std::vector<Member>& members) {
  std::vector<bool> flags;
  flags.reserve(members.size());
  for (const Member& member : members) flags.push_back(member.is_matrix);
  return flags;
}

template <class Real>
std::vector<ElementwisePiece> elementwise_pieces(const std::vector<Parameter<Real>>& parameters,
                                                 const std::vector<Index>& elementwise,
                                                 const ShardExchange<Real>& shards) {
  std::vector<ElementwisePiece> pieces;
  for (const Index i : elementwise) {
    const ParameterInfo& info = parameters[at(i)].info;
    const MatrixView<const Real> gradient = shards.gradient(i);
    pieces.push_back({info.name, gradient.elements(), info.role != Role::kNorm, gradient.device});
  }
  return pieces;
}

}  // namespace

template <class Real>
Bucket<Real>::Bucket(ProcessMesh& exchange_mesh, ProcessMesh& update_mesh, Communicator& alone,
                     std::span<const Parameter<Real>> parameters, std::vector<Member> members,
                     const OptimizerOptions& options)
    : mesh_(&exchange_mesh),
      options_(options),
      members_(std::move(members)),
      parameters_(selected(parameters, members_)),
      matrices_(positions(members_, &Member::is_matrix)),
      elementwise_(positions(members_, std::not_fn(&Member::is_matrix))),
      dense_(positions(members_, [](const Member& member) { return member.factor_ranks.empty(); })),
      shards_(exchange_mesh, parameters_, are_matrices(members_)),
      elementwise_optimizer_(make_elementwise<Real>(
          elementwise_kind(options), elementwise_pieces(parameters_, elementwise_, shards_), options)),
      squares_(static_cast<Index>(members_.size()), exchange_mesh.world().device()),
      unusable_(static_cast<Index>(members_.size()), exchange_mesh.world().device()),
      one_(1, exchange_mesh.world().device()) {
  const Buffer<double> one = [] {
    Buffer<double> number(1);
    number[0] = 1;
    return number;
  }();
  copy<double>(one.line(), one_.line());
  if (decides_on_the_host(options.kind) && one_.device() != nullptr)
    unusable_on_host_ = Buffer<std::uint8_t>(unusable_.size());
  find_counted();
  cut_layer_matrices();
  std::vector<DenseTensor> tensors;
  for (const Index i : dense_) tensors.push_back({info(i).name, shards_.gradient(i).elements()});
  if (!dense_rides_along(options)) {
    dense_exchange_.emplace(
        FactorGroups{.replica = &mesh_->replica(), .within_replica = &mesh_->within_replica()},
        std::vector<FactorShape>{}, tensors, FactorExchangeOptions{});
    tensors.clear();
  }
  make_matrix_optimizer(update_mesh, alone, std::move(tensors));
}

// Over D F processes, of which the mean is wanted. Dense gradients: every replica holds them, so replica 0
// speaks for all; likewise tensor position 0 for what the tensor axis does not cut. Compressed ones: there is
// one replica.
template <class Real>
void Bucket<Real>::find_counted() {
  const MeshPosition& position = mesh_->position();
  for (const Index i : dense_) {
    const bool counted_elsewhere = info(i).cut == TensorCut::kNone && position.tensor > 0;
    if (position.replica == 0 && !counted_elsewhere) counted_dense_.push_back(i);
  }
  std::vector<Index> counted = counted_dense_;
  counted.insert(counted.end(), matrices_.begin(), matrices_.end());
  counted_ = Buffer<Index>(std::ssize(counted), mesh_->world().device());
  copy<Index>(MatrixView<const Index>(counted.data(), 1, std::ssize(counted)), counted_.line());
}

template <class Real>
void Bucket<Real>::cut_layer_matrices() {
  const MeshShape& mesh = mesh_->shape();
  for (const Index i : matrices_) {
    views_.emplace_back(info(i), cut_matrix(info(i), mesh), mesh_->position());
    std::ranges::move(cut_matrices(info(i), mesh, members_[at(i)].factor_ranks),
                      std::back_inserter(layer_matrices_));
  }
  pieces_.resize(layer_matrices_.size());
}

template <class Real>
void Bucket<Real>::make_matrix_optimizer(ProcessMesh& update_mesh, Communicator& alone,
                                         std::vector<DenseTensor> riders) {
  const Index rotation = members_.empty() ? 0 : members_.front().parameter;
  const auto make_factored = [&]<class Factored>() {
    auto made = std::make_unique<Factored>(*mesh_, alone, layer_matrices_, riders, options_);
    compressed_ = carrier_ = made.get();
    matrix_optimizer_ = std::move(made);
  };
  switch (options_.kind) {
    case OptimizerKind::kDion:
      return make_factored.template operator()<Dion<Real>>();
    case OptimizerKind::kPowerSgd:
      return make_factored.template operator()<PowerSgd<Real>>();
    case OptimizerKind::kAcpSgd: {
      auto made = std::make_unique<AcpSgd<Real>>(*mesh_, layer_matrices_, options_);
      compressed_ = made.get();
      matrix_optimizer_ = std::move(made);
      return;
    }
    case OptimizerKind::kGalore: {
      auto made = std::make_unique<Galore<Real>>(*mesh_, update_mesh, layer_matrices_, options_);
      compressed_ = made.get();
      matrix_optimizer_ = std::move(made);
      return;
    }
    case OptimizerKind::kMuon:
      matrix_optimizer_ = std::make_unique<Muon<Real>>(update_mesh, layer_matrices_, options_, rotation);
      return;
    case OptimizerKind::kNorMuon:
      matrix_optimizer_ = std::make_unique<NorMuon<Real>>(update_mesh, layer_matrices_, options_, rotation);
      return;
    case OptimizerKind::kMuonBp:
      matrix_optimizer_ = std::make_unique<MuonBp<Real>>(update_mesh, layer_matrices_, options_, rotation);
      return;
    case OptimizerKind::kDion2:
    case OptimizerKind::kNorDion2:
      matrix_optimizer_ = std::make_unique<Dion2<Real>>(update_mesh, layer_matrices_, options_, rotation);
      return;
    case OptimizerKind::kSpecGd:
      matrix_optimizer_ = std::make_unique<SpecGd<Real>>(update_mesh, layer_matrices_, options_, rotation);
      return;
    case OptimizerKind::kSpectra:
      matrix_optimizer_ = std::make_unique<Spectra<Real>>(update_mesh, alone, layer_matrices_, options_);
      return;
    case OptimizerKind::kAdamW:
    case OptimizerKind::kSgd:
    case OptimizerKind::kLion:
      return;
  }
}

template <class Real>
template <class Visit>
void Bucket<Real>::for_each_parameter_of_matrices(Visit visit) {
  std::span<Piece> rest = pieces_;
  for (std::size_t k = 0; k < matrices_.size(); ++k) {
    visit(views_[k], matrices_[k], rest.first(at(views_[k].size())));
    rest = rest.subspan(at(views_[k].size()));
  }
}

template <class Real>
void Bucket<Real>::exchange_gradients(Index step) {
  shards_.reduce_gradients();
  agree_on_usable_gradients();
  for_each_parameter_of_matrices([&](BlockViews<Real>& views, Index i, std::span<Piece> pieces) {
    views.show_gradient(shards_.gradient(i), scratch_, pieces);
    for (Piece& piece : pieces)
      piece.skipped = unusable_on_host_.size() > 0 ? unusable_on_host_.matrix(i, 1, 1) : unusable(i);
  });
  const bool travels = mesh_->replica().size() > 1;  // otherwise the sum is the gradient, where it is
  for (std::size_t k = 0; travels && k < dense_.size(); ++k) {
    const MatrixView<const Real> gradient = shards_.gradient(dense_[k]);
    dense_exchange_ ? dense_exchange_->put_dense(static_cast<Index>(k), gradient)
                    : carrier_->put_rider(static_cast<Index>(k), gradient);
  }
  if (dense_exchange_) dense_exchange_->exchange_left();
  if (compressed_ != nullptr && !factors_wait(options_))
    compressed_->exchange(pieces_, {one_.line(), static_cast<double>(mesh_->shape().shard)}, step);
  for (std::size_t k = 0; travels && k < dense_.size(); ++k) {
    const MatrixView<Real> gradient = shards_.gradient(dense_[k]);
    dense_exchange_ ? dense_exchange_->get_dense(static_cast<Index>(k), gradient)
                    : carrier_->get_rider(static_cast<Index>(k), gradient);
  }
}

template <class Real>
void Bucket<Real>::exchange_factors(MatrixView<const double> clip_scale, Index step) {
  compressed_->exchange(pieces_, {clip_scale, static_cast<double>(mesh_->shape().shard)}, step);
}

template <class Real>
void Bucket<Real>::agree_on_usable_gradients() {
  std::vector<MatrixView<const Real>> gradients;
  for (Index i = 0; i < squares_.size(); ++i) gradients.push_back(shards_.gradient(i));
  usable_sums_of_squares<Real>(gradients, squares_.line());
  find_nan(squares_.line(), unusable_.line());
  mesh_->world().all_reduce(unusable_.span(), Reduction::kMax, {Purpose::kControl});
  if (unusable_on_host_.size() > 0) copy<std::uint8_t>(unusable_.line(), unusable_on_host_.line());
}

template <class Real>
void Bucket<Real>::add_sum_of_squares(bool of_compressed, MatrixView<double> sum) {
  const Index counted =
      of_compressed && compressed_ != nullptr ? counted_.size() : std::ssize(counted_dense_);
  if (mesh_->replica().size() > 1) {
    for (const Index i : counted_dense_) sum_of_squares<Real>(shards_.gradient(i), squares_.matrix(i, 1, 1));
  }
  add_unflagged(counted_.matrix(0, 1, counted), squares_.line(), unusable_.line(),
                std::pow(mesh_->data_size(), 2), sum);
}

template <class Real>
void Bucket<Real>::add_to(GradientSketch& sketch) const {
  if (compressed_ == nullptr) return;
  for (std::size_t l = 0; l < pieces_.size(); ++l) {
    const LayerMatrix& of_piece = layer_matrices_[l];
    unless(pieces_[l].skipped, [&] {
      sketch.add<Real>(of_piece.info.name, pieces_[l].gradient, of_piece.cut.rows_of(mesh_->position()).begin,
                       of_piece.cut.cols_of(mesh_->position()).begin);
    });
  }
}

template <class Real>
typename Bucket<Real>::LaterOutcome Bucket<Real>::update(MatrixView<const double> update_scale,
                                                         const StepInfo& step, Diagnosis<Real>* diagnosis) {
  const Scalar mean_scale{update_scale, static_cast<double>(mesh_->data_size())};
  for (std::size_t k = 0; k < elementwise_.size(); ++k) {
    const Index i = elementwise_[k];
    unless(unusable(i), [&] {
      elementwise_optimizer_->update(static_cast<Index>(k), shards_.gradient(i).line(),
                                     shards_.weight(i).line(), mean_scale, learning_rate(i, step));
    });
  }
  std::function<typename MatrixOptimizer<Real>::Outcome()> of_matrices;
  if (matrix_optimizer_ != nullptr) {
    for_each_parameter_of_matrices([&](BlockViews<Real>& views, Index i, std::span<Piece> pieces) {
      views.show_weight(shards_.weight(i), pieces);
    });
    of_matrices = matrix_optimizer_->update(
        pieces_, compressed_ != nullptr ? Scalar{update_scale} : mean_scale, step, diagnosis);
    for_each_parameter_of_matrices([&](BlockViews<Real>& views, Index i, std::span<Piece> pieces) {
      views.put_weight(shards_.weight(i), pieces);
    });
  }
  return [unusable = Arriving<std::uint8_t>(unusable_.line()), elementwise = elementwise_,
          matrices = matrices_, of_matrices = std::move(of_matrices)] {
    Outcome outcome;
    for (const Index i : elementwise) outcome.skipped_other += unusable.get()[at(i)];
    for (const Index i : matrices) outcome.skipped_matrices += unusable.get()[at(i)];
    if (!of_matrices) return outcome;
    const auto found = of_matrices();
    outcome.dead_columns = found.dead_columns;
    outcome.householder_fallbacks = found.householder_fallbacks;
    return outcome;
  };
}

// Lion's step has the same size in every element. For the head that size falls with the square root of its
// fan-in, as in the public Dion code (its issue 94), whose rates of matrices and head are then comparable.
template <class Real>
double Bucket<Real>::learning_rate(Index i, const StepInfo& step) const {
  if (is_layer_matrix(info(i).role)) return step.learning_rate;
  const bool lion_beside_matrices =
      matrix_optimizer_ != nullptr && options_.scalar_optimizer == ElementwiseKind::kLion;
  if (!lion_beside_matrices || info(i).role != Role::kHead) return step.scalar_learning_rate;
  return step.scalar_learning_rate / std::sqrt(static_cast<double>(info(i).cols));
}

template <class Real>
std::vector<StateTensor<Real>> Bucket<Real>::matrix_state() {
  std::vector<StateTensor<Real>> tensors;
  if (matrix_optimizer_ == nullptr) return tensors;
  for (Index k = 0; k < matrix_optimizer_->size(); ++k) {
    for (StateTensor<Real>& tensor : matrix_optimizer_->state(k)) tensors.push_back(std::move(tensor));
  }
  return tensors;
}

template class Bucket<float>;
template class Bucket<double>;

}  // namespace lowband
