#pragma once

#include "collectives/ledger.h"
#include "runtime/types.h"

#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lowband {

/// The steps offset, offset + period, offset + 2 period, ..., counted from 0; every step by default.
struct StepPhase {
  Index period = 1;
  Index offset = 0;
  bool and_first = false;  // and step 0
  bool others = false;     // all steps but these
  /// No step but `step`.
  static constexpr StepPhase only(Index step) { return {.period = 0, .offset = step}; }
  constexpr bool contains(Index step) const {
    const bool listed = period == 0 ? step == offset : step >= offset && (step - offset) % period == 0;
    return (listed || (and_first && step == 0)) != others;
  }
  bool operator==(const StepPhase&) const = default;
};

/// What the transfers of one process may cost: payload bytes by (axis, purpose) and parameter, as the ledger
/// counts them. What has no line here is not limited.
///
/// Threads: filled while nothing is sent; checked by any number at once.
class ByteBudget {
 public:
  /// Adds to what each step of `phase` may send on `axis` for `purpose`; step k has number k + 1 in the
  /// ledger. The line of an axis and purpose is the sum of its parameters, and as soon as it names one it
  /// limits each parameter too, to zero where it is not named. Without a name, bytes are for anything.
  /// Throws: InvalidArgument, for Purpose::kPeriodic, fewer than 0 bytes or a negative period or offset.
  void allow(std::string_view axis, Purpose purpose, Index bytes_per_step, std::string_view parameter = "",
             StepPhase phase = {});

  /// Adds to what may be sent on `axis` for Purpose::kPeriodic: `bytes` in every interval of `interval_steps`
  /// steps that has begun since the ledger began, at whichever of its steps; the first has begun before the
  /// first step. So what is sent every interval_steps steps, beginning anywhere, fits exactly, and what is
  /// saved in one interval may be sent in a later one.
  void allow_every(std::string_view axis, Index interval_steps, Index bytes);

  bool empty() const { return lines_.empty() && periodic_.empty(); }

  /// What `transfer`, not sent yet, asks for; its seconds and wire bytes do not matter.
  ///
  /// A function of the arguments alone: processes with equal budgets, ledgers and transfers pass or refuse
  /// together. The second half of a reduction asks for nothing.
  /// Throws: BudgetExceeded, naming step, axis, purpose, parameter, bytes planned, spent and asked.
  void check(const Ledger& ledger, const Transfer& transfer, std::span<const PayloadShare> shares,
             Index element_bytes) const;

 private:
  struct Entry {
    Index bytes_per_step;
    StepPhase phase;
  };
  /// Entries of one phase are one entry.
  struct Entries {
    std::vector<Entry> entries;
    void add(Index bytes_per_step, StepPhase phase);
    Index in_step(Index step) const;
  };
  struct Line {
    Entries all;
    std::map<std::string, Entries, std::less<>> of_parameter;
  };
  struct Interval {
    Index steps;
    Index bytes;
  };
  using Key = std::pair<std::string, Purpose>;
  void check_step(const Ledger& ledger, const Transfer& transfer, Purpose purpose, Index asked_bytes,
                  std::span<const PayloadShare> shares, Index element_bytes) const;
  void check_periodic(const Ledger& ledger, std::string_view axis, Index asked_bytes) const;

  std::map<Key, Line> lines_;
  std::map<std::string, std::vector<Interval>, std::less<>> periodic_;  // by axis
};

}  // namespace lowband
