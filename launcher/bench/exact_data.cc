#include "launcher/bench/exact_data.h"

#include "runtime/error.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

namespace lowband {
namespace {

// Finaliser of SplitMix64 (Steele, Lea, Flood 2014).
std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31);
}

constexpr std::uint64_t kMeanSalt = 1;
constexpr std::uint64_t kPairSalt = 2;
constexpr std::uint64_t kDeviationSalt = 3;
constexpr std::uint64_t kSignSalt = 4;
constexpr std::uint64_t kCarrierSalt = 5;

float value_of(float x) { return x; }
float value_of(BFloat16 x) { return to_float(x); }

void store(Index value, float& out) { out = static_cast<float>(value); }
void store(Index value, BFloat16& out) { out = to_bfloat16(static_cast<float>(value)); }

/// 0 .. n-1 from the upper bits.
Index below(std::uint64_t bits, Index n) {
  return static_cast<Index>((bits >> 32) * static_cast<std::uint64_t>(n) >> 32);
}

}  // namespace

ExactSummands::ExactSummands(int process, int processes, Held held, std::uint64_t seed)
    : process_(process), processes_(processes), seed_(mix(seed + 1)) {
  const Index largest = held == Held::kBF16 ? 256 : Index{1} << 24;
  half_ = std::max<Index>(1, largest / processes / 2);
  left_entry_ = static_cast<Index>(std::bit_floor(static_cast<std::uint64_t>(half_)));
}

std::uint64_t ExactSummands::hash(Index tensor, Index element, std::uint64_t salt) const {
  return mix(seed_ + mix(static_cast<std::uint64_t>(tensor) * 8 + salt) +
             static_cast<std::uint64_t>(element));
}

Index ExactSummands::mean(Index tensor, Index element) const {
  return below(hash(tensor, element, kMeanSalt), 2 * half_ + 1) - half_;
}

// Processes stand in a circle that starts at another one for every element, and pair up: +d and -d. An odd
// one is left over.
Index ExactSummands::deviation(Index tensor, Index element) const {
  const Index place =
      (process_ + below(hash(tensor, element, kPairSalt), processes_)) % static_cast<Index>(processes_);
  if (place == processes_ - 1 && processes_ % 2 == 1) return 0;
  const std::uint64_t pair = kDeviationSalt + 8 * static_cast<std::uint64_t>(place / 2 + 1);
  const Index magnitude = 1 + below(hash(tensor, element, pair), half_);
  return place % 2 == 0 ? magnitude : -magnitude;
}

template <class T>
void ExactSummands::fill(Index tensor, std::span<T> values) const {
  for (std::size_t e = 0; e < values.size(); ++e) {
    const auto element = static_cast<Index>(e);
    store(mean(tensor, element) + deviation(tensor, element), values[e]);
  }
}

template <class T>
Index ExactSummands::count_not_sum(Index tensor, std::span<const T> values) const {
  Index wrong = 0;
  for (std::size_t e = 0; e < values.size(); ++e)
    wrong += value_of(values[e]) != static_cast<float>(sum(tensor, static_cast<Index>(e)));
  return wrong;
}

Index ExactSummands::count_not_mean(Index tensor, std::span<const float> values) const {
  Index wrong = 0;
  for (std::size_t e = 0; e < values.size(); ++e)
    wrong += values[e] != static_cast<float>(mean(tensor, static_cast<Index>(e)));
  return wrong;
}

ExactSummands::Selection ExactSummands::selection(Index rows, Index columns) {
  LB_EXPECTS(columns >= 1 && rows >= columns, "exact left factor: found ", rows, " rows and ", columns,
             " columns, expected at least as many rows as columns");
  Selection selection{.support = 1, .stride = 1, .entry = 1};
  while (selection.support * 4 * columns <= rows) {
    selection.support *= 4;
    selection.entry /= 2;
  }
  // Near the golden section, so that neighbouring rows belong to distant columns.
  selection.stride = std::max<Index>(1, rows * 5 / 8);
  while (std::gcd(selection.stride, rows) != 1) ++selection.stride;
  return selection;
}

Index ExactSummands::column_of(const Selection& selection, Index row, Index rows, Index columns) {
  const Index slot = row * selection.stride % rows;
  return slot < columns * selection.support ? slot / selection.support : -1;
}

bool ExactSummands::negative(Index tensor, Index row) const {
  return (hash(tensor, row, kSignSalt) & 1U) != 0;
}

void ExactSummands::fill_left(Index tensor, MatrixView<float> left) const {
  const Selection selected = selection(left.rows, left.cols);
  for (Index i = 0; i < left.rows; ++i) {
    for (Index j = 0; j < left.cols; ++j)
      left(i, j) = static_cast<float>(deviation(tensor, i * left.cols + j));
    const Index column = column_of(selected, i, left.rows, left.cols);
    if (column >= 0 && below(hash(tensor, i, kCarrierSalt), processes_) == process_)
      left(i, column) += static_cast<float>(negative(tensor, i) ? -left_entry_ : left_entry_);
  }
}

Index ExactSummands::count_not_orthonormal(Index tensor, MatrixView<const float> p) const {
  const Selection selected = selection(p.rows, p.cols);
  Index wrong = 0;
  for (Index i = 0; i < p.rows; ++i) {
    const Index column = column_of(selected, i, p.rows, p.cols);
    const auto entry = static_cast<float>(negative(tensor, i) ? -selected.entry : selected.entry);
    for (Index j = 0; j < p.cols; ++j) wrong += p(i, j) != (j == column ? entry : 0.0F);
  }
  return wrong;
}

template void ExactSummands::fill(Index, std::span<float>) const;
template void ExactSummands::fill(Index, std::span<BFloat16>) const;
template Index ExactSummands::count_not_sum(Index, std::span<const float>) const;
template Index ExactSummands::count_not_sum(Index, std::span<const BFloat16>) const;

}  // namespace lowband
