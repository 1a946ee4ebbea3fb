#pragma once

#include "collectives/ledger.h"
#include "runtime/types.h"

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace lowband {

enum class Reduction : std::uint8_t { kSum, kMax };
std::string_view reduction_name(Reduction reduction);

/// One collective as its caller described it: what the processes of a group must agree on before data moves.
/// Sent as it lies in memory, between processes of one program; without padding, so that equal calls are
/// equal bytes.
struct Call {
  Index sequence = 0;  // calls on this group so far, this one included
  Index elements = 0;  // of the logical buffer
  std::uint64_t counts_hash = 0;
  std::int32_t root = 0;
  Operation operation = Operation::kBarrier;
  Reduction reduction = Reduction::kSum;
  DType dtype = DType::kU8;
  Purpose purpose = Purpose::kControl;
  bool operator==(const Call&) const = default;
};
static_assert(sizeof(Call) == 32);

/// What sums of `dtype` are formed in.
constexpr DType sum_dtype(DType dtype) { return dtype == DType::kBF16 ? DType::kF32 : dtype; }

/// Distinguishes lists of per-process counts with equal totals.
std::uint64_t hash_counts(std::span<const Index> counts);

/// "all_reduce(sum, f32, 12 elements, factor)".
std::string describe(const Call& call);

}  // namespace lowband
