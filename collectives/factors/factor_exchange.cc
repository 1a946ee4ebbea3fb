#include "collectives/factors/factor_exchange.h"

#include "collectives/factors/homes.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <utility>

namespace lowband {
namespace {

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

template <class Real>
FactorExchangeOptions checked(const FactorExchangeOptions& options) {
  LB_EXPECTS(options.wire == FactorWire::kAsComputed, "factor exchange: bf16 on the wire is not there yet");
  return options;
}

template <class Real>
typename FactorRows<Real>::Shape left_shape(const FactorShape& shape, int home) {
  return {shape.name, shape.left_rows, shape.factor_rank, shape.across_b, home};
}

template <class Real>
std::vector<typename FactorRows<Real>::Shape> right_shapes(const std::vector<FactorShape>& shapes) {
  std::vector<typename FactorRows<Real>::Shape> rows;
  rows.reserve(shapes.size());
  for (const FactorShape& shape : shapes)
    rows.push_back({shape.name, shape.right_rows, shape.factor_rank, shape.across_a});
  return rows;
}

// A process knows its own rows of P only; those that the processes of a replica own are all rows of P.
template <class Real>
std::vector<int> find_homes(const FactorGroups& groups, const std::vector<FactorShape>& shapes) {
  Communicator& within = *groups.within_replica;
  std::vector<Index> own{groups.replica->process()};
  for (const FactorShape& shape : shapes) own.push_back(left_shape<Real>(shape, 0).owned_rows());
  std::vector<Index> all(own.size() * at(within.size()));
  within.all_gather<Index>(own, all, std::vector<Index>(at(within.size()), static_cast<Index>(own.size())),
                           {Purpose::kControl});

  std::vector<LeftExtent> factors(shapes.size());
  for (int p = 0; p < within.size(); ++p) {
    const Index* const told = all.data() + at(p) * own.size();
    LB_EXPECTS(told[0] == own[0], "factor exchange: process ", p, " of axis ", within.axis(),
               " is in replica ", told[0], ", expected ", own[0], ", the replica of process ",
               within.process());
    for (std::size_t i = 0; i < shapes.size(); ++i) factors[i].rows += told[1 + i];
  }
  for (std::size_t i = 0; i < shapes.size(); ++i) factors[i].factor_rank = shapes[i].factor_rank;
  return choose_homes(factors, groups.replica->size());
}

std::vector<Index> offsets_of(const std::vector<DenseTensor>& dense) {
  std::vector<Index> offsets{0};
  for (const DenseTensor& tensor : dense) offsets.push_back(offsets.back() + tensor.elements);
  return offsets;
}

template <class Real>
FactorRows<Real> make_left(const std::vector<FactorShape>& shapes, const std::vector<int>& homes,
                           int replicas) {
  std::vector<typename FactorRows<Real>::Shape> rows;
  for (std::size_t i = 0; i < shapes.size(); ++i) rows.push_back(left_shape<Real>(shapes[i], homes[i]));
  return FactorRows<Real>(std::move(rows), std::vector<Index>(at(replicas)));
}

std::vector<Index> matrices_at(const std::vector<int>& homes, int home) {
  std::vector<Index> matrices;
  for (std::size_t i = 0; i < homes.size(); ++i) {
    if (homes[i] == home) matrices.push_back(static_cast<Index>(i));
  }
  return matrices;
}

template <class Real>
std::vector<MatrixView<Real>> owned_rows(FactorRows<Real>& factor, const std::vector<Index>& matrices) {
  std::vector<MatrixView<Real>> blocks;
  for (const Index i : matrices) blocks.push_back(factor.owned(i));
  return blocks;
}

std::vector<Index> even_counts(Index elements, int parts) {
  std::vector<Index> counts;
  for (Index p = 0; p < parts; ++p) counts.push_back(elements * (p + 1) / parts - elements * p / parts);
  return counts;
}

/// Adds the time until the end of the scope to `seconds`.
class Stopwatch {
 public:
  explicit Stopwatch(double& seconds) : seconds_(seconds) {}
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;
  ~Stopwatch() {
    seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  }

 private:
  double& seconds_;
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

}  // namespace

template <class Real>
FactorExchange<Real>::FactorExchange(const FactorGroups& groups, std::vector<FactorShape> shapes,
                                     std::vector<DenseTensor> dense, const FactorExchangeOptions& options)
    : groups_(groups),
      options_(checked<Real>(options)),
      homes_(find_homes<Real>(groups, shapes)),
      dense_tensors_(std::move(dense)),
      dense_offsets_(offsets_of(dense_tensors_)),
      left_(make_left<Real>(shapes, homes_, groups.replica->size())),
      right_(right_shapes<Real>(shapes)),
      at_home_(matrices_at(homes_, groups.replica->process())),
      orthonormaliser_(*groups.within_replica, owned_rows(left_, at_home_)) {
  const int replicas = groups.replica->size();
  if (options.keep_own_right && replicas > 1) own_right_.emplace(right_shapes<Real>(shapes));
  even_counts_ = even_counts(static_cast<Index>(right_.all_owned().size()), replicas);

  outcome_places_.offset_of.resize(shapes.size());
  Index bytes = 0;
  for (int home = 0; home < replicas; ++home) {
    const Index begin = bytes;
    for (const Index i : matrices_at(homes_, home)) {
      outcome_places_.offset_of[at(i)] = bytes;
      bytes += 1 + shapes[at(i)].factor_rank;
    }
    outcome_places_.counts.push_back(bytes - begin);
  }
  outcomes_ = Buffer<std::uint8_t>(bytes);

  for (const DenseTensor& tensor : dense_tensors_) dense_shares_.push_back({tensor.name, tensor.elements});
  dense_ = Buffer<Real>(dense_offsets_.back());
  dense_slices_.push_back(dense_.span());

  norm_offsets_.push_back(0);
  for (const FactorShape& shape : shapes) norm_offsets_.push_back(norm_offsets_.back() + shape.factor_rank);
  norms_ = Buffer<double>(norm_offsets_.back());
}

template <class Real>
MatrixView<const Real> FactorExchange<Real>::own_right(Index i) {
  LB_EXPECTS(options_.keep_own_right, "factor exchange: own_right(", i, ") without keep_own_right");
  return own_right_ ? own_right_->piece(i) : right_.piece(i);
}

template <class Real>
void FactorExchange<Real>::put_dense(Index k, std::span<const Real> values) {
  std::ranges::copy(values, dense_.data() + dense_offsets_[at(k)]);
}

template <class Real>
void FactorExchange<Real>::get_dense(Index k, std::span<Real> values) const {
  std::copy_n(dense_.data() + dense_offsets_[at(k)], values.size(), values.begin());
}

template <class Real>
void FactorExchange<Real>::exchange_left() {
  {
    const Stopwatch time(times_.within_replica);
    left_.reduce_scatter();
  }
  reduce_left();
  orthonormalise();
  gather_left();
  const Stopwatch time(times_.within_replica);
  left_.all_gather();
}

// The home keeps the sum over replicas where the mean was promised: orth(c P) = orth(P) for every c > 0.
template <class Real>
void FactorExchange<Real>::reduce_left() {
  const Stopwatch time(times_.reduce_scatter);
  Communicator& replica = *groups_.replica;
  if (dense_.size() > 0) replica.all_reduce(dense_.span(), Reduction::kSum, {Purpose::kDense, dense_shares_});
  replica.reduce_scatter(std::span<const Real>(left_.all_owned()), left_.part(replica.process()),
                         left_.part_elements(), Reduction::kSum, {Purpose::kFactor, left_.owned_shares()});
}

template <class Real>
void FactorExchange<Real>::orthonormalise() {
  const Stopwatch time(times_.orthonormalise);
  const Timeline::Range range(timeline(), "orthonormalise", 0);
  orthonormaliser_.run();
  for (std::size_t k = 0; k < at_home_.size(); ++k) {
    std::uint8_t* const outcome = outcomes_.data() + outcome_places_.offset_of[at(at_home_[k])];
    outcome[0] = static_cast<std::uint8_t>(orthonormaliser_.factorisation(static_cast<Index>(k)));
    std::ranges::copy(orthonormaliser_.dead(static_cast<Index>(k)), outcome + 1);
  }
}

template <class Real>
void FactorExchange<Real>::gather_left() {
  const Stopwatch time(times_.all_gather);
  Communicator& replica = *groups_.replica;
  const std::vector<Index>& counts = outcome_places_.counts;
  if (replica.size() > 1) {
    const auto own = counts.begin() + replica.process();
    replica.all_gather(std::as_const(outcomes_).span(std::accumulate(counts.begin(), own, Index{0}), *own),
                       outcomes_.span(), std::span<const Index>(counts), {Purpose::kControl});
  }
  replica.all_gather(std::span<const Real>(left_.part(replica.process())), left_.all_owned(),
                     left_.part_elements(),
                     {.purpose = Purpose::kFactor, .shares = left_.owned_shares(), .second_half = true});
}

template <class Real>
void FactorExchange<Real>::exchange_right() {
  {
    const Stopwatch time(times_.within_replica);
    right_.reduce_scatter();
  }
  if (own_right_) {
    const Stopwatch time(times_.pack);
    const Timeline::Range range(timeline(), "pack", static_cast<Index>(right_.all_owned().size_bytes()));
    std::ranges::copy(right_.all_owned(), own_right_->all_owned().begin());
  }
  average_right();
  finish_right();
  const Stopwatch time(times_.within_replica);
  if (groups_.within_replica->size() > 1)
    groups_.within_replica->all_reduce(norms_.span(), Reduction::kSum, {Purpose::kControl});
  for (double& x : norms_.span()) x = std::sqrt(x);
  right_.all_gather();
  if (own_right_) own_right_->all_gather();
}

// Owned rows <- sum over replicas, in even parts whatever matrix they belong to.
template <class Real>
void FactorExchange<Real>::average_right() {
  Communicator& replica = *groups_.replica;
  const std::span<Real> all = right_.all_owned();
  const auto own = even_counts_.begin() + replica.process();
  const std::span<Real> part =
      all.subspan(at(std::accumulate(even_counts_.begin(), own, Index{0})), at(*own));
  {
    const Stopwatch time(times_.reduce_scatter);
    replica.reduce_scatter(std::span<const Real>(all), part, std::span<const Index>(even_counts_),
                           Reduction::kSum, {Purpose::kFactor, right_.owned_shares()});
  }
  const Stopwatch time(times_.all_gather);
  replica.all_gather(std::span<const Real>(part), all, std::span<const Index>(even_counts_),
                     {.purpose = Purpose::kFactor, .shares = right_.owned_shares(), .second_half = true});
}

// R <- sum / D ;  norms_j <- squares of the owned rows of column j
template <class Real>
void FactorExchange<Real>::finish_right() {
  const Stopwatch time(times_.unpack);
  const Timeline::Range range(timeline(), "unpack", static_cast<Index>(right_.all_owned().size_bytes()));
  const Real replicas = static_cast<Real>(groups_.replica->size());
  norms_.fill(0);
  for (std::size_t i = 0; i < homes_.size(); ++i) {
    const MatrixView<Real> r = right_.owned(static_cast<Index>(i));
    double* const squares = norms_.data() + norm_offsets_[i];
    for (Index row = 0; row < r.rows; ++row) {
      for (Index j = 0; j < r.cols; ++j) {
        r(row, j) /= replicas;
        const double x = static_cast<double>(r(row, j));
        squares[j] += x * x;
      }
    }
  }
}

template <class Real>
Factorisation FactorExchange<Real>::factorisation(Index i) const {
  return static_cast<Factorisation>(outcomes_[outcome_places_.offset_of[at(i)]]);
}

template <class Real>
std::span<const std::uint8_t> FactorExchange<Real>::dead(Index i) const {
  const Index rank_elements = norm_offsets_[at(i) + 1] - norm_offsets_[at(i)];
  return outcomes_.span(outcome_places_.offset_of[at(i)] + 1, rank_elements);
}

template <class Real>
std::span<const double> FactorExchange<Real>::right_norms(Index i) const {
  const Index begin = norm_offsets_[at(i)];
  return norms_.span(begin, norm_offsets_[at(i) + 1] - begin);
}

template class FactorExchange<float>;
template class FactorExchange<double>;

}  // namespace lowband
