#include "collectives/factors/factor_exchange.h"

#include "collectives/factors/homes.h"
#include "runtime/vector_kernels.h"

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
  LB_EXPECTS(options.wire == FactorWire::kAsComputed || (std::is_same_v<Real, float>),
             "factor exchange: wire bf16 with factors in ", dtype_name(dtype_of<Real>), ", expected f32");
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
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    factors[i].factor_rank = shapes[i].factor_rank;
    // Here, where everyone sees it: the orthonormaliser of the home would throw in one replica alone.
    LB_EXPECTS(factors[i].rows >= shapes[i].factor_rank, "factor exchange: factor rank of ", shapes[i].name,
               ": found ", shapes[i].factor_rank, ", expected at most its ", factors[i].rows, " rows");
  }
  return choose_homes(factors, groups.replica->size());
}

std::vector<Index> offsets_of(const std::vector<DenseTensor>& dense) {
  std::vector<Index> offsets{0};
  for (const DenseTensor& tensor : dense) offsets.push_back(offsets.back() + tensor.elements);
  return offsets;
}

/// `riding` dense elements fill what homes lack of factors.
template <class Real>
FactorRows<Real> make_left(const std::vector<FactorShape>& shapes, const std::vector<int>& homes,
                           int replicas, Index riding) {
  std::vector<typename FactorRows<Real>::Shape> rows;
  std::vector<Index> elements(at(replicas));
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    rows.push_back(left_shape<Real>(shapes[i], homes[i]));
    elements[at(homes[i])] += rows.back().owned_rows() * shapes[i].factor_rank;
  }
  return FactorRows<Real>(std::move(rows), fill_up(elements, riding));
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
  blocks.reserve(matrices.size());
  for (const Index i : matrices) blocks.push_back(factor.owned(i));
  return blocks;
}

std::vector<Index> even_counts(Index elements, int parts) {
  std::vector<Index> counts;
  for (Index p = 0; p < parts; ++p) counts.push_back(elements * (p + 1) / parts - elements * p / parts);
  return counts;
}

template <class T>
std::span<T> part_of(std::span<T> all, std::span<const Index> counts, int part) {
  const Index begin = std::accumulate(counts.begin(), counts.begin() + part, Index{0});
  return all.subspan(at(begin), at(counts[at(part)]));
}

/// Calls visit(begin, count) for tiles of at most `tile` of `elements`: a tile that one loop has written is
/// still in the first cache when the next one reads it.
template <class Visit>
void for_each_tile(Index elements, Index tile, Visit visit) {
  for (Index begin = 0; begin < elements; begin += tile) visit(begin, std::min(tile, elements - begin));
}
constexpr Index kTileElements = 2048;  // 8 KiB of float

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
      left_(make_left<Real>(shapes, homes_, groups.replica->size(), rounds() ? 0 : dense_offsets_.back())),
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

  for (const PayloadShare& share : left_.owned_shares()) left_shares_.push_back(share);
  if (rounds()) {
    for (const DenseTensor& tensor : dense_tensors_) dense_shares_.push_back({tensor.name, tensor.elements});
    dense_ = Buffer<Real>(dense_offsets_.back());
    dense_slices_.push_back(dense_.span());
    wire_ =
        Buffer<BFloat16>(static_cast<Index>(std::max(left_.all_owned().size(), right_.all_owned().size())));
  } else {
    for (const DenseTensor& tensor : dense_tensors_)
      left_shares_.push_back({tensor.name, tensor.elements, Purpose::kDense});
    for (int home = 0; home < replicas; ++home) dense_slices_.push_back(left_.guest(home));
  }

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
template <class Visit>
void FactorExchange<Real>::for_each_slice(Index k, Visit visit) const {
  const Index begin = dense_offsets_[at(k)];
  const Index end = dense_offsets_[at(k) + 1];
  Index slice_begin = 0;
  for (const std::span<Real> slice : dense_slices_) {
    const Index slice_end = slice_begin + static_cast<Index>(slice.size());
    const Index first = std::max(begin, slice_begin);
    const Index last = std::min(end, slice_end);
    if (first < last) visit(slice.subspan(at(first - slice_begin), at(last - first)), first - begin);
    slice_begin = slice_end;
  }
}

template <class Real>
void FactorExchange<Real>::put_dense(Index k, std::span<const Real> values) {
  check_dense_size(k, static_cast<Index>(values.size()));
  const Stopwatch time(times_.pack);
  for_each_slice(k, [&](std::span<Real> slice, Index offset) {
    std::ranges::copy(values.subspan(at(offset), slice.size()), slice.begin());
  });
}

template <class Real>
void FactorExchange<Real>::get_dense(Index k, std::span<Real> values) const {
  check_dense_size(k, static_cast<Index>(values.size()));
  for_each_slice(k, [&](std::span<const Real> slice, Index offset) {
    std::ranges::copy(slice, values.begin() + offset);
  });
}

template <class Real>
void FactorExchange<Real>::check_dense_size(Index k, Index elements) const {
  const Index expected = dense_offsets_[at(k) + 1] - dense_offsets_[at(k)];
  LB_EXPECTS(elements == expected, "factor exchange: ", dense_tensors_[at(k)].name, " has ", elements,
             " elements, expected ", expected);
}

// The home orthonormalises the sum over replicas where the mean was promised: orth(c P) = orth(P) for c > 0.
template <class Real>
void FactorExchange<Real>::exchange_left() {
  {
    const Stopwatch time(times_.within_replica);
    left_.reduce_scatter();
  }
  sum_dense();
  reduce(left_.all_owned(), left_.part_elements(), left_shares_);
  orthonormalise();
  share_outcomes();
  gather(left_.all_owned(), left_.part_elements(), left_shares_);
  if (rounds()) {
    const Stopwatch time(times_.unpack);
    const Timeline::Range range(timeline(), "unpack", static_cast<Index>(left_.all_owned().size_bytes()));
    vector_kernels<Real>().widen_bf16(wire_.data(), left_.all_owned().data(),
                                      static_cast<Index>(left_.all_owned().size()));
  }
  const Stopwatch time(times_.within_replica);
  left_.all_gather();
}

template <class Real>
void FactorExchange<Real>::sum_dense() {
  if (dense_.size() == 0) return;
  const Stopwatch time(times_.reduce_scatter);
  groups_.replica->all_reduce(dense_.span(), Reduction::kSum, {Purpose::kDense, dense_shares_});
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
void FactorExchange<Real>::share_outcomes() {
  Communicator& replica = *groups_.replica;
  if (replica.size() == 1) return;
  const Stopwatch time(times_.all_gather);
  const std::span<const Index> counts = outcome_places_.counts;
  replica.all_gather(std::span<const std::uint8_t>(part_of(outcomes_.span(), counts, replica.process())),
                     outcomes_.span(), counts, {Purpose::kControl});
}

template <class Real>
void FactorExchange<Real>::exchange_right() {
  {
    const Stopwatch time(times_.within_replica);
    right_.reduce_scatter();
  }
  const std::span<const Index> counts = even_counts_;  // whatever matrix the elements belong to
  if (own_right_ && !rounds()) keep_what_was_sent();
  reduce(right_.all_owned(), counts, right_.owned_shares());
  if (own_right_ && rounds()) keep_what_was_sent();
  gather(right_.all_owned(), counts, right_.owned_shares());
  if (own_right_ && rounds()) keep_rounding_error();
  finish_right();

  const Stopwatch time(times_.within_replica);
  if (groups_.within_replica->size() > 1)
    groups_.within_replica->all_reduce(norms_.span(), Reduction::kSum, {Purpose::kControl});
  for (double& x : norms_.span()) x = std::sqrt(x);
  right_.all_gather();
  if (own_right_) own_right_->all_gather();
}

// Afterwards this replica's part of `all` holds the sum.
template <class Real>
void FactorExchange<Real>::reduce(std::span<Real> all, std::span<const Index> counts,
                                  std::span<const PayloadShare> shares) {
  Communicator& replica = *groups_.replica;
  const std::span<Real> part = part_of(all, counts, replica.process());
  if constexpr (kCanRound) {
    if (rounds()) {
      const std::span<BFloat16> wire = wire_.span(0, static_cast<Index>(all.size()));
      {
        const Stopwatch time(times_.pack);
        const Timeline::Range range(timeline(), "pack", static_cast<Index>(all.size_bytes()));
        vector_kernels<Real>().round_to_bf16(all.data(), wire.data(), static_cast<Index>(all.size()));
      }
      const Stopwatch time(times_.reduce_scatter);
      replica.reduce_scatter(std::span<const BFloat16>(wire), part, counts, Reduction::kSum,
                             {Purpose::kFactor, shares});
      return;
    }
  }
  const Stopwatch time(times_.reduce_scatter);
  replica.reduce_scatter(std::span<const Real>(all), part, counts, Reduction::kSum,
                         {Purpose::kFactor, shares});
}

// Sends this replica's part of `all` to the others. With a rounded wire `all` keeps the exact part, and the
// rounded whole, which everyone is to use, the home included, lies in wire_.
template <class Real>
void FactorExchange<Real>::gather(std::span<Real> all, std::span<const Index> counts,
                                  std::span<const PayloadShare> shares) {
  Communicator& replica = *groups_.replica;
  const Tag tag{.purpose = Purpose::kFactor, .shares = shares, .second_half = true};
  const std::span<Real> part = part_of(all, counts, replica.process());
  if (rounds()) {
    const std::span<BFloat16> wire = wire_.span(0, static_cast<Index>(all.size()));
    const std::span<BFloat16> rounded = part_of(wire, counts, replica.process());
    {
      const Stopwatch time(times_.pack);
      const Timeline::Range range(timeline(), "pack", static_cast<Index>(part.size_bytes()));
      vector_kernels<Real>().round_to_bf16(part.data(), rounded.data(), static_cast<Index>(part.size()));
    }
    const Stopwatch time(times_.all_gather);
    replica.all_gather(std::span<const BFloat16>(rounded), wire, counts, tag);
    return;
  }
  const Stopwatch time(times_.all_gather);
  replica.all_gather(std::span<const Real>(part), all, counts, tag);
}

template <class Real>
void FactorExchange<Real>::keep_what_was_sent() {
  const Stopwatch time(times_.pack);
  const std::span<Real> own = own_right_->all_owned();
  const Timeline::Range range(timeline(), "pack", static_cast<Index>(own.size_bytes()));
  if (rounds()) {
    vector_kernels<Real>().widen_bf16(wire_.data(), own.data(), static_cast<Index>(own.size()));
  } else {
    std::ranges::copy(right_.all_owned(), own.begin());
  }
}

// own <- own + (round(sum) - sum), so that mean own = (1/D) (sum + round(sum) - sum) = R as received.
template <class Real>
void FactorExchange<Real>::keep_rounding_error() {
  if constexpr (kCanRound) {
    const Stopwatch time(times_.pack);
    const int self = groups_.replica->process();
    const std::span<const Index> counts = even_counts_;
    const std::span<Real> own = part_of(own_right_->all_owned(), counts, self);
    const std::span<const Real> sum = part_of(right_.all_owned(), counts, self);
    const std::span<const BFloat16> rounded =
        part_of(wire_.span(0, static_cast<Index>(right_.all_owned().size())), counts, self);
    for (std::size_t e = 0; e < own.size(); ++e) own[e] += to_float(rounded[e]) - sum[e];
  }
}

// R <- sum / D ;  norms_j <- squares of the owned rows of column j
template <class Real>
void FactorExchange<Real>::finish_right() {
  const Stopwatch time(times_.unpack);
  const std::span<Real> all = right_.all_owned();
  const Timeline::Range range(timeline(), "unpack", static_cast<Index>(all.size_bytes()));
  const Real replicas = static_cast<Real>(groups_.replica->size());
  norms_.fill(0);
  for (std::size_t i = 0; i < homes_.size(); ++i) {
    const MatrixView<Real> whole = right_.owned(static_cast<Index>(i));
    double* const squares = norms_.data() + norm_offsets_[i];
    const Index tile_rows = std::max<Index>(1, kTileElements / whole.cols);
    for_each_tile(whole.rows, tile_rows, [&](Index begin, Index count) {
      const MatrixView<Real> r = whole.row_block(begin, count);
      if (rounds())
        vector_kernels<Real>().widen_bf16(wire_.data() + (r.data - all.data()), r.data, r.elements());
      for (Index row = 0; row < r.rows; ++row) {
        for (Index j = 0; j < r.cols; ++j) {
          const Real mean = r(row, j) / replicas;
          r(row, j) = mean;
          squares[j] += static_cast<double>(mean) * static_cast<double>(mean);
        }
      }
    });
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
