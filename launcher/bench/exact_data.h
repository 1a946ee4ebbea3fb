#pragma once

#include "runtime/bfloat16.h"
#include "runtime/tensor.h"

#include <cstdint>
#include <span>

namespace lowband {

/// Summands whose sum over processes is known and comes out exact, in whatever order it is formed: integers
/// with |x_p| <= L / processes, L the integers that the wire type holds (2^24 float32, 2^8 bfloat16).
///
///     x_p(e) = mean(e) + d_p(e),   sum over p of d_p(e) = 0,   so sum over p of x_p = processes x mean
///
/// mean and d are hashes of (seed, tensor, element): a misplaced, missing or doubled summand is seen. Beyond
/// 128 processes in bfloat16 only sums formed in float32 are exact.
class ExactSummands {
 public:
  enum class Held : std::uint8_t { kF32, kBF16 };
  ExactSummands(int process, int processes, Held held, std::uint64_t seed);

  Index mean(Index tensor, Index element) const;
  Index sum(Index tensor, Index element) const { return processes_ * mean(tensor, element); }
  /// x_p - mean of this process.
  Index deviation(Index tensor, Index element) const;

  /// values <- this process's summands.
  template <class T>
  void fill(Index tensor, std::span<T> values) const;
  /// How many of the values differ from the sum, or from the mean. NaN differs.
  template <class T>
  Index count_not_sum(Index tensor, std::span<const T> values) const;
  Index count_not_mean(Index tensor, std::span<const float> values) const;

  // Left factors, whose orthonormal basis is known exactly. Column j of the sum has 4^k entries +-c at rows
  // that no other column uses, c a power of two: its norm 2^k c, and so P = +-2^-k there and 0 elsewhere, is
  // exact in every step of a Cholesky or Householder factorisation. One process has the whole of an entry.
  // 4^k is the largest power with 4^k columns <= rows.

  /// Shapes: left is (rows, columns), rows >= columns.
  void fill_left(Index tensor, MatrixView<float> left) const;
  /// How many elements differ from orth(sum).
  Index count_not_orthonormal(Index tensor, MatrixView<const float> p) const;

 private:
  struct Selection {
    Index support;  // 4^k
    Index stride;   // coprime to the rows
    double entry;   // 2^-k
  };
  static Selection selection(Index rows, Index columns);
  /// The column that uses `row`, or -1.
  static Index column_of(const Selection& selection, Index row, Index rows, Index columns);
  bool negative(Index tensor, Index row) const;
  std::uint64_t hash(Index tensor, Index element, std::uint64_t salt) const;

  int process_;
  int processes_;
  Index half_;        // bound of |mean| and |deviation|
  Index left_entry_;  // c: the largest power of two up to half_
  std::uint64_t seed_;
};

}  // namespace lowband
