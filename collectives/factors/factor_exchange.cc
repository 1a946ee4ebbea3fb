#include "collectives/factors/factor_exchange.h"

#include "collectives/factors/homes.h"
#include "runtime/copy.h"
#include "runtime/passes.h"
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

/// How a matrix was factorised, and for each column whether it is dead: as numbers, which every wire keeps.
Index outcome_elements(const FactorShape& shape) { return 1 + shape.factor_rank; }

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

// Two waves hide the orthonormalisation of one behind the transfer of the other. Little data gains nothing
// from that and pays for twice as many messages; a replica of several processes orthonormalises together,
// which is no work to be done in passing.
constexpr Index kTwoWaveBytes = Index{4} << 20;

template <class Real>
int wave_count(const FactorGroups& groups, const std::vector<FactorShape>& shapes, FactorWire wire) {
  if (groups.replica->size() == 1 || groups.within_replica->size() > 1) return 1;
  const auto element_bytes = static_cast<Index>(wire == FactorWire::kBF16 ? sizeof(BFloat16) : sizeof(Real));
  Index bytes = 0;
  for (const FactorShape& shape : shapes) bytes += shape.left_rows * shape.factor_rank * element_bytes;
  return bytes < kTwoWaveBytes ? 1 : 2;
}

// The matrices of each home in their order, cut into `waves` of about equal elements.
template <class Real>
std::vector<int> choose_waves(const std::vector<FactorShape>& shapes, const std::vector<int>& homes,
                              int replicas, int waves) {
  std::vector<Index> of_home(at(replicas));
  const auto elements = [&](std::size_t i) {
    return left_shape<Real>(shapes[i], 0).owned_rows() * shapes[i].factor_rank;
  };
  for (std::size_t i = 0; i < shapes.size(); ++i) of_home[at(homes[i])] += elements(i);
  std::vector<Index> before(at(replicas));
  std::vector<int> wave(shapes.size());
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    const Index whole = std::max<Index>(1, of_home[at(homes[i])]);
    wave[i] = static_cast<int>(std::min<Index>(waves - 1, before[at(homes[i])] * waves / whole));
    before[at(homes[i])] += elements(i);
  }
  return wave;
}

/// Parts by wave, and in each by home. Guests of a part: dense elements, `riding` in all, that fill what the
/// homes of the first wave lack of factors; then the outcomes of its matrices.
template <class Real>
FactorRows<Real> make_left(const std::vector<FactorShape>& shapes, const std::vector<int>& homes,
                           const std::vector<int>& waves, int replicas, int wave_count, Index riding,
                           Device* device) {
  std::vector<typename FactorRows<Real>::Shape> rows;
  std::vector<Index> elements(at(replicas * wave_count));
  std::vector<Index> guests(elements.size());
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    const int part = waves[i] * replicas + homes[i];
    rows.push_back(left_shape<Real>(shapes[i], part));
    guests[at(part)] += outcome_elements(shapes[i]);
    elements[at(part)] += rows.back().owned_rows() * shapes[i].factor_rank + outcome_elements(shapes[i]);
  }
  const std::vector<Index> fill = fill_up(std::span(elements).first(at(replicas)), riding);
  for (std::size_t home = 0; home < fill.size(); ++home) guests[home] += fill[home];
  return FactorRows<Real>(std::move(rows), guests, device);
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

template <class Real>
std::vector<MatrixView<Real>> followers(const FactorGroups& groups, const std::vector<FactorShape>& shapes,
                                        FactorRows<Real>& right, const std::vector<Index>& matrices) {
  std::vector<MatrixView<Real>> views;
  views.reserve(matrices.size());
  for (const Index i : matrices)
    views.push_back(shapes[at(i)].right_follows ? right.owned(i) : MatrixView<Real>{});
  for (const FactorShape& shape : shapes) {
    LB_EXPECTS(!shape.right_follows || (groups.replica->size() == 1 && groups.within_replica->size() == 1),
               "factor exchange: right_follows of ", shape.name, " with ", groups.replica->size(),
               " replicas of ", groups.within_replica->size(), " processes, expected one of one");
  }
  return views;
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
constexpr Index kTileElements = 2048;         // 8 KiB of float
constexpr Index kPieceElements = 256 * 1024;  // copied in passing: some 100 us

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
FactorExchange<Real>::FactorExchange(const FactorGroups& groups, const std::vector<FactorShape>& shapes,
                                     std::vector<DenseTensor> dense, const FactorExchangeOptions& options)
    : FactorExchange(groups, shapes, options.right_only ? std::vector<FactorShape>{} : shapes,
                     std::move(dense), options) {}

template <class Real>
FactorExchange<Real>::FactorExchange(const FactorGroups& groups, const std::vector<FactorShape>& shapes,
                                     const std::vector<FactorShape>& lefts, std::vector<DenseTensor> dense,
                                     const FactorExchangeOptions& options)
    : groups_(groups),
      options_(checked<Real>(options)),
      homes_(find_homes<Real>(groups, lefts)),
      waves_(at(wave_count<Real>(groups, lefts, options.wire))),
      wave_of_(choose_waves<Real>(lefts, homes_, groups.replica->size(), static_cast<int>(waves_.size()))),
      dense_tensors_(std::move(dense)),
      dense_offsets_(offsets_of(dense_tensors_)),
      left_(make_left<Real>(lefts, homes_, wave_of_, groups.replica->size(), static_cast<int>(waves_.size()),
                            rounds() ? 0 : dense_offsets_.back(), groups.replica->device())),
      right_(right_shapes<Real>(shapes), {0}, groups.replica->device()),
      at_home_(matrices_at(homes_, groups.replica->process())),
      orthonormaliser_(*groups.within_replica, owned_rows(left_, at_home_),
                       followers(groups, shapes, right_, at_home_)) {
  const int replicas = groups.replica->size();
  Device* const device = groups.replica->device();
  if (options.keep_own_right && replicas > 1)
    own_right_.emplace(right_shapes<Real>(shapes), std::vector<Index>{0}, device);
  even_counts_ = even_counts(static_cast<Index>(right_.all_owned().size()), replicas);

  norm_offsets_.push_back(0);
  for (const FactorShape& shape : shapes) norm_offsets_.push_back(norm_offsets_.back() + shape.factor_rank);
  norms_ = Buffer<double>(norm_offsets_.back(), device);

  place_outcomes();
  cut_waves();
  if (rounds()) {
    for (const DenseTensor& tensor : dense_tensors_) dense_shares_.push_back({tensor.name, tensor.elements});
    dense_ = Buffer<Real>(dense_offsets_.back(), device);
    dense_slices_.push_back(dense_.span());
    const std::size_t wire_elements = std::max(left_.all_owned().size(), right_.all_owned().size());
    wire_ = Buffer<BFloat16>(static_cast<Index>(wire_elements), device);
    if (own_right_) rounding_ = Buffer<Real>(even_counts_[at(groups.replica->process())], device);
  } else {
    for (const DenseTensor& tensor : dense_tensors_)
      waves_.front().shares.push_back({tensor.name, tensor.elements, Purpose::kDense});
    for (int home = 0; home < replicas; ++home) {
      const std::span<Real> guest = left_.guest(home);
      dense_slices_.push_back(guest.first(guest.size() - at(outcomes_of_part_[at(home)])));
    }
  }
}

// At the end of every part, in the order of its matrices.
template <class Real>
void FactorExchange<Real>::place_outcomes() {
  const int replicas = groups_.replica->size();
  outcomes_of_part_.resize(left_.part_elements().size());
  const auto part_of = [&](std::size_t i) { return wave_of_[i] * replicas + homes_[i]; };
  const auto elements_of = [&](std::size_t i) { return 1 + norm_offsets_[i + 1] - norm_offsets_[i]; };
  for (std::size_t i = 0; i < homes_.size(); ++i) outcomes_of_part_[at(part_of(i))] += elements_of(i);
  std::vector<Index> next{0};  // in outcome_values_, by part
  for (const Index elements : outcomes_of_part_) next.push_back(next.back() + elements);
  outcome_values_ = Buffer<Real>(next.back(), groups_.replica->device());
  for (std::size_t i = 0; i < homes_.size(); ++i) {
    outcome_begins_.push_back(next[at(part_of(i))]);
    next[at(part_of(i))] += elements_of(i);
  }
}

template <class Real>
void FactorExchange<Real>::cut_waves() {
  const int replicas = groups_.replica->size();
  const std::span<const Index> parts = left_.part_elements();
  Index begin = 0;
  for (std::size_t w = 0; w < waves_.size(); ++w) {
    Wave& wave = waves_[w];
    const std::span<const Index> counts = parts.subspan(w * at(replicas), at(replicas));
    wave.counts.assign(counts.begin(), counts.end());
    wave.begin = begin;
    wave.elements = std::reduce(counts.begin(), counts.end());
    begin += wave.elements;
    for (std::size_t i = 0; i < homes_.size(); ++i) {
      if (wave_of_[i] != static_cast<int>(w)) continue;
      const PayloadShare& share = left_.owned_shares()[i];
      wave.shares.push_back(share);
      wave.shares.push_back({share.parameter, 1 + columns(static_cast<Index>(i)), Purpose::kControl});
    }
    wave.orthonormalised =
        std::ranges::count_if(at_home_, [&](Index i) { return wave_of_[at(i)] <= static_cast<int>(w); });
  }
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
    if (first < last) visit(line(slice.subspan(at(first - slice_begin), at(last - first))), first - begin);
    slice_begin = slice_end;
  }
}

template <class Real>
void FactorExchange<Real>::put_dense(Index k, MatrixView<const Real> values) {
  check_dense_size(k, values.elements());
  const Stopwatch time(times_.pack);
  for_each_slice(k, [&](MatrixView<Real> slice, Index offset) {
    copy<Real>(values.elements_from(offset, 1, slice.cols), slice);
  });
}

template <class Real>
void FactorExchange<Real>::get_dense(Index k, MatrixView<Real> values) const {
  check_dense_size(k, values.elements());
  for_each_slice(k, [&](MatrixView<Real> slice, Index offset) {
    copy<Real>(slice, values.elements_from(offset, 1, slice.cols));
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
  orthonormaliser_.begin();
  reduce_wave(0, 0);
  for (std::size_t w = 0; w < waves_.size(); ++w) {
    if (w + 1 < waves_.size()) reduce_wave(w + 1, waves_[w].orthonormalised);
    orthonormalise(waves_[w].orthonormalised);
    write_outcomes(w);
    gather_wave(w, waves_[std::min(w + 1, waves_.size() - 1)].orthonormalised);
  }
  if (rounds()) {
    const Stopwatch time(times_.unpack);
    const Timeline::Range range(timeline(), "unpack", static_cast<Index>(left_.all_owned().size_bytes()));
    const MatrixView<Real> all = line(left_.all_owned());
    widen_bf16<Real>(wire_.matrix(0, 1, all.cols), all);
  }
  read_outcomes();
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
void FactorExchange<Real>::reduce_wave(std::size_t w, Index orthonormalisable) {
  const Wave& wave = waves_[w];
  const WaitWork work(*groups_.replica, [&] { return orthonormaliser_.run_next(orthonormalisable); });
  reduce(left_.all_owned(), wave.begin, wave.counts, wave.shares);
}

template <class Real>
void FactorExchange<Real>::gather_wave(std::size_t w, Index orthonormalisable) {
  const Wave& wave = waves_[w];
  const WaitWork work(*groups_.replica, [&] { return orthonormaliser_.run_next(orthonormalisable); });
  gather(left_.all_owned(), wave.begin, wave.counts, wave.shares);
}

template <class Real>
void FactorExchange<Real>::orthonormalise(Index count) {
  const Stopwatch time(times_.orthonormalise);
  const Timeline::Range range(timeline(), "orthonormalise", 0);
  orthonormaliser_.run(count);
}

// The end of a part takes outcomes along, and gives them back.
template <class Real>
void FactorExchange<Real>::write_outcomes(std::size_t w) {
  for (std::size_t k = 0; k < at_home_.size(); ++k) {
    const Index i = at_home_[k];
    if (wave_of_[at(i)] == static_cast<int>(w))
      orthonormaliser_.copy_outcome(static_cast<Index>(k),
                                    outcome_values_.matrix(outcome_begin(i), 1, 1 + columns(i)));
  }
  const Index own_part = static_cast<Index>(w) * groups_.replica->size() + groups_.replica->process();
  for_each_outcomes([&](Index part, MatrixView<Real> outcomes, MatrixView<Real> carried) {
    if (part == own_part) copy<Real>(outcomes, carried);
  });
}

template <class Real>
void FactorExchange<Real>::read_outcomes() {
  for_each_outcomes([](Index /*part*/, MatrixView<Real> outcomes, MatrixView<Real> carried) {
    copy<Real>(carried, outcomes);
  });
  outcomes_on_host_.clear();
}

template <class Real>
template <class Visit>
void FactorExchange<Real>::for_each_outcomes(Visit visit) {
  Index begin = 0;
  for (Index part = 0; part < std::ssize(outcomes_of_part_); ++part) {
    const Index elements = outcomes_of_part_[at(part)];
    visit(part, outcome_values_.matrix(begin, 1, elements),
          line(left_.guest(static_cast<int>(part)).last(at(elements))));
    begin += elements;
  }
}

template <class Real>
void FactorExchange<Real>::exchange_right() {
  {
    const Stopwatch time(times_.within_replica);
    right_.reduce_scatter();
  }
  const std::span<const Index> counts = even_counts_;  // whatever matrix the elements belong to
  kept_ = 0;
  if (!rounds()) keep_what_was_sent();  // the sum takes the place of a part of it
  {
    const WaitWork work(*groups_.replica, [&] { return keep_a_piece(); });
    reduce(right_.all_owned(), 0, counts, right_.owned_shares());
  }
  keep_what_was_sent();
  gather(right_.all_owned(), 0, counts, right_.owned_shares());
  if (own_right_ && rounds()) keep_rounding_error();
  finish_right();

  const Stopwatch time(times_.within_replica);
  if (groups_.within_replica->size() > 1)
    groups_.within_replica->all_reduce(norms_.span(), Reduction::kSum, {Purpose::kControl});
  square_roots(norms_.line());
  norms_on_host_.clear();
  right_.all_gather();
  if (own_right_) own_right_->all_gather();
}

template <class Real>
void FactorExchange<Real>::gather_right() {
  const Stopwatch time(times_.within_replica);
  right_.all_gather();
}

// Afterwards this replica's part of the elements from `begin` on holds the sum.
template <class Real>
void FactorExchange<Real>::reduce(std::span<Real> owned, Index begin, std::span<const Index> counts,
                                  std::span<const PayloadShare> shares) {
  Communicator& replica = *groups_.replica;
  const Index elements = std::reduce(counts.begin(), counts.end());
  const std::span<Real> all = owned.subspan(at(begin), at(elements));
  const std::span<Real> part = part_of(all, counts, replica.process());
  if constexpr (kCanRound) {
    if (rounds()) {
      const std::span<BFloat16> wire = wire_.span(begin, elements);
      {
        const Stopwatch time(times_.pack);
        const Timeline::Range range(timeline(), "pack", static_cast<Index>(all.size_bytes()));
        round_to_bf16<Real>(line(all), line(wire));
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

// Sends this replica's part of the elements from `begin` on to the others. With a rounded wire they keep the
// exact part, and the rounded whole, which everyone is to use, the home included, lies in wire_.
template <class Real>
void FactorExchange<Real>::gather(std::span<Real> owned, Index begin, std::span<const Index> counts,
                                  std::span<const PayloadShare> shares) {
  Communicator& replica = *groups_.replica;
  const Index elements = std::reduce(counts.begin(), counts.end());
  const std::span<Real> all = owned.subspan(at(begin), at(elements));
  const Tag tag{.purpose = Purpose::kFactor, .shares = shares, .second_half = true};
  const std::span<Real> part = part_of(all, counts, replica.process());
  if (rounds()) {
    const std::span<BFloat16> wire = wire_.span(begin, elements);
    const std::span<BFloat16> rounded = part_of(wire, counts, replica.process());
    {
      const Stopwatch time(times_.pack);
      const Timeline::Range range(timeline(), "pack", static_cast<Index>(part.size_bytes()));
      round_to_bf16<Real>(line(part), line(rounded));
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
  while (keep_a_piece()) continue;
}

template <class Real>
bool FactorExchange<Real>::keep_a_piece() {
  if (!own_right_) return false;
  const MatrixView<Real> own = line(own_right_->all_owned());
  const Index count = std::min<Index>(kPieceElements, own.cols - kept_);
  if (count == 0) return false;
  const MatrixView<Real> piece = own.elements_from(kept_, 1, count);
  if (rounds()) {
    widen_bf16<Real>(wire_.matrix(kept_, 1, count), piece);
  } else {
    copy<Real>(line(right_.all_owned()).elements_from(kept_, 1, count), piece);
  }
  kept_ += count;
  return true;
}

// own <- own + (round(sum) - sum), so that mean own = (1/D) (sum + round(sum) - sum) = R as received.
template <class Real>
void FactorExchange<Real>::keep_rounding_error() {
  const Stopwatch time(times_.pack);
  const int self = groups_.replica->process();
  const std::span<const Index> counts = even_counts_;
  const std::span<BFloat16> rounded =
      part_of(wire_.span(0, static_cast<Index>(right_.all_owned().size())), counts, self);
  widen_bf16<Real>(line(rounded), rounding_.line());
  add<Real>(Real{-1}, line(part_of(right_.all_owned(), counts, self)), Real{1}, rounding_.line());
  add<Real>(Real{1}, rounding_.line(), Real{1}, line(part_of(own_right_->all_owned(), counts, self)));
}

// R <- sum / D ;  norms_j <- squares of the owned rows of column j
template <class Real>
void FactorExchange<Real>::finish_right() {
  const Stopwatch time(times_.unpack);
  const std::span<Real> all = right_.all_owned();
  const Timeline::Range range(timeline(), "unpack", static_cast<Index>(all.size_bytes()));
  const Real replicas = static_cast<Real>(groups_.replica->size());
  std::vector<MatrixView<const Real>> factors;
  for (Index i = 0; i < std::ssize(norm_offsets_) - 1; ++i) factors.push_back(right_.owned(i));
  // On the host a tile that one loop has written is still in the first cache when the next one reads it.
  const Index tile = groups_.replica->device() == nullptr ? kTileElements : std::ssize(all);
  for_each_tile(std::ssize(all), tile, [&](Index begin, Index count) {
    const MatrixView<Real> r = line(all).elements_from(begin, 1, count);
    if (rounds()) widen_bf16<Real>(wire_.matrix(begin, 1, count), r);
    scale<Real>(Real{1} / replicas, r);
  });
  sums_of_squares_of_columns<Real>(factors, norms_.line());
}

template <class Real>
std::span<const std::uint8_t> FactorExchange<Real>::outcome_on_host(Index i) const {
  if (outcomes_on_host_.empty()) {
    const OnHost<Real> numbers(outcome_values_.line());
    for (const Real x : numbers.view().flat()) outcomes_on_host_.push_back(static_cast<std::uint8_t>(x));
  }
  return std::span(outcomes_on_host_).subspan(at(outcome_begin(i)), at(1 + columns(i)));
}

template <class Real>
Factorisation FactorExchange<Real>::factorisation(Index i) const {
  return static_cast<Factorisation>(outcome_on_host(i).front());
}

template <class Real>
std::span<const std::uint8_t> FactorExchange<Real>::dead(Index i) const {
  return outcome_on_host(i).subspan(1);
}

template <class Real>
bool FactorExchange<Real>::right_followed(Index i) const {
  // One replica is home to all matrices, in their order.
  return at_home_.size() == homes_.size() && orthonormaliser_.followed(i);
}

template <class Real>
std::span<const double> FactorExchange<Real>::right_norms(Index i) const {
  if (norms_on_host_.empty()) {
    const OnHost<double> norms(norms_.line());
    norms_on_host_.assign(norms.view().data, norms.view().data + norms_.size());
  }
  return std::span(norms_on_host_).subspan(at(norm_offsets_[at(i)]), at(columns(i)));
}

template class FactorExchange<float>;
template class FactorExchange<double>;

}  // namespace lowband
